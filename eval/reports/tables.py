"""Tables of the pages in docs: between which marks they stand, and of which code and machine they are."""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from astra_jax import __version__
from astra_jax.errors import AstraError
from astra_jax.files import write_output

Rows = list[dict[str, Any]]
MARK = "<!-- {} of `{}` -->"
ROOT = Path(__file__).parents[2]


def markdown(rows: Rows) -> str:
    """Rows as a Markdown table."""

    def cell(value: Any) -> str:
        return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def origin() -> str:
    """The commit, the machine and the versions by which a table is made, as one line."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "numpy"))
    cpu = found[1] if found else platform.machine()
    return f"{commit()}; {cpu}, {cores} cores; Python {platform.python_version()}, {versions}"


def commit() -> str:
    """Which code runs: its commit, and whether files of it were changed since. The version where there is no git."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
        return f"commit {git('rev-parse', '--short', 'HEAD')}{' and changes' if changed else ''}"
    except (OSError, subprocess.CalledProcessError):
        return f"version {__version__}"


def insert(path: Path, name: str, text: str, command: str) -> None:
    """Puts a text between a command's two marks of that name in a file, and below it where it is from.

    Raises:
      AstraError: the marks are not there.
    """
    before, after = around_marks(path, name, command)
    write_output(path, f"{before}{text}\n\n<sub>{origin()}</sub>\n{after}")


def around_marks(path: Path, name: str, command: str) -> tuple[str, str]:
    """What a file has up to the first of a command's two marks of that name, and from the second on.

    Raises:
      AstraError: the marks are not there, or no file that can be read is.
    """
    start, end = MARK.format(name, command) + "\n", MARK.format(f"end of {name}", command)
    try:
        before, found, rest = path.read_text(encoding="utf8").partition(start)
    except (OSError, UnicodeDecodeError) as error:
        raise AstraError(f"{path}: cannot be read ({error}): give a file with marks to put a table between") from error
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise AstraError(f"{path}: has no lines {start.strip()} and {end} to put a table between: write them")
    return before + start, end + after
