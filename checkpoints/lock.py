"""One process at a time: a file that its process has locked for as long as it lives."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from astra_jax.terminal import complain, one_line

# What file systems say that know no locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def alone(path: Path, busy: Callable[[str], None]) -> Iterator[bool]:
    """Locks the file `path`, and removes it at the end. While another process has it, calls `busy` with who that is,
    and tries again.

    The lock is the kernel's, on the open file, and ends with its process, however that ends. So a file that was left
    behind locks nobody out.

    Yields:
      whether it is locked; not where the file system knows no locks.
    """
    file, locked = _open(path, busy)
    with file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on host {socket.gethostname()}")
        file.flush()
        try:
            yield locked
        finally:
            path.unlink(missing_ok=True)  # before it is closed, or it could be that of another process


def waiting(where: Path) -> Callable[[str], None]:
    """For `alone`: waits, and says so once."""
    said: list[str] = []

    def busy(who: str) -> None:
        if not said:
            complain(f"astra: {one_line(where)}: {one_line(who)} is saving there: waiting for it")
            said.append(who)
        time.sleep(0.1)

    return busy


def _open(path: Path, busy: Callable[[str], None]) -> tuple[IO[str], bool]:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf8", errors="replace")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_there(path, file):
                return file, True
        except BlockingIOError:
            who = _who(file)
            file.close()
            busy(who)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                file.close()
                raise
            return file, False
        file.close()


def _is_there(path: Path, file: IO[str]) -> bool:
    """Whether a file is still the one of that name, and was not removed by the process that had it."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _who(file: IO[str]) -> str:
    file.seek(0)
    said = file.read(200)
    return said if said.isprintable() and said else "another process"
