"""Commands under what the environment may say: they work, or end in one line that is true."""

import os
import subprocess
import sys

import jax
import pytest

from astra_jax.cli import environment, main
from astra_jax.codecs.config import VQConfig
from tests.helpers import ROOT

CODES = VQConfig(groups=2, codewords=4)
NO_UTF8 = os.fsdecode(b"caf\xe9")
# What JAX can be told that no program here is made for.
STRANGE = {
    "JAX_ENABLE_X64": "1",
    "JAX_DISABLE_JIT": "1",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
}


def astra(*words, cwd, stdout=subprocess.PIPE, unset=(), **variables):
    """Runs a verb in an environment; returns its exit code, and stdout and stderr as bytes."""
    known = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "astra_jax.cli.main", *words],
        cwd=cwd,
        env={**known, "PYTHONPATH": str(ROOT), **variables},
        stdout=stdout,
        stderr=subprocess.PIPE,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_platform_that_is_not_here_is_one_line(gpt2s):
    code, out, err = astra("info", "coded", cwd=gpt2s(coded=CODES), JAX_PLATFORMS="cuda")
    assert code == 2 and out == b""
    assert err.startswith(b"astra: error: JAX_PLATFORMS is 'cuda', and JAX finds no device (")
    assert err.endswith(b"): unset it or set it to cpu\n") and err.count(b"\n") == 1


@pytest.mark.parametrize("name", sorted(STRANGE))
def test_what_is_fixed_is_said(monkeypatch, capsys, name):
    before, values = getattr(jax.config, name.lower()), {"strict": "strict", "raise": "raise", "1": True}
    jax.config.update(name.lower(), values[STRANGE[name]])
    try:
        assert main.guarded(lambda: None) == 0
        assert getattr(jax.config, name.lower()) == before == environment.FIXED[name.lower()]
    finally:
        jax.config.update(name.lower(), before)
    assert capsys.readouterr().err == f"astra: {name} is ignored: no program of astra is made for it\n"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (MemoryError(), 2, "there is not enough memory (MemoryError): take a smaller batch"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of\nmemory"),
            2,
            "there is not enough memory (RuntimeError: RESOURCE_EX",
        ),
        (
            FloatingPointError("invalid value (nan)"),
            2,
            "FloatingPointError: invalid value (nan): JAX_DEBUG_NANS may be",
        ),
        (OSError(28, "No space left on device", "a\x1b[2J"), 2, "[Errno 28] No space left on device: 'a\\x1b[2J'"),
    ],
)
def test_ordinary_faults_are_one_line(monkeypatch, capsys, error, code, said):
    monkeypatch.setenv("JAX_DEBUG_NANS", "True")

    def work():
        raise error

    assert main.guarded(work) == code
    err = capsys.readouterr().err
    assert err.startswith(f"astra: error: {said}") and err.count("\n") == 1


def test_a_mistake_of_ours_is_one_line_that_says_so(monkeypatch, capsys):
    def work():
        raise KeyError("what")

    assert main.guarded(work, debug=False) == 1
    assert capsys.readouterr().err == (
        "astra: error: KeyError: 'what': this is a mistake in astra: please report it with what --debug shows\n"
    )
    assert main.guarded(work) == 1  # recipes, which have no --debug
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.endswith("please report it with the lines above\n")


@pytest.mark.parametrize(
    ("variables", "unset"),
    [
        ({"HOME": "/proc/none"}, ("XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR")),
        ({"LC_ALL": "C", "PYTHONIOENCODING": "latin-1"}, ("HOME", "LANG")),
    ],
)
def test_a_name_that_is_no_utf8_anywhere(gpt2s, variables, unset):
    place = gpt2s(coded=CODES)
    (place / "coded").rename(place / NO_UTF8)
    code, out, err = astra("info", NO_UTF8, cwd=place, unset=unset, **variables)
    assert (code, err) == (0, b"")
    assert out.startswith(b"caf\\xe9\n")


def test_a_reader_that_is_gone_and_a_full_disk(gpt2s):
    place = gpt2s(coded=CODES)
    read, write = os.pipe()
    os.close(read)
    code, _, err = astra("info", "coded", "--json", "all.json", cwd=place, stdout=write)
    os.close(write)
    assert (code, err) == (0, b"") and (place / "all.json").stat().st_size
    with open("/dev/full", "wb") as full:
        code, _, err = astra("info", "coded", cwd=place, stdout=full)
    assert (code, err) == (2, b"astra: error: not all could be written to stdout: No space left on device\n")


VERBS = {
    "calibrate": "calibrate plain {out} --data {text} --groups 2 --codewords 4 --samples 4 --tokens 32 --length 16",
    "eval": "eval plain coded --data {text} --split train --devices 2 --length 16 --limit 1 --rates 10mbit",
    "run": "run coded --prompt w1 --max-new-tokens 3 --devices 2",
}


@pytest.mark.slow
@pytest.mark.parametrize("verb", sorted(VERBS))
def test_verbs_do_what_they_do_in_any_environment(gpt2s, verb):
    """Among settings that JAX is not used with, names that are no UTF-8, no home and no UTF-8 in the terminal."""
    place = gpt2s(plain=None, coded=CODES)
    (place / "text.txt").rename(place / f"{NO_UTF8}.txt")
    words = [word.format(out=f"{NO_UTF8}-out", text=f"{NO_UTF8}.txt") for word in VERBS[verb].split()]
    unset = ("XDG_CACHE_HOME", "LANG", "HF_HOME")
    code, out, err = astra(
        *words, cwd=place, unset=unset, HOME="/proc/none", LC_ALL="C", PYTHONIOENCODING="latin-1", **STRANGE
    )
    assert code == 0 and out, err
    (line,) = (line for line in err.decode().splitlines() if line.startswith("astra: "))
    assert line.endswith("is ignored: no program of astra is made for it")
