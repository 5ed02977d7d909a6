"""Text on its way out: exact in a file or a pipe, harmless on a terminal, and never a reason to stop working."""

import contextlib
import io
import os
import re
import sys

# Characters that are no part of a line of text but do something to it: control characters (C0, DEL and C1: escape
# sequences begin with one), other ends of lines, and those that turn the direction of what follows. The last are bytes
# of file names that are no UTF-8, as Python keeps them.
_DRIVING = "\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff"

_fault: OSError | None = None  # what went wrong with stdout


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    byte = 0xDC80 <= code <= 0xDCFF
    return f"\\x{code - 0xDC00:02x}" if byte else match[0].encode("unicode_escape").decode()


def visible(text: str, keep: str = "") -> str:
    r"""A text from anywhere (names of files, labels) with what would drive a terminal written as escapes: `\x1b`.

    Args:
      keep: control characters that stay as they are, such as "\n".
    """
    return re.sub(f"(?![{keep}])[{_DRIVING}]" if keep else f"[{_DRIVING}]", _escape, text)


def one_line(text: object) -> str:
    """The text of an error, say, as one line that is safe to print."""
    return visible(" ".join(str(text).split()))


def prepare() -> None:
    """Lets stdout and stderr take any text.

    stdout is UTF-8, unless it is a terminal or PYTHONIOENCODING says what it takes. What that cannot show is replaced.
    """
    global _fault
    _fault = None
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, io.TextIOWrapper):
            continue
        chosen = stream.isatty() or "PYTHONIOENCODING" in os.environ
        errors = "replace" if stream.errors in ("strict", "surrogateescape") else stream.errors
        stream.reconfigure(encoding=stream.encoding if chosen else "utf-8", errors=errors)


def on_terminal(stderr: bool = False) -> bool:
    """Whether stdout, or stderr, is a terminal."""
    stream = sys.stderr if stderr else sys.stdout
    return stream is not None and stream.isatty()


def write(text: str) -> None:
    """Writes to stdout, exactly and at once.

    Where that fails, nothing more is written, and nothing is raised: what took hours is not lost because its reader is
    gone (`| head`). `fault` tells it at the end.
    """
    global _fault
    if sys.stdout is None or _fault:
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        _fault = error
        _discard()


def _discard() -> None:
    """Lets Python flush, when it ends, what could not be written to where it can."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def fault() -> OSError | None:
    """What went wrong with stdout, once; None where all is well, or where its reader had read enough."""
    global _fault
    found, _fault = _fault, None
    return None if isinstance(found, BrokenPipeError) else found


def complain(text: str, end: str = "\n") -> None:
    """Writes a line to stderr, if that can be written to."""
    with contextlib.suppress(OSError, ValueError):
        print(text, end=end, file=sys.stderr, flush=True)
