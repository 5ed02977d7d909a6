"""The command line: what it prints, how it exits, and that it starts at once."""

import dataclasses
import importlib
import subprocess
import sys
import types

import pytest

from astra_jax import __version__
from astra_jax.cli import main
from astra_jax.errors import AstraError


@dataclasses.dataclass(frozen=True)
class Args:
    how: str = "well"


@pytest.fixture
def verb(monkeypatch):
    """A verb `work` that does what `--how` says."""

    def work(args):
        if args.how == "badly":
            raise AstraError("it went\n  badly")
        if args.how == "interrupted":
            raise KeyboardInterrupt
        print(f"done {args.how}")

    module = types.ModuleType("worker", "Works.")
    module.Args, module.main = Args, work
    monkeypatch.setitem(sys.modules, "worker", module)
    monkeypatch.setitem(main.VERBS, "work", ("worker", "works"))


@pytest.mark.usefixtures("verb")
@pytest.mark.parametrize(
    ("argv", "code", "out", "err"),
    [
        (["work"], 0, "done well\n", ""),
        (["work", "--how", "fast"], 0, "done fast\n", ""),
        (["work", "--how", "badly"], 2, "", "astra: error: it went badly\n"),
        (["work", "--how", "interrupted"], 130, "", "astra: stopped\n"),
        (["--version"], 0, f"{__version__}\n", ""),
        (["finetun"], 2, "", "astra: error: there is no verb 'finetun': did you mean finetune?\n"),
    ],
)
def test_exit_codes_and_messages(capsys, argv, code, out, err):
    assert main.main(argv) == code
    assert capsys.readouterr() == (out, err)


@pytest.mark.usefixtures("verb")
def test_an_unknown_option_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        main.main(["work", "--speed", "9"])
    assert stopped.value.code == 2
    assert "--speed" in capsys.readouterr().err


def test_a_verb_like_no_other_lists_all(capsys):
    assert main.main(["xyz"]) == 2
    verbs = "convert, calibrate, finetune, eval, run, worker, bench, plan, net, lab, export, info"
    assert f"verbs are {verbs}" in capsys.readouterr().err


def test_a_message_is_no_longer_than_what_is_read_of_it():
    """A value in it may come from a file, and be of any length; what to do stands at the end."""
    message = str(AstraError(f"config.json: model_type is {'x' * 10**6!r}; known are bert and vit: correct it"))
    assert len(message) < 1010 and message.startswith("config.json: model_type is 'xxx")
    assert message.endswith("xxx'; known are bert and vit: correct it")
    assert str(AstraError("a" * 1000)) == "a" * 1000


@pytest.mark.usefixtures("verb")
def test_debug_shows_the_traceback(capsys):
    assert main.main(["work", "--how", "badly", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.endswith("astra: error: it went badly\n")


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_verb(capsys, argv):
    assert main.main(argv) == 0
    out = capsys.readouterr().out
    assert all(f"  {verb} " in out for verb in main.VERBS)


def test_help_imports_nothing_heavy():
    program = (
        "import sys, astra_jax.cli.main\n"
        "assert astra_jax.cli.main.main(['--help']) == 0\n"
        "assert not {'jax', 'flax', 'numpy', 'tyro', 'transformers'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(("verb", "home"), [(verb, home) for verb, (home, _) in main.VERBS.items()])
def test_every_verb_has_arguments_a_main_and_json(verb, home):
    module = importlib.import_module(home)
    assert dataclasses.is_dataclass(module.Args)
    has_json = "json" in {field.name for field in dataclasses.fields(module.Args)}
    assert has_json == (verb != "worker")  # which does not end, and prints nothing of its own
    assert callable(module.main)
    assert module.__doc__


def test_the_public_names_are_found_lazily():
    import astra_jax

    assert all(hasattr(astra_jax, name) for name in astra_jax.__all__)
    assert not hasattr(astra_jax, "parallelise")
