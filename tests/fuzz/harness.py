"""One mutation and what a parser makes of it: limits of time and memory, and who was accepted or refused how often."""

import contextlib
import faulthandler
import os
import resource
import signal
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

from astra_jax.errors import LONGEST, AstraError

MUTATIONS = int(os.environ.get("ASTRA_FUZZ", "120"))  # of every parser
SECONDS = 10.0  # of one example, on a busy machine; all but the first take milliseconds
STUCK_SECONDS = 120.0  # of one that does not even come back from C, after which the process ends with a traceback
MEMORY = 1 << 29  # bytes that one example may take


REFUSED = object()  # what `attempt` returns where the parser said no

tried: dict[str, Counter[str]] = defaultdict(Counter)  # parser -> how often it accepted and refused


def fuzz(test: Callable[..., None], share: int = 1) -> Callable[..., None]:
    """A test of `MUTATIONS` examples, or of a share of them, which are always the same ones."""
    given = settings(
        max_examples=max(1, MUTATIONS // share),
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    return pytest.mark.slow(given(test))


def attempt(parser: str, parse: Callable[..., Any], *arguments: Any, refusals: tuple[type, ...] = (AstraError,)) -> Any:
    """What a parser makes of a mutation; `REFUSED` where it raises what it may.

    Raises:
      AssertionError: it takes too long or too much memory, or its message is no line that a person reads.
      Exception: what else it raises, which is a fault, too.
    """
    try:
        with _limited(parser):
            found = parse(*arguments)
    except refusals as error:
        tried[parser]["refused"] += 1
        assert len(str(error)) <= LONGEST + 9, (
            f"{parser}: a message of {len(str(error)):,} characters: {str(error)[:200]}"
        )
        return REFUSED
    except BaseException as error:
        if isinstance(error, Exception | KeyboardInterrupt | SystemExit):
            raise
        raise AssertionError(f"{parser}: {type(error).__name__}: {error}") from error  # such as Rust's panics
    tried[parser]["accepted"] += 1
    return found


class _TooLong(BaseException):
    """Is no Exception, so that no parser catches it."""


@contextlib.contextmanager
def _limited(parser: str) -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise _TooLong(f"took more than {SECONDS:g} s")

    before = _forget_peak()
    previous = signal.signal(signal.SIGALRM, stop)
    faulthandler.dump_traceback_later(STUCK_SECONDS, exit=True)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, previous)
        taken = _peak() - before
        assert taken <= MEMORY, f"{parser}: took {taken / 2**20:,.0f} MiB of memory"


def _forget_peak() -> int:
    """Lets Linux count the most memory anew, from what is in use now."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    """The most memory that this process has had, in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux, where the most of the whole run is known
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def summary() -> list[str]:
    """The lines of the table of what was tried."""
    rows = [(name, counts["refused"], counts["accepted"]) for name, counts in sorted(tried.items())]
    wide = max((len(name) for name, *_ in rows), default=0)
    lines = [f"{'parser':{wide}}  {'tried':>9}  {'refused':>9}  {'accepted':>9}"]
    lines += [f"{name:{wide}}  {no + yes:>9,}  {no:>9,}  {yes:>9,}" for name, no, yes in rows]
    return lines if rows else []
