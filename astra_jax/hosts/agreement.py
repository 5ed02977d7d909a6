"""What has to be the same on all hosts that compute together: code, versions, settings, options and inputs.

Each is a name and a value, as text for people, which is another text where the value is another one. A host whose
digits, weights or pictures are others would not fail: the hosts would answer together, and wrongly.
"""

import dataclasses
import errno
import functools
import hashlib
import importlib.metadata
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from astra_jax import __version__
from astra_jax.terminal import visible

Same = Callable[[], Mapping[str, str]]  # what a host has, found out when it meets the others; may raise AstraError

NOT_GIVEN = "not given"
SOURCE = "astra's source code"
MOST_INPUTS = 100  # that are compared one by one
_MOST_DIFFERENCES = 3  # that are said

_ROOMS = ("astra_jax", "checkpoints", "eval", "train")
# What computes, and what makes numbers of texts, pictures and files.
_PACKAGES = (
    "jax", "jaxlib", "flax", "qwix", "ml_dtypes", "numpy", "safetensors", "tokenizers", "transformers", "Pillow",
)  # fmt: skip

# Settings of JAX that change no result: what is kept, said and written, and what is set for each host.
_OTHER_SETTINGS = re.compile(
    r"jax_(compilation_cache_|persistent_cache_|enable_compilation_cache|raise_persistent_cache_errors"
    r"|explain_|log_|logging_|debug_log_|distributed_debug|compiler_detailed_logging_|captured_constants_"
    r"|dump_|include_(debug_info|full_tracebacks)_|traceback_|tracer_error_|pprint_|source_url_|hlo_source_file_"
    r"|check_proxy_envs|num_cpu_devices|\w+_visible_devices)\w*"
)
_OTHER_XLA_FLAGS = re.compile(r"--xla_(dump_|force_host_platform_device_count|cpu_collective_)\S*")

# Options that may be others on every host: of the host itself, or of files that host 0 alone writes.
_OF_A_HOST = {"coordinator", "hosts", "host"}
_WRITTEN = {"json", "plot", "csv", "save_profile"}
# Paths and names of what is read: its contents are compared, wherever it lies.
_READ = {"checkpoint", "checkpoints", "model", "image", "prompt", "data", "device_profile", "trace"}


@functools.cache
def versions() -> dict[str, str]:
    """What is installed: of Python, releases with the same first two numbers are the same."""
    found = {name: _version(name) for name in _PACKAGES}
    python = ".".join(platform.python_version_tuple()[:2])
    return {"astra_jax": __version__, SOURCE: source(), **found, "Python": python}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


@functools.cache
def source() -> str:
    """A short hash of all Python files of this program, as they are where it runs."""
    root, found = Path(__file__).parents[2], hashlib.sha256()
    for path in sorted((p for room in _ROOMS for p in (root / room).rglob("*.py")), key=lambda p: p.as_posix()):
        content = path.read_bytes()
        found.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return found.hexdigest()[:12]


def settings() -> dict[str, str]:
    """What is set of JAX and XLA that may change results, or whether hosts come to them at all."""
    found = {
        name.upper(): shown(value) for name, value in jax.config.values.items() if not _OTHER_SETTINGS.fullmatch(name)
    }
    flags = (flag for flag in os.environ.get("XLA_FLAGS", "").split() if not _OTHER_XLA_FLAGS.fullmatch(flag))
    return found | {"XLA_FLAGS": shown(" ".join(sorted(flags)))}


def options(args: Any) -> dict[str, str]:
    """The options of a verb that have to be the same on all hosts, as they are written; `args` is a dataclass, or holds
    others."""
    found = dict[str, str]()
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if dataclasses.is_dataclass(value):
            found |= options(value)
        elif field.name not in _OF_A_HOST | _WRITTEN | _READ:
            found[f"--{field.name.replace('_', '-')}"] = shown(value)
    return found


def inputs(name: str, values: Sequence[str | bytes]) -> dict[str, str]:
    """Texts, or the contents of files, one by one under their numbers from 1 on; what is more than `MOST_INPUTS` as
    one."""
    told = [shown(value if isinstance(value, bytes) else repr(value)) for value in values]
    found = {f"{name} {n}": value for n, value in enumerate(told[:MOST_INPUTS], 1)}
    if rest := told[MOST_INPUTS:]:
        found[f"{name} {MOST_INPUTS + 1} and all after it"] = shown(repr(rest).encode())
    return found


def shown(value: Any) -> str:
    """A value as it is said to people: a short one as it is, a long or odd one with its hash, bytes as their hash."""
    if isinstance(value, bytes):
        return f"{len(value):,} bytes with the hash {_hash(value)}"
    text = value if isinstance(value, str) else repr(value)
    if value is None or text in ("", "()"):
        return NOT_GIVEN
    if len(text) <= 60 and text.isprintable() and "[" not in text:
        return text
    beginning = "".join(c if c.isprintable() and c != "[" else " " for c in text[:40])
    return f"{beginning}... ({len(text):,} characters, hash {_hash(text.encode(errors='surrogatepass'))})"


def differences(mine: Mapping[str, str], theirs: Any) -> str:
    """What another host has that is not as here, in a sentence; empty where there is nothing."""
    if not isinstance(theirs, Mapping):
        return "it does not say what it has"
    names = [name for name in {**mine, **theirs} if theirs.get(name) != mine.get(name)]
    found = [
        f"{visible(str(name)[:200])} is {visible(str(theirs.get(name, NOT_GIVEN))[:200])} there and "
        f"{mine.get(name, NOT_GIVEN)} here"
        for name in names
    ]
    more = len(found) - _MOST_DIFFERENCES
    return "; ".join(found[:_MOST_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")


def fingerprint(arrays: Any) -> str:
    """A short hash of a tree of arrays: of types, shapes and contents."""
    parts = [
        (a.dtype.str, a.shape, hashlib.sha256(a.tobytes()).digest()) for a in map(np.asarray, jax.tree.leaves(arrays))
    ]
    return _hash(repr(parts).encode())


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def contents(folders: Sequence[Path]) -> dict[str, str]:
    """What is in these folders, as a hash of all files: of their names, relative to it and sorted, lengths and
    contents. Hidden files, as some systems leave behind, are no part of it.

    Raises:
      OSError: one cannot be read, or is no folder.
    """
    found = hashlib.sha256()
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(errno.ENOENT, f"there is no folder {folder}")
        files = {os.fsencode(path.relative_to(folder)): path for path in folder.rglob("[!.]*") if path.is_file()}
        for name, path in sorted(files.items()):
            found.update(name + f"\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    found.update(block)
    return {"the checkpoint's hash": found.hexdigest()[:12]}
