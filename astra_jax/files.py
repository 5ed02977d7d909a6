"""The one way in which files are written: as a whole or not at all, and so that what a path names stays what it is."""

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from astra_jax.errors import AstraError

STDOUT = Path("-")
# Names of what a process has open already -> its number, or its name without one.
_OPENED = re.compile(r"/(?:dev|proc/self)/fd/(\d+)|/dev/(stdout|stderr)", re.ASCII)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a name beside `path` that nobody else has. What is written there takes the place of `path` at the end,
    with the permissions that this had; if anything is raised it is removed.

    A reader sees the old content of a file or the new, never half of it, however many write it. `path` itself is
    replaced: this is for files of our own folders. For what a user named see `write_output`.
    """
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}")
    try:
        yield temporary
        with contextlib.suppress(FileNotFoundError):
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file of our own folders; see `replacing`. Text is written as UTF-8."""
    data = content.encode() if isinstance(content, str) else content
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_output(path: Path, content: str | bytes) -> None:
    """Writes what a user asked for to where the user said. Text is written as UTF-8.

    A file is written as a whole or not at all, also behind links, which stay. What is no file (a device, a pipe) is
    written into, as a shell's `>` does, and so is what is open already: `-` and /dev/stdout, /dev/fd/3.

    Raises:
      AstraError: it cannot be written, or the disk is full.
    """
    data = content.encode() if isinstance(content, str) else content
    with writing(path):
        number = _opened(path)
        if number is not None:
            sys.stdout.flush()  # what was printed before comes before
            with open(os.dup(number), "wb") as file:
                file.write(data)
        elif path == STDOUT:
            sys.stdout.flush()
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        elif path.exists() and not stat.S_ISREG(path.stat().st_mode):
            path.write_bytes(data)
        else:
            target = Path(os.path.realpath(path))
            if target.exists() and not os.access(target, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            write_atomically(target, data)


def check_output(option: str, path: Path) -> None:
    """Raises AstraError, before any work, where `write_output` could not write what `option` names."""
    number = _opened(path)
    if number is not None:
        try:
            os.fstat(number)
        except OSError:
            raise AstraError(f"{option} {path}: nothing is open there: write `{number}>FILE` behind it") from None
    elif path.is_dir():
        raise AstraError(f"{option} {path}: is a folder: give the name of a file")
    elif not (parent := (Path(os.path.realpath(path)) if path.is_symlink() else path).parent).is_dir():
        raise AstraError(f"{option} {path}: the folder {parent} does not exist: create it first")


def _opened(path: Path) -> int | None:
    """The number of what is open already under a name such as /dev/fd/3; None for other names."""
    found = _OPENED.fullmatch(str(path))
    return found and (int(found[1]) if found[1] else {"stdout": 1, "stderr": 2}[found[2]])


@contextmanager
def in_utf8(folder: Path) -> Iterator[Path]:
    """An absolute name of a folder for libraries that take no other than UTF-8 (Orbax, TensorStore): its own, or one by
    the number under which it is open here; then it is made if it is not there.

    Raises:
      AstraError: its own name is not UTF-8, and this system has no other.
    """
    path = folder.absolute()
    if _is_utf8(path):
        yield path
        return
    if not Path("/proc/self/fd").is_dir():
        raise AstraError(f"{path}: its name is not UTF-8: rename it")
    path.mkdir(parents=True, exist_ok=True)
    number = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield Path(f"/proc/self/fd/{number}")
    finally:
        os.close(number)


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind `error`, also where a library wrapped it and only the text is left."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(text in str(error) for text in ("No space left on device", "Not enough disk space")):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what can go wrong with the disk while `path` is written into an AstraError."""
    try:
        yield
    except AstraError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise AstraError(f"{path}: the disk is full: free some space and repeat the command") from error
        if isinstance(error, OSError):
            raise AstraError(f"{path}: cannot be written: {error.strerror or error}") from error
        raise
