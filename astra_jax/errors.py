"""The one exception that a user is meant to read."""


class AstraError(Exception):
    """A problem that the user can fix.

    The message is one line: what is wrong (with the value), what is allowed, and what to do.
    The command line prints it without a traceback and exits with code 2.
    """
