"""What a verb prints: tables, notes and progress for people, the same as JSON for machines."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rich.box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from astra_jax.files import STDOUT, check_output, write_output


def _console(stderr: bool) -> Console:
    found = Console(highlight=False, stderr=stderr)
    # A file or a pipe has no width of its own.
    return found if found.is_terminal else Console(highlight=False, stderr=stderr, width=180)


console = _console(stderr=False)  # the answer
_aside = _console(stderr=True)  # what goes on beside it


_status = ""  # what is printed at the end where all else is not


def be_quiet(status: str) -> None:
    """Prints and writes nothing from now on but errors and, at the end, this line: another host has the answer."""
    global _status
    console.quiet = _aside.quiet = True
    _status = status


def say_status() -> None:
    """Prints the line of `be_quiet`, if there is one."""
    if _status:
        print(_status)


class Report:
    """Collects everything that a verb prints and writes it to `--json FILE` at the end.

    Args:
      verb: name of the verb, the first field of the JSON.
      path: where the JSON goes; None for nowhere. With `-`, stdout, all else goes to stderr.

    Raises:
      AstraError: the JSON could not be written there.
    """

    def __init__(self, verb: str, path: Path | None = None):
        self.path = path
        self.data: dict[str, Any] = {"verb": verb}
        console.stderr = path == STDOUT  # which then is the JSON's alone
        if path is not None:
            check_output("--json", path)

    def say(self, text: str, **values: Any) -> None:
        """Prints a line; `values` are what it says, for machines."""
        console.print(text, soft_wrap=True, markup=False)
        self.data.update(values)

    def show(self, text: str) -> None:
        """Prints a piece of text as it comes; it is part of nothing else."""
        console.print(text, end="", markup=False, soft_wrap=True)

    def table(self, name: str, title: str, rows: Sequence[dict[str, Any]]) -> None:
        """Prints rows (dicts with the same keys) as a table and records them under `name`."""
        console.print(_table(title, rows))
        self.data[name] = list(rows)

    def close(self) -> None:
        """Writes the JSON file, whole or not at all."""
        if self.path is not None and not console.quiet:
            write_output(self.path, json.dumps(self.data, indent=2) + "\n")


def print_table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Prints rows as a table beside the answer: on stderr."""
    _aside.print(_table(title, rows))


def _table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    # As `Text`: brackets in names, such as test[:100], are no markup.
    table = Table(title=Text(title), title_justify="left", box=rich.box.SIMPLE_HEAD)
    for column in rows[0] if rows else []:
        table.add_column(Text(column), justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row.values()))
    return table


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


@contextmanager
def progress(label: str, total: int, done: int = 0) -> Iterator[Any]:
    """A progress bar, on stderr if that is a terminal. Yields `advance(n=1, **fields)`; `fields`, such as loss=0.3, are
    shown behind it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=_aside, disable=not _aside.is_terminal) as bar:
        task = bar.add_task(label, total=total, completed=done, note="")

        def advance(n: int = 1, **fields: Any) -> None:
            note = "  ".join(f"{key} {_cell(value)}" for key, value in fields.items())
            bar.update(task, advance=n, note=note)

        yield advance
