"""Parts of a data set: how they are asked for (`test[:1000]`), and which one a file or folder is, by its name."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from astra_jax.errors import AstraError


class Part(NamedTuple):
    """The rows from `start` to `stop` of a split."""

    split: str
    start: int
    stop: int


def names_of(spec: str) -> list[str]:
    """The splits that a specification such as `train[:10%]+test` names. Raises AstraError for another form."""
    return [name for name, _ in _parsed(spec)]


def _parsed(spec: str) -> list[tuple[str, str]]:
    # `datasets` itself takes digits of all scripts, and 1_0.
    parts = [re.fullmatch(r"([\w.-]+)(\[[0-9%:-]{0,40}\])?", part.strip()) for part in spec.split("+")]
    if None in parts:
        raise AstraError(f"--split {spec}: write it like test, test[:1000] or train[10%:20%]")
    return [(part[1], part[2] or "") for part in parts if part]


def chosen(spec: str, counts: Mapping[str, int], source: str) -> list[Part]:
    """The rows that a specification names, of splits with so many rows.

    Raises:
      AstraError: there is no such split.
      ValueError: a slice is none.
    """
    import datasets

    resolved = "+".join(resolve(name, source, list(counts)) + cut for name, cut in _parsed(spec))
    found = datasets.ReadInstruction.from_spec(resolved).to_absolute(dict(counts))
    return [Part(part.splitname, part.from_, part.to) for part in found]


def resolve(name: str, source: str, available: Sequence[str]) -> str:
    """The split as the data call it. Raises AstraError if they have none of that name or meaning."""
    words = _words()
    same = [split for split in available if words.get(split, split) == words.get(name, name)]
    if not same:
        raise AstraError(
            f"{source} has no split {name!r}; it has {', '.join(available) or 'none'}: choose with --split"
        )
    return name if name in same else same[0]


def meaning(name: str) -> str:
    """A split as everywhere in `datasets`: `val` -> `validation`."""
    return _words().get(name, name)


def split_of(name: str) -> str | None:
    """The split that the name of a file or folder says: `Test-00000-of-00001` -> `test`; None if it says none."""
    words = _words()
    return next((words[word] for word in re.split(r"[-._ 0-9]+", name.lower()) if word in words), None)


def _words() -> dict[str, str]:
    from datasets.data_files import SPLIT_KEYWORDS

    return {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}
