"""Pictures in folders: FOLDER/CLASS/PICTURE or FOLDER/SPLIT/CLASS/PICTURE."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from astra_jax.errors import AstraError
from astra_jax.inputs.images import SUFFIXES
from eval.datasets.files import kinds, shown, suffix_of
from eval.datasets.labels import in_order, listed
from eval.datasets.splits import chosen, split_of

Split = dict[str, list[str]]  # class -> pictures


@dataclasses.dataclass(frozen=True)
class Pictures:
    """The pictures of some splits.

    Attributes:
      files: below the folder, in the order of their classes and names.
      classes: the class of each.
      names: the classes of all splits.
      of: how many pictures the splits have that were asked for.
      left_out: files of the folder that no split has, and how many.
    """

    files: list[str]
    classes: list[int]
    names: tuple[str, ...]
    of: int
    left_out: dict[str, int]


def has_pictures_alone(files: Sequence[str]) -> bool:
    """Whether a folder with these files has nothing that says more of its pictures: tables or `metadata`."""
    described = (".parquet", ".csv", ".jsonl")
    return not any(
        suffix_of(file) == ".parquet" or os.path.basename(file).lower() in [f"metadata{s}" for s in described]
        for file in files
    )


def read_pictures(folder: Path, files: Sequence[str], spec: str) -> Pictures:
    """The pictures that a specification such as `test[:1000]` names. None is opened.

    A folder of folders of pictures is a split, which its name has to say: train, Training, seg_train. Where there is
    none, the folders of pictures are the classes of one split, `train`.

    Args:
      files: what is below the folder, from `files.walk`.

    Raises:
      AstraError: there is no such split, fewer than two classes, or folders that are no splits and no classes.
    """
    splits, left_out = _read(folder, files)
    names = in_order({name for split in splits.values() for name in split})
    if len(names) < 2:
        found = ", ".join(f"{count:,} {what}" for what, count in left_out.items())
        raise AstraError(
            f"{folder}: has pictures of {len(names)} classes{f', and {found}' if found else ''}: put those of each "
            "class into a folder (FOLDER/CLASS/PICTURE or FOLDER/SPLIT/CLASS/PICTURE with two or more classes)"
        )
    rows = {
        split: [(file, place) for place, name in enumerate(names) for file in classes.get(name, [])]
        for split, classes in splits.items()
    }
    parts = chosen(spec, {split: len(of_split) for split, of_split in rows.items()}, str(folder))
    found_rows = [row for part in parts for row in rows[part.split][part.start : part.stop]]
    of = sum(len(rows[split]) for split in {part.split for part in parts})
    return Pictures([f for f, _ in found_rows], [c for _, c in found_rows], tuple(names), of, left_out)


def _read(folder: Path, files: Sequence[str]) -> tuple[dict[str, Split], dict[str, int]]:
    """Split -> class -> pictures, and what else there is."""
    pictures = [file for file in files if suffix_of(file) in SUFFIXES]
    splits, lost = _splits(folder, pictures)
    left_out = kinds([file for file in files if suffix_of(file) not in SUFFIXES])
    return splits, left_out | ({"pictures in other places": lost} if lost else {})


def _splits(folder: Path, pictures: list[str]) -> tuple[dict[str, Split], int]:
    """Split -> class -> pictures, and how many have no place among them."""
    places: dict[int, list[list[str]]] = {0: [], 1: [], 2: []}  # folders that pictures are in
    for file in pictures:
        places.setdefault(file.count(os.sep), []).append(file.split(os.sep))
    classes, splits = places[1], [place for place in places[2] if split_of(place[0])]
    _check_places(folder, places[2], splits, classes)
    found: dict[str, Split] = {}
    for place in splits or classes:
        split, of_class = (split_of(place[0]) or "", place[1]) if splits else ("train", place[0])
        found.setdefault(split, {}).setdefault(shown(of_class), []).append(os.sep.join(place))
    return found, len(pictures) - len(splits or classes)


def _check_places(folder: Path, deep: list[list[str]], splits: list[list[str]], classes: list[list[str]]) -> None:
    """Raises AstraError where pictures are in folders of folders, or in splits, that no name or folder says more of."""
    if deep and not splits and len(deep) >= len(classes):
        raise AstraError(
            f"{folder}: its folders {_tops(deep)} have folders of pictures, so they are no classes, and no splits "
            "by their names: call them train and test, or give one of them as --data"
        )
    if classes and not splits and all(split_of(place[0]) for place in classes):
        raise AstraError(
            f"{folder}: its folders {_tops(classes)} are splits by their names, and have no folders of classes: "
            "FOLDER/SPLIT/CLASS/PICTURE is what is read"
        )


def _tops(places: list[list[str]]) -> str:
    return listed(in_order({shown(place[0]) for place in places}))
