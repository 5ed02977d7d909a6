"""The one exception that a user is meant to read, and what is said of others."""

LONGEST = 1000  # characters of a message; the values in some come from files, and may be of any length


class AstraError(Exception):
    """A problem that the user can fix.

    The message is one line: what is wrong (with the value), what is allowed, and what to do. Of one that is too long,
    the middle is left out.
    The command line prints it without a traceback and exits with code 2.
    """

    def __init__(self, message: str):
        half = LONGEST // 2
        super().__init__(message if len(message) <= LONGEST else f"{message[:half]} … {message[-half:]}")


def first_line(error: BaseException) -> str:
    """What kind of error it is, and the beginning of what it says."""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
