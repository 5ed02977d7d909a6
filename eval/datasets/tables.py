"""Tables and texts in files that people write: .csv, .tsv and .txt, whose values are all text; how deep .jsonl is."""

import csv
import io
import re
import sys
from pathlib import Path
from typing import Literal, NamedTuple

from astra_jax.errors import AstraError
from eval.datasets.files import shown

DEEPEST = 500  # levels of a row of JSON: at 20,000 its reader takes all of the stack, and Python dies (our choice)

_STRINGS, _NO_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*+"'), re.compile(rb"[^][{}]+")


class Table(NamedTuple):
    """The columns of a file, all of the same length."""

    columns: dict[str, list[str]]
    note: str = ""


def read_text(path: Path) -> str:
    """A file's text, with line ends of one kind. Raises UnicodeDecodeError where it is not UTF-8."""
    return path.read_text(encoding="utf-8-sig")  # some editors put an invisible mark before UTF-8 text


def check_depth(path: Path) -> None:
    """Raises AstraError where a row of a .jsonl file is nested more deeply than can be read."""
    depth = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            for bracket in _NO_BRACKETS.sub(b"", _STRINGS.sub(b"", line)):
                depth += 1 if bracket in b"[{" else -1
                if depth > DEEPEST:
                    raise AstraError(
                        f"{shown(path)}: line {number} is nested more than {DEEPEST} levels deep: is the file damaged?"
                    )


def read_table(path: Path, delimiter: str) -> Table:
    """A table whose first row names the columns. `null`, `NA` and 007 stay what they are.

    Quotes hold a value together, which then may have line ends, where all quotes of the file make sense so. Else, and
    where every line by itself has as many values as the header, a line is a row, and quotes are text.

    Raises:
      AstraError: a row has another number of values than the header, or two columns have one name.
      UnicodeDecodeError: the file is not UTF-8.
    """
    text = path.read_bytes().decode("utf-8-sig")
    lines = _rows(text, delimiter, csv.QUOTE_NONE)
    if not lines:
        raise AstraError(f"{shown(path)}: is empty: give another file")
    rows = lines if '"' not in text else _quoted(text, delimiter)
    note = ""
    if rows is None or _misled(rows, lines):
        rows, note = lines, f"{shown(path)}: quotes are text there, since they do not match"
    elif len(rows) < len(lines):
        note = f"{shown(path)}: some of its {len(lines) - 1:,} lines are parts of values in quotes"
    if (bad := _uneven(rows)) is not None:
        raise AstraError(
            f"{shown(path)}: row {bad - 1} has {len(rows[bad])} values and the header {len(rows[0])}: correct the "
            "row, or the quotes before it"
        )
    header = rows[0]
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise AstraError(f"{shown(path)}: two columns are called {twice!r}: rename one")
    columns = zip(*rows[1:], strict=True) if len(rows) > 1 else ([] for _ in header)
    return Table({name: list(values) for name, values in zip(header, columns, strict=True)}, note)


def is_numeric(values: list[str]) -> bool:
    """Whether all values of a column are numbers, so that it is hardly what a model is to read."""
    try:
        for value in filter(None, values):
            float(value)
    except ValueError:
        return False
    return True


def _rows(text: str, delimiter: str, quoting: Literal[0, 3]) -> list[list[str]]:
    limit = csv.field_size_limit(sys.maxsize)  # a document may be a value
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
        return [row for row in reader if row]
    finally:
        csv.field_size_limit(limit)  # which is everybody's


def _quoted(text: str, delimiter: str) -> list[list[str]] | None:
    """The rows, where every quote makes sense: at the beginning of a value, at its end, or doubled inside."""
    try:
        return _rows(text, delimiter, csv.QUOTE_MINIMAL)
    except csv.Error:
        return None


def _misled(rows: list[list[str]], lines: list[list[str]]) -> bool:
    """Whether quotes join lines of which each is a row by itself."""
    return _uneven(lines) is None and (_uneven(rows) is not None or (len(lines[0]) > 1 and len(rows) < len(lines)))


def _uneven(rows: list[list[str]]) -> int | None:
    """The number of the first row that has another number of values than the header; None if there is none."""
    return next((number for number, row in enumerate(rows) if len(row) != len(rows[0])), None)
