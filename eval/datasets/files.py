"""Files of a data folder: which there are, whether one may be opened, and how its name is shown."""

import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path


def walk(folder: Path) -> Iterator[str]:
    """The files below a folder, relative to it, in order; not what is hidden, which systems and editors keep there."""
    for path, folders, names in os.walk(folder, followlinks=True):
        here = os.path.relpath(path, folder)
        deep = here.count(os.sep) > 2  # links may make a loop
        folders[:] = [] if deep else sorted(name for name in folders if not name.startswith((".", "__")))
        yield from (os.path.normpath(os.path.join(here, name)) for name in sorted(names) if not name.startswith("."))


def suffix_of(file: str | Path) -> str:
    """The ending of a file's name, in small letters."""
    return os.path.splitext(file)[1].lower()


def kinds(files: Sequence[str]) -> dict[str, int]:
    """How many files of every kind: what stands for them where they are left out."""
    suffixes = Counter(map(suffix_of, files))
    return {f"{suffix or 'other'} file(s)": count for suffix, count in sorted(suffixes.items())}


def shown(path: str | Path) -> str:
    """A path that can be printed, whatever bytes its name has."""
    return os.fsencode(path).decode("utf8", "backslashreplace")


def allowed(file: str, root: Path | None) -> Path | None:
    """The path of a file that data name, if it may be opened: a regular file below `root`; else None.

    Data may come from anywhere: a path of theirs may lead to secrets, to a device without end, or to a pipe that hangs.
    Links below the folder are of whoever made the folder, and may lead elsewhere.
    """
    if root is None or "\0" in file:
        return None
    top = os.path.abspath(root)
    path = os.path.normpath(os.path.join(top, file))
    return Path(path) if os.path.commonpath([top, path]) == top and is_regular(path) else None


def is_regular(path: str | Path) -> bool:
    """Whether a file has a beginning and an end."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False
