"""Columns of rows: which holds text, pictures or labels, and the classes that the labels are."""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from astra_jax.errors import AstraError
from eval.datasets.labels import in_order, match
from eval.datasets.sources import Rows


def is_text(feature: Any) -> bool:
    """Whether a column of `datasets` holds text."""
    return getattr(feature, "dtype", None) in ("string", "large_string")


def need_column(rows: Rows, name: str, option: str) -> str:
    """The column of that name. Raises AstraError where there is none."""
    if name not in rows.features:
        raise AstraError(f"{option} {name}: {rows.where} has no such column; it has {', '.join(rows.features)}")
    return name


def choose_column(rows: Rows, name: str | None, fits: Callable[[Any], bool], what: str) -> str:
    """The named column, or the only one that fits, or the one of those that is called `what`.

    Raises AstraError where there is none or a choice.
    """
    if name is not None:
        return need_column(rows, name, f"--{what}-column")
    found = [column for column, feature in rows.features.items() if fits(feature)]
    if len(found) != 1 and (called := _called(rows, what)):
        return called
    return _only(rows, found, what)


def _only(rows: Rows, found: Sequence[str], what: str) -> str:
    if len(found) > 1:
        raise AstraError(f"{rows.where} has several {what} columns, {', '.join(found)}: choose with --{what}-column")
    if not found:
        hint = " (FOLDER/CLASS/PICTURE or FOLDER/SPLIT/CLASS/PICTURE with two or more classes names them)"
        raise AstraError(
            f"{rows.where} has no {what} column among {', '.join(rows.features)}{hint if what == 'label' else ''}: "
            f"choose with --{what}-column"
        )
    return found[0]


def choose_text(rows: Rows, name: str | None, label_column: str | None) -> str:
    """The named column, or the one called text, or the only one with text that is neither labels nor all numbers.

    Raises AstraError where there is none or a choice, or where it holds no text.
    """
    column = name or _called(rows, "text")
    if column is not None:
        return check_text(rows, column)
    labels = label_column or _called(rows, "label")
    texts = [column for column, feature in rows.features.items() if is_text(feature) and column != labels]
    words = [column for column in texts if column not in rows.numeric]
    words = words or (texts if labels else [])  # numbers are text where nothing else is left beside the labels
    return _only(rows, words, "text")


# The columns of usual tables of pairs: of GLUE and others.
PAIRS = (
    *(("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence")),
    *(("text_a", "text_b"), ("text1", "text2")),
)


def choose_texts(rows: Rows, names: Sequence[str], label_column: str | None) -> tuple[str, ...]:
    """The columns of what a classifier reads: those that are named, or a usual pair, or one as `choose_text` finds it.

    Raises AstraError where more than two are named, or there is none or a choice, or where one holds no text.
    """
    if len(names) > 2:
        raise AstraError(f"--text-column {' '.join(names)}: a classifier reads a text or a pair: give one or two")
    found = [pair for pair in PAIRS if all(map(partial(_called, rows), pair))]
    if not names and len(found) == 1 and _called(rows, "text") is None:
        names = [str(_called(rows, name)) for name in found[0]]
    if len(names) == 2:
        return tuple(check_text(rows, name) for name in names)
    return (choose_text(rows, names[0] if names else None, label_column),)


def check_text(rows: Rows, name: str) -> str:
    """The column of that name. Raises AstraError where there is none, or no text in it."""
    feature = rows.features[need_column(rows, name, "--text-column")]
    if not is_text(feature):
        raise AstraError(
            f"--text-column {name}: {rows.where} has {feature} there, no text: "
            f"choose another of {', '.join(rows.features)}"
        )
    return name


def _called(rows: Rows, name: str) -> str | None:
    """The column with this name, whatever its case; None where there is none, or several."""
    found = [column for column in rows.features if column.casefold() == name]
    return name if name in found else found[0] if len(found) == 1 else None


class Labels(NamedTuple):
    """The class of every row, the names of all classes, and how they were matched with those of a model."""

    indices: Int[np.ndarray, "rows"]
    names: tuple[str, ...]
    of_data: int
    how: str | None


def read_labels(
    rows: Rows, label_column: str | None, classes: Sequence[str] | None, said: Sequence[str] = ()
) -> Labels:
    """The class of every row, as an index into the classes of a model, if there are any; else into the data's own.

    Args:
      label_column: needed only where the columns' types leave a choice.
      classes, said: see `labels.match`.

    Raises:
      AstraError: the column does not exist or holds no labels, or they do not fit the classes.
    """
    import datasets

    column = choose_column(rows, label_column, lambda feature: isinstance(feature, datasets.ClassLabel), "label")
    feature, values = rows.features[column], rows.table.data.column(column)
    declared = isinstance(feature, datasets.ClassLabel)
    if not (declared or is_text(feature) or re.fullmatch("u?int[0-9]+|bool", str(getattr(feature, "dtype", "")))):
        raise AstraError(f"--label-column {column}: {rows.where} has {feature} there; labels are whole numbers or text")
    if values.null_count:
        _no_label(rows, values.is_null().index(True).as_py(), column)
    if declared:
        names, numbers = list(feature.names), values.to_numpy()
    else:
        names, numbers = _named(rows, column)
    outside = np.flatnonzero((numbers < 0) | (numbers >= len(names)))
    if outside.size:
        row = int(outside[0])
        known = f"the classes 0..{len(names) - 1}" if names else "all classes"
        raise AstraError(
            f"{rows.where} row {row}: the label {values[row]} is outside {known}: "
            "is this split unlabelled, or the data set another one?"
        )
    if classes is None:
        return Labels(numbers.astype(np.int32), tuple(names), len(names), None)
    indices, how = match(names, classes, rows.where, numbered=declared, said=said)
    return Labels(indices[numbers], tuple(classes), len(names), how)


def _named(rows: Rows, column: str) -> tuple[list[str], Int[np.ndarray, "rows"]]:
    """The classes of a column of text or plain numbers, in all splits, and the number of every row's; -1 for numbers
    below zero, which are no classes."""
    own = [str(value).strip() for value in rows.table.data.column(column).to_pylist()]
    if "" in own:
        _no_label(rows, own.index(""), column)
    there = set(own).union(*(_values(table, column) for table in rows.every() if column in table.features))
    names_of = _as_numbers(there) or {value: value for value in there}
    names = in_order({name for name in names_of.values() if not re.fullmatch("-[0-9]+", name)})
    place = {name: place for place, name in enumerate(names)}
    return names, np.asarray([place.get(names_of[value], -1) for value in own], np.int64)


def _values(table: Any, column: str) -> set[str]:
    found = table.data.column(column).unique().to_pylist()
    return {str(value).strip() for value in found if value is not None} - {""}


def _as_numbers(values: Iterable[str]) -> dict[str, str] | None:
    """Whole numbers as they are written at their shortest: 1.0 is the class 1, and 01, too; None if one is none."""
    found = {value: re.fullmatch(r"(-?[0-9]{1,18})(\.0+)?", value) for value in values}
    numbers = {value: str(int(number[1])) for value, number in found.items() if number}
    return numbers if len(numbers) == len(found) else None


def _no_label(rows: Rows, row: int, column: str) -> None:
    raise AstraError(f"{rows.where} row {row}: has no label in the column {column!r}: remove the row")
