"""Classes of data and classes of a model: which are the same, by their names and the numbers in these."""

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Int

from astra_jax.errors import AstraError
from checkpoints import Checkpoint

SHOWN = 12  # names of a list that a message shows


def match(
    names: Sequence[str], classes: Sequence[str], where: str, *, numbered: bool = False, said: Sequence[str] = ()
) -> tuple[Int[np.ndarray, "names"], str]:
    """Index into a model's classes of every class of the data, int32, and in words how they were found.

    By name, if need be whatever its case and punctuation; else by the number that a name ends in. Never by the place in
    a list: an alphabet or a class that is missing would move it.

    Args:
      names: of the data's classes, all of them.
      numbered: whether the data store numbers of classes, so that a class has one whatever its name.
      said: the model's names of the data's classes, in their order; or what the data call all of the model's.
      where: what error messages call the data.

    Raises:
      AstraError: neither names nor numbers say which classes are the same, or `said` does not fit.
    """
    if said:
        found = _as_said(names, classes, where, said)
        return found, f"as --labels says: {_pairs(names, [classes[i] for i in found])}"
    for key, how in _KEYS:
        if (indices := _by_name(names, classes, key)) is not None:
            return indices, how
    if (indices := _by_number(names, classes, numbered)) is not None:
        return indices, f"by number: {_pairs(names, [classes[i] for i in indices])}"
    raise AstraError(
        f"{where} has {len(names):,} classes and the model {len(classes):,}, which do not match by name or by number: "
        f"the data's are {listed(names)}; the model's are {listed(classes)}: say with --labels what the model calls "
        "the data's, in their order, or choose another --label-column"
    )


def model_classes(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The names of a model's classes; without names they only have numbers."""
    return checkpoint.labels or tuple(f"LABEL_{c}" for c in range(checkpoint.config.num_labels))


def listed(names: Sequence[str]) -> str:
    """Names for a message, the first of many."""
    shown = [name if len(name) <= 30 else f"{name[:27]}..." for name in names[:SHOWN]]
    return ", ".join(shown) + (f", ... ({len(names):,} in all)" if len(names) > SHOWN else "")


def _pairs(names: Sequence[str], others: Sequence[str]) -> str:
    """What is matched with what, for a message."""
    return listed([f"{name} = {other}" for name, other in zip(names, others, strict=True)])


def in_order(names: Iterable[str]) -> list[str]:
    """Names as people sort them: 10 comes after 9."""

    def key(name: str) -> tuple[list[tuple[bool, int, str]], str]:
        parts = re.findall(r"[0-9]+|[^0-9]+", name)
        return [(not p[0].isdecimal(), int(p) if re.fullmatch("[0-9]+", p) else 0, p.casefold()) for p in parts], name

    return sorted(names, key=key)


def _plain(name: str) -> str:
    """A name without case, punctuation, and the choices that Unicode leaves: an accent is one sign or two."""
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", name).casefold()).strip()


_KEYS: tuple[tuple[Callable[[str], str], str], ...] = (
    (str, "by name"),
    (str.casefold, "by name, whatever the case"),
    (_plain, "by name, whatever case and punctuation"),
)


def _by_name(
    names: Sequence[str], classes: Sequence[str], key: Callable[[str], str], once: bool = True
) -> Int[np.ndarray, "names"] | None:
    """Where each name is among the classes; None where one is not there, or is not the only one that is so called."""
    places: dict[str, list[int]] = {}
    for place, name in enumerate(classes):
        places.setdefault(key(name), []).append(place)
    found = [places.get(key(name), []) for name in names]
    if any(len(places) != 1 for places in found) or (once and len({key(name) for name in names}) < len(names)):
        return None
    return np.asarray([place for (place,) in found], np.int32)


def _by_number(names: Sequence[str], classes: Sequence[str], numbered: bool) -> Int[np.ndarray, "names"] | None:
    """By the numbers in names. Of one side those of the classes themselves will do, but no places in an alphabet."""
    ours, theirs = _numbers(names), _numbers(classes)
    if ours is None and theirs is None:
        return None
    if ours is None and numbered:
        ours = list(range(len(names)))
    theirs = theirs or list(range(len(classes)))
    if ours is None or not set(ours) <= set(theirs):
        return None
    place = {number: place for place, number in enumerate(theirs)}
    return np.asarray([place[number] for number in ours], np.int32)


def _numbers(names: Sequence[str]) -> list[int] | None:
    """The numbers that names end in or, as of `4 stars`, begin with; None if one has none or two have the same."""
    found = [re.search(r"([0-9]{1,9})(?:\.0*)?$", name) or re.match(r"([0-9]{1,9})\b", name) for name in names]
    numbers = [int(number[1]) for number in found if number]
    whole = len(numbers) == len(names) and not any(re.fullmatch(r"[-+]\d.*|\d+\.\d*[1-9]\d*", name) for name in names)
    return numbers if whole and len(set(numbers)) == len(numbers) else None


def _as_said(names: Sequence[str], classes: Sequence[str], where: str, said: Sequence[str]) -> Int[np.ndarray, "names"]:
    for key, _ in _KEYS:
        if len(said) == len(names):
            indices = _by_name(said, classes, key, once=False)  # two classes of the data may be one of the model
            if indices is not None:
                return indices
        if len(said) == len(classes):
            indices = _by_name(names, said, key)
            if indices is not None:
                return indices
    numbered = _by_number(said, classes, False) if len(said) == len(names) else None
    if numbered is not None:
        return numbered
    raise AstraError(
        f"--labels {listed(said)}: give one of the model's classes, {listed(classes)}, or its number for each of the "
        f"{len(names):,} classes of {where} in this order: {listed(names)}"
    )
