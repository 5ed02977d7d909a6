"""`astra VERB`: a table of verbs; the module behind a verb is imported only when it is called."""

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from astra_jax import __version__, terminal
from astra_jax.errors import AstraError, first_line
from astra_jax.terminal import one_line

# verb -> (module, what it does). Every module has a dataclass `Args` and a function `main(args)`.
VERBS = {
    "convert": ("checkpoints.convert", "Hugging Face folder or hub id -> checkpoint"),
    "calibrate": ("train.calibrate", "find codebooks by k-means on real activations"),
    "finetune": ("train.finetune", "train the model to live with quantized exchange (NAVQ)"),
    "eval": ("eval.verbs.evaluate", "accuracy or perplexity, bits and predicted latency, on one device and on several"),
    "run": ("eval.verbs.run", "classify images or texts, or go on with a text, on a mesh of devices"),
    "worker": ("eval.verbs.worker", "stay up with a checkpoint on several hosts, for `astra run --join`"),
    "bench": ("eval.verbs.bench", "compare strategies on one model: compute, bits, latency over the link's rate"),
    "plan": ("eval.verbs.plan", "which strategy, how many devices and which G for your link, or to stay on one device"),
    "net": ("eval.verbs.net", "how fast the links between workers are, and what that means for a model"),
    "lab": ("eval.verbs.lab", "run a command on several hosts with slow links, made of one Linux machine"),
    "export": ("checkpoints.export", "checkpoint -> Hugging Face folder"),
    "info": ("checkpoints.info", "what a checkpoint holds"),
}


def usage() -> str:
    """The text of `astra --help`."""
    lines = [f"astra {__version__}: one Transformer on several devices joined by a slow link", ""]
    lines += ["usage: astra VERB [options]        astra VERB --help explains a verb", ""]
    lines += [f"  {verb:<10} {text}" for verb, (_, text) in VERBS.items()]
    lines += ["", "options of every verb: --json FILE (what was printed, for machines), --debug (tracebacks)"]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb. Returns the exit code, as `guarded` does."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA's own log; what goes wrong there is raised here, too
    argv = list(sys.argv[1:] if argv is None else argv)
    end = argv.index("--") if "--" in argv else len(argv)  # what follows is not ours: the command of `astra lab`
    debug = "--debug" in argv[:end]
    argv = [a for a in argv[:end] if a != "--debug"] + argv[end:]
    return guarded(lambda: _start(argv), debug)


def _start(argv: Sequence[str]) -> None:
    if not argv or argv[0] in ("-h", "--help", "help"):
        terminal.write(f"{usage()}\n")
    elif argv[0] in ("-V", "--version", "version"):
        terminal.write(f"{__version__}\n")
    else:
        _run(argv[0], argv[1:])


def guarded(work: Callable[[], object], debug: bool | None = None) -> int:
    """Runs `work`, and turns what goes wrong into one line and an exit code.

    Args:
      debug: whether tracebacks are shown, too; None for those of mistakes in astra alone.

    Returns:
      0, 2 for what the user can fix, 1 for a mistake in astra, 130 after Ctrl-C.
    """
    terminal.prepare()
    _set_up_jax()
    try:
        work()
        _of("hosts.distributed", "leave")
        _of("report", "say_status")  # only now, when host 0 has its answer
        if fault := terminal.fault():
            raise AstraError(f"not all could be written to stdout: {fault.strerror or fault}")
        return 0
    except (AstraError, OSError) as error:  # OSError: permissions, a full disk
        return _failed(str(error), debug=bool(debug))
    except KeyboardInterrupt:
        terminal.complain("astra: stopped")
        _of("hosts.distributed", "abandon", 130)
        return 130
    except Exception as error:
        explained = _explained(error)
        shown = bool(debug) if explained else debug is not False
        mistake = f"{first_line(error)}: this is a mistake in astra: please report it with " + (
            "the lines above" if shown else "what --debug shows"
        )
        return _failed(explained or mistake, debug=shown, code=2 if explained else 1)
    finally:
        terminal.write("")  # what was printed otherwise, such as help: nothing is left for Python's own end


def _failed(message: str, *, debug: bool, code: int = 2) -> int:
    """Tells the user, who has `message`, and perhaps a traceback, on stderr; one of several hosts does not wait."""
    if debug:
        terminal.complain(traceback.format_exc().rstrip())
    terminal.complain(f"astra: error: {one_line(message)}")
    _of("hosts.distributed", "abandon", code)
    return code


def _explained(error: Exception) -> str | None:
    """What of the machine or the environment is behind an error, if that is so."""
    if "jax" not in sys.modules:
        return None
    from astra_jax.cli import environment

    return environment.explain(error)


def _of(module: str, name: str, *args: object) -> None:
    """Calls a function of a module of `astra_jax`, if that is in use; importing it takes long."""
    if loaded := sys.modules.get(f"astra_jax.{module}"):
        getattr(loaded, name)(*args)


def _set_up_jax() -> None:
    """Lets JAX keep what it compiles, and compute what is right, once JAX is there; importing it takes long."""
    if "jax" in sys.modules:
        from astra_jax.cli import compilation_cache, environment

        if changed := environment.fix():
            terminal.complain(f"astra: {' and '.join(changed)} is ignored: no program of astra is made for it")
        compilation_cache.keep()


def _run(verb: str, rest: Sequence[str]) -> None:
    if verb not in VERBS:
        import difflib

        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"verbs are {', '.join(VERBS)}"
        raise AstraError(f"there is no verb {verb!r}: {hint}")
    module = importlib.import_module(VERBS[verb][0])
    from astra_jax.cli.arguments import parse

    args = parse(module.Args, rest, prog=f"astra {verb}", description=module.__doc__)
    _set_up_jax()
    module.main(args)


if __name__ == "__main__":
    sys.exit(main())
