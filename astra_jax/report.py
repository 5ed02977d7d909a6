"""What a verb prints: tables, notes and progress for people, the same as JSON for machines."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import rich.box
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from astra_jax import terminal
from astra_jax.files import STDOUT, check_output, write_output
from astra_jax.terminal import visible

WIDEST = 1 << 20  # characters of a line where there is no terminal, which has a width: nothing is wrapped


def _console(stderr: bool) -> Console:
    found = Console(highlight=False, stderr=stderr)
    return found if found.is_terminal else Console(highlight=False, stderr=stderr, width=WIDEST)


_answer = _console(stderr=False)
_aside = _console(stderr=True)  # what goes on beside the answer


_quiet = False
_beside = False  # whether all goes to stderr, because stdout has something else to carry
_status = ""  # what is printed at the end where all else is not


def be_quiet(status: str) -> None:
    """Prints and writes nothing from now on but errors and, at the end, this line: another host has the answer."""
    global _quiet, _status
    _quiet, _status = True, status
    _aside.quiet = True


def say_status() -> None:
    """Prints the line of `be_quiet`, if there is one."""
    if _status:
        terminal.write(f"{_status}\n")


def _put(text: str) -> None:
    if not _quiet:
        (partial(terminal.complain, end="") if _beside else terminal.write)(text)


def say(text: str) -> None:
    """Prints a line, or several. What a name in it would do to a terminal is written out (`astra_jax.terminal`)."""
    _put(visible(text, keep="\n") + "\n")


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
        global _beside
        _beside = path == STDOUT  # which then is the JSON's alone
        if path is not None:
            check_output("--json", path)

    def say(self, text: str, **values: Any) -> None:
        """Prints a line; `values` are what it says, for machines."""
        say(text)
        self.data.update(values)

    def show(self, text: str) -> None:
        """Prints a piece of text as it comes, exactly, but for what would drive a terminal if it goes to one. It is
        part of nothing else."""
        _put(visible(text, keep="\n\t") if terminal.on_terminal(stderr=_beside) else text)

    def table(self, name: str, title: str, rows: Sequence[dict[str, Any]]) -> None:
        """Prints rows (dicts with the same keys) as a table and records them under `name`."""
        say(title)
        _put(_rendered(_table(rows), _aside if _beside else _answer))
        self.data[name] = list(rows)

    def close(self) -> None:
        """Writes the JSON file, whole or not at all."""
        if self.path is not None and not _quiet:
            write_output(self.path, json.dumps(self.data, indent=2) + "\n")


def _rendered(table: RenderableType, console: Console) -> str:
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    # As `Text`: what looks like markup or an emoji's name, such as test[:100], is none.
    table = Table(box=rich.box.SIMPLE_HEAD)
    for column in rows[0] if rows else []:
        table.add_column(
            Text(visible(column)), justify="left" if isinstance(rows[0][column], str) else "right", overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text(visible(_cell(value))) for value in row.values()))
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
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=_aside, disable=not _aside.is_terminal, redirect_stdout=False) as bar:
        task = bar.add_task(visible(label), total=total, completed=done, note="")

        def advance(n: int = 1, **fields: Any) -> None:
            note = "  ".join(f"{key} {_cell(value)}" for key, value in fields.items())
            bar.update(task, advance=n, note=visible(note))

        yield advance
