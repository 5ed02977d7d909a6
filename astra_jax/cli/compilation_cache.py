"""Compiled programs are kept in a folder of the user's, so that a second start compiles nothing.

JAX's persistent cache finds out which program is the same, and what a file holds. Its key has the program, the versions
of JAX and XLA, XLA's flags, the devices with what their CPUs can do, and which host this is, but no address: hosts and
machines of different kinds may share a home. Ours are the folder, and how files are written and removed in it.
"""

import contextlib
import hashlib
import os
import stat
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import platformdirs
from jax._src import compilation_cache, compiler, config  # JAX has no public way to say who writes programs, and how
from jax._src.compilation_cache_interface import CacheInterface

from astra_jax.errors import AstraError
from astra_jax.files import write_atomically
from astra_jax.terminal import complain, one_line

_DIGEST = hashlib.sha256().digest_size
MOST_BYTES = 1 << 28  # our choice: a program takes 2 to 70 KiB on a CPU


class Programs(CacheInterface):
    """Compiled programs in a folder, a file each: what JAX keeps them in, in place of its own `LRUCache`.

    A file is there as a whole or not at all, whoever writes it at the same time or is killed while doing so: JAX writes
    in place, and what was cut short stays as it is. There is no lock that a stopped process would hold. Nothing fails:
    what cannot be read is compiled, and what cannot be written (a full disk) is not kept.

    Args:
      path: the folder.
      most: bytes that the files may take. Those that were not used for longest are removed when a process writes its
        first: JAX looks for them at every program, which takes 0.1 s where there are 2,000.
    """

    def __init__(self, path: Path, most: int = MOST_BYTES):
        self._path, self._most, self._tidy = path, most, False

    def get(self, key: str) -> bytes | None:
        """What was put there; None for nothing, and for what is not as it was written: it would be run."""
        with contextlib.suppress(OSError):
            content = self._file(key).read_bytes()
            digest, value = content[:_DIGEST], content[_DIGEST:]
            if digest != hashlib.sha256(value).digest():
                return None
            with contextlib.suppress(OSError):
                os.utime(self._file(key))  # when it was last used
            return value
        return None

    def put(self, key: str, value: bytes) -> None:
        """Keeps a program, also over one that could not be read."""
        with contextlib.suppress(OSError):
            if not self._tidy:
                self._tidy = True
                self._remove_oldest()
            write_atomically(self._file(key), hashlib.sha256(value).digest() + value)

    def _file(self, key: str) -> Path:
        return self._path / f"{key}-cache"

    def _remove_oldest(self) -> None:
        """Also what killed processes left of files that they wrote."""
        with os.scandir(self._path) as entries:
            found = [(entry.stat(), entry.path) for entry in entries if entry.is_file(follow_symlinks=False)]
        total = 0
        for about, path in sorted(found, key=lambda entry: entry[0].st_mtime, reverse=True):
            total += about.st_size
            if total > self._most:
                os.unlink(path)


def folder() -> Path | None:
    """Where programs are kept: `$XDG_CACHE_HOME/astra-jax` or `~/.cache/astra-jax` on Linux, elsewhere where such
    files belong; None where the user has no home."""
    with contextlib.suppress(RuntimeError):
        return platformdirs.user_cache_path("astra-jax")
    return None


def make(path: Path) -> bool:
    """Makes the folder, which is the user's alone: what is in it will be run.

    Returns:
      Whether it is there and can be written to. It is not made in what belongs to somebody else but root: so root does
      not leave a folder in a user's home, which the user then could not use.

    Raises:
      AstraError: it is there, and somebody else could have put programs into it.
    """
    user = os.getuid()
    try:
        if not path.is_symlink() and not path.exists():
            if next(parent for parent in path.parents if parent.exists()).stat().st_uid not in (user, 0):
                return False
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        owners, mode = {path.lstat().st_uid, path.stat().st_uid}, path.stat().st_mode
    except OSError:  # a read-only or full disk, a file in its place
        return False
    if not stat.S_ISDIR(mode):
        return False
    if owners != {user} or mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise AstraError(
            f"{path} belongs to or can be written by somebody else, who could put programs into it: remove it"
        )
    return os.access(path, os.R_OK | os.W_OK | os.X_OK)


def keep() -> None:
    """Lets JAX keep what it compiles from now on, and find what it kept. Each of several hosts does so for itself.

    Where the user has chosen a cache for JAX, or none, nothing is changed. Where the folder cannot be used, everything
    is compiled as ever, and only if it may be somebody else's a line on stderr says so.
    """
    if not config.enable_compilation_cache.value or config.compilation_cache_dir.value is not None:
        return
    path = folder()
    try:
        if path is None or not make(path):
            return
    except AstraError as error:
        complain(f"astra: compiled programs are not kept: {one_line(error)}")
        return
    most = config.compilation_cache_max_size.value
    compilation_cache._cache = Programs(path, MOST_BYTES if most < 0 else most)
    compiler._cache_write = _write
    jax.config.update("jax_compilation_cache_dir", str(path))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:  # small programs are many
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # It is compiled again and written anew. One warning for each program would tell nobody anything.
    warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")


def _write(
    cache_key: str,
    compile_time_secs: float,
    module_name: str,
    backend: Any,
    executable: Any,
    host_callbacks: Sequence[Any] = (),
) -> None:
    """Keeps a program, if it took long enough to compile, as JAX does, but on every host. JAX writes on host 0 alone,
    for the sake of file systems that all share: the others would compile at every start. JAX 0.11 tells no callbacks:
    it keeps programs with these, too."""
    if host_callbacks or compile_time_secs < config.persistent_cache_min_compile_time_secs.value:
        return
    with contextlib.suppress(Exception):  # of XLA, where a program cannot be a file
        compilation_cache.put_executable_and_time(cache_key, module_name, executable, backend, int(compile_time_secs))
