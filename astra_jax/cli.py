"""`astra VERB`: a table of verbs; the module behind a verb is imported only when it is called."""

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from astra_jax import __version__
from astra_jax.errors import AstraError

# verb -> (module, what it does). Every module has a dataclass `Args` and a function `main(args)`.
VERBS = {
    "convert": ("checkpoints.convert", "Hugging Face folder or hub id -> checkpoint"),
    "calibrate": ("train.calibrate", "find codebooks by k-means on real activations"),
    "finetune": ("train.finetune", "train the model to live with quantized exchange (NAVQ)"),
    "eval": ("eval.evaluate", "accuracy or perplexity, bits and predicted latency, on one device and on several"),
    "run": ("eval.run", "classify images or texts, or go on with a text, on a mesh of devices"),
    "worker": ("eval.worker", "stay up with a checkpoint on several hosts, for `astra run --workers`"),
    "bench": ("eval.bench", "compare strategies on one model: compute, bits, latency over the link's rate"),
    "plan": ("eval.plan", "which strategy, how many devices and which G for your link, or to stay on one device"),
    "net": ("eval.net", "check, before a run, that several hosts reach each other, and how fast"),
    "lab": ("eval.lab", "run a command on several hosts with slow links, made of one Linux machine"),
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
    """Runs a verb. Returns the exit code: 0, 2 for an error that the user can fix, 130 after Ctrl-C."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA's own log; what goes wrong there is raised here, too
    argv = list(sys.argv[1:] if argv is None else argv)
    end = argv.index("--") if "--" in argv else len(argv)  # what follows is not ours: the command of `astra lab`
    debug = "--debug" in argv[:end]
    argv = [a for a in argv[:end] if a != "--debug"] + argv[end:]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version", "version"):
        print(__version__)
        return 0
    return guarded(lambda: _run(argv[0], argv[1:]), debug)


def guarded(work: Callable[[], object], debug: bool = False) -> int:
    """Runs `work` and turns what a user can fix into one line and an exit code: 0, 2 or, after Ctrl-C, 130."""
    _keep_programs()
    try:
        work()
        _of("cluster", "leave")
        _of("console", "say_status")  # only now, when host 0 has its answer
        return 0
    except (AstraError, OSError) as error:  # OSError: permissions, a full disk
        if debug:
            traceback.print_exc()
        _of("cluster", "abandon", str(error))
        print(f"astra: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        _of("cluster", "abandon", "stopped by Ctrl-C")
        print("astra: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        _of("cluster", "lost", error)
        raise


def _of(module: str, name: str, *args: object) -> None:
    """Calls a function of a module of `astra_jax`, if that is in use; importing it takes long."""
    if loaded := sys.modules.get(f"astra_jax.{module}"):
        getattr(loaded, name)(*args)


def _keep_programs() -> None:
    """Lets JAX keep what it compiles, once JAX is there; importing it takes long."""
    if "jax" in sys.modules:
        from astra_jax import programs

        programs.keep()


def _run(verb: str, rest: Sequence[str]) -> None:
    if verb not in VERBS:
        import difflib

        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"verbs are {', '.join(VERBS)}"
        raise AstraError(f"there is no verb {verb!r}: {hint}")
    import tyro

    module = importlib.import_module(VERBS[verb][0])
    args = tyro.cli(module.Args, prog=f"astra {verb}", description=module.__doc__, args=rest)
    _keep_programs()
    module.main(args)


if __name__ == "__main__":
    sys.exit(main())
