"""Reading and writing files that people hand us: every failure is an AstraError of one line."""

import contextlib
import io
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from astra_jax.errors import AstraError
from astra_jax.files import replacing


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises AstraError where it is missing, unreadable, or not an object."""
    return _read_json(path, dict, "object")


def read_json_list(path: Path) -> list[Any]:
    """The array in a JSON file. Raises AstraError where it is missing, unreadable, or not an array."""
    return _read_json(path, list, "array")


def _read_json(path: Path, kind: type, name: str) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        raise AstraError(f"{path.parent}: has no {path.name}") from None
    except OSError as error:
        raise AstraError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise AstraError(f"{path}: is not valid JSON ({error}): is the file damaged?") from error
    if not isinstance(content, kind):
        raise AstraError(f"{path}: holds a {type(content).__name__}; it must be a JSON {name}")
    return content


def copy_files(source: Path, target: Path, names: Sequence[str]) -> None:
    """Makes those files of a folder that have these names the same as in another one, which may be the same.

    A reader sees the old content of a file or the new, never half of it.
    """
    for name in names:
        if (source / name).is_file():
            (target / name).parent.mkdir(exist_ok=True)
            with replacing(target / name) as temporary:
                shutil.copyfile(source / name, temporary)
        else:
            (target / name).unlink(missing_ok=True)


def is_plain_name(name: Any) -> bool:
    """Whether `name`, which came from a file, names something directly inside that file's folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\:") and name.isprintable()


# What file browsers, systems and NFS leave in folders, which is no part of anything.
FOREIGN = (".DS_Store", "._*", ".nfs*", ".directory", "Thumbs.db", "desktop.ini")


def is_foreign(entry: Path) -> bool:
    """Whether something in a folder was put there by a file browser or the system."""
    return any(fnmatchcase(entry.name, pattern) for pattern in FOREIGN)


def is_empty(folder: Path, *, but_for: tuple[str, ...] = ()) -> bool:
    """Whether nothing is in the way of writing a folder: it is absent, or holds only names of the patterns `but_for`,
    and what `is_foreign`.

    Raises:
      AstraError: there is something, but no folder.
    """
    if not folder.exists():
        return True
    if not folder.is_dir():
        raise AstraError(f"{folder}: is a file; the output must be a folder: choose another name")
    return all(any(fnmatchcase(entry.name, pattern) for pattern in (*but_for, *FOREIGN)) for entry in folder.iterdir())


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps Orbax and TensorStore from printing tracebacks of their threads: the error is raised to us as well."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
