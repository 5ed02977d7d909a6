"""The one exception that a user is meant to read, and what is said of others."""


class AstraError(Exception):
    """A problem that the user can fix.

    The message is one line: what is wrong (with the value), what is allowed, and what to do.
    The command line prints it without a traceback and exits with code 2.
    """


def first_line(error: BaseException) -> str:
    """What kind of error it is, and the beginning of what it says."""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
