"""Labelled pictures from the Hugging Face hub, parquet files or folders, and batches of them in order."""

import dataclasses
import glob
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from astra_jax.errors import AstraError
from astra_jax.preprocess import ImageProcessor, decode_image


@runtime_checkable
class ImageData(Protocol):
    """Labelled images with random access: `data[i]` is `{"image": Pillow image or uint8 [H,W,C], "label": int}`.

    `names[label]` is the name of a class.
    """

    names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataArgs:
    """The options of every verb that reads labelled images."""

    data: str
    """Images: a hub id, a folder of pictures in one folder per class, or parquet."""
    split: str = "train"
    """Which part of the data; a slice such as train[:1000] goes too."""
    image_column: str | None = None
    """The column with the images, where there are several."""
    label_column: str | None = None
    """The column with the labels, where there are several."""

    def open(self, labels: Sequence[str] | None = None) -> "DatasetImages":
        """The images; `labels` are the classes of a checkpoint. Raises AstraError; see `load_images`."""
        return load_images(
            self.data, self.split, image_column=self.image_column, label_column=self.label_column, labels=labels
        )


class DatasetImages:
    """One split of a `datasets.Dataset` as `ImageData`; images are decoded when they are asked for.

    Args:
      rows: a dataset whose column `column` holds undecoded images (`{"bytes", "path"}`).
      labels: one class index per row.
      names: names of the classes.
      where: what error messages call the data.
    """

    def __init__(self, rows: Any, column: str, labels: Int[np.ndarray, "rows"], names: tuple[str, ...], where: str):
        self.names = names
        self._rows, self._column, self._labels, self._where = rows.select_columns([column]), column, labels, where

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises AstraError, which names row and file, where the image cannot be decoded."""
        image = self._rows[index][self._column]
        name = f"{self._where} row {index}"
        if image is None or (image["bytes"] is None and image["path"] is None):
            raise AstraError(f"{name}: has no image: remove the row")
        if image["path"] is not None:
            name += f" ({image['path']})"
        return {
            "image": decode_image(image["path"] if image["bytes"] is None else image["bytes"], name),
            "label": int(self._labels[index]),
        }


def load_images(
    source: str,
    split: str,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    labels: Sequence[str] | None = None,
) -> DatasetImages:
    """Opens labelled images.

    Args:
      source: a hub id (`owner/name`), a parquet file, a folder with parquet files, or a folder of pictures:
        `FOLDER/CLASS/PICTURE` (all of it is the split `train`) or `FOLDER/SPLIT/CLASS/PICTURE`.
      split: `test`, `test[:1000]`, `train[10%:20%]`, `train+validation`. No split stands in for another.
      image_column, label_column: needed only where the columns' types leave a choice.
      labels: the classes of a checkpoint. Labels of the data become indices into them: by name where the names are
        the same, by number where one side only numbers its classes, or both have equally many and none has moved.

    Raises:
      AstraError: the data cannot be read, the split or column does not exist, or labels do not fit the classes.
    """
    import datasets  # takes over a second: only for those who read data

    rows = _read(source, split)
    where = f"{source}, split {split},"
    if not len(rows):
        raise AstraError(f"{where} holds no images: choose another --split")
    image_column = _column(rows.features, image_column, datasets.Image, "image", where)
    label_column = _column(rows.features, label_column, datasets.ClassLabel, "label", where)
    with _reading(f"{where} column {image_column!r}", "is it a column of images? Choose another --image-column"):
        rows = rows.cast_column(image_column, datasets.Image(decode=False))

    values, names = _labels(rows, label_column, labels, where)
    indices = _class_indices(names, labels, where)
    outside = np.flatnonzero((values < 0) | (values >= len(names)))
    if outside.size:
        row = int(outside[0])
        raise AstraError(
            f"{where} row {row}: the label {values[row]} is outside the classes 0..{len(names) - 1}: "
            "is this split unlabelled, or the data set another one?"
        )
    return DatasetImages(rows, image_column, indices[values], tuple(labels or names), where)


def batches(
    data: ImageData, processor: ImageProcessor, batch_size: int, *, limit: int | None = None
) -> Iterator[tuple[Float[np.ndarray, "B height width channels"], Int[np.ndarray, "B"]]]:
    """Float32 images and int32 labels in the order of the data; the last batch may be smaller.

    Args:
      limit: how many images at most; None for all.

    Raises:
      AstraError: `batch_size` or `limit` is below 1, or an image cannot be decoded.
    """
    for option, value in (("batch size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise AstraError(f"the {option} is {value}; it must be at least 1")
    return _batches(data, processor, batch_size, min(len(data), limit or len(data)))


def _batches(data: ImageData, processor: ImageProcessor, batch_size: int, total: int) -> Iterator[Any]:
    for start in range(0, total, batch_size):
        rows = [data[i] for i in range(start, min(start + batch_size, total))]
        yield processor([row["image"] for row in rows]), np.asarray([row["label"] for row in rows], np.int32)


# --- where the data are -------------------------------------------------------------------------------------------


def _read(source: str, split: str) -> Any:
    """The rows of a split as a `datasets.Dataset`."""
    import datasets

    parts = [re.fullmatch(r"([\w.-]+)(\[[^\[\]]*\])?", part.strip()) for part in split.split("+")]
    if None in parts:
        raise AstraError(f"--split {split}: write it like test, test[:1000] or train[10%:20%]")
    wanted = {part[1] for part in parts if part is not None}

    path = Path(source).expanduser()
    if not path.exists() and (path.suffix == ".parquet" or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source)):
        raise AstraError(f"{source}: no such file or folder: check the path, or give a hub id such as owner/name")
    advice = (
        "check the files and --split" if path.exists() else "no local folder has that name: check it, and the network"
    )
    with _reading(f"{source}, split {split}", advice):
        if path.is_file():
            files = {_split_of(path.stem): [_literal(path)]}
            _check_splits(source, wanted, list(files))
            return datasets.load_dataset(_builder_of(path), data_files=files, split=split)
        if path.is_dir() and not _is_dataset_repository(path):
            files = _picture_files(path)
            _check_splits(source, wanted, list(files))
            # All splits, not only the wanted one: together they say which classes there are.
            return datasets.load_dataset("imagefolder", data_files=files, split=split)
        name = str(path) if path.is_dir() else source
        builder = datasets.load_dataset_builder(name)
        files = {str(key): list(found) for key, found in (builder.config.data_files or {}).items()}
        _check_splits(source, wanted, [str(key) for key in files or builder.info.splits or ()])
        if builder.name != "parquet":
            return datasets.load_dataset(name, split=split)
        # load_dataset(name, split=...) would download every split; a parquet file names its classes by itself.
        files = {key: files[key] for key in sorted(wanted)}
        return datasets.load_dataset("parquet", data_files=files, features=builder.info.features, split=split)


@contextmanager
def _reading(what: str, advice: str) -> Iterator[None]:
    """Silences the progress bars of `datasets` and turns whatever it raises into one line."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    except AstraError:
        raise
    except Exception as error:  # OSError, ValueError, ArrowInvalid, httpx's and the hub's errors, RuntimeError, ...
        cause: BaseException = error
        while isinstance(cause, datasets.exceptions.DatasetGenerationError) and cause.__cause__ is not None:
            cause = cause.__cause__
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0].rstrip(".")
        raise AstraError(f"{what}: cannot be read ({reason}): {advice}") from error
    finally:
        if shown:
            datasets.enable_progress_bars()


def _check_splits(source: str, wanted: set[str], available: Sequence[str]) -> None:
    missing = sorted(wanted - set(available))
    if missing:
        raise AstraError(
            f"{source} has no split {missing[0]!r}; it has {', '.join(available) or 'none'}: choose with --split"
        )


def _builder_of(file: Path) -> str:
    if file.suffix != ".parquet":
        raise AstraError(f"{file}: not a .parquet file: give a parquet file, a folder of pictures or a hub id")
    return "parquet"


def _split_names() -> dict[str, str]:
    """Words in names of files and folders -> split, as everywhere in `datasets` (`val` -> `validation`)."""
    from datasets.data_files import SPLIT_KEYWORDS

    return {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}


def _split_of(stem: str) -> str:
    """`test-00000-of-00001` -> `test`; a file with no such word in its name is `train`, as in `datasets`."""
    names = _split_names()
    return next((names[word] for word in re.split(r"[-._ 0-9]+", stem) if word in names), "train")


def _is_dataset_repository(folder: Path) -> bool:
    """Whether `datasets` finds its way: parquet files, or a card that lists files (else it is a folder of pictures)."""
    card = folder / "README.md"
    tables = (file.name for pattern in ("*.parquet", "*/*.parquet") for file in folder.glob(pattern))
    return any(name != "metadata.parquet" for name in tables) or (
        card.is_file() and "data_files:" in card.read_text(encoding="utf8", errors="replace")
    )


def _picture_files(folder: Path) -> dict[str, list[str]]:
    """Split -> patterns of files.

    `datasets` looks for split names anywhere in a path, so that the class folders `train` (the vehicle) or `test_tube`
    would become splits and the other classes vanish. Here only a top folder that itself holds class folders (or a
    metadata file) is a split.
    """
    names = _split_names()
    splits: dict[str, list[str]] = {}
    for child in sorted(folder.iterdir()):
        inside = child.iterdir() if child.is_dir() and child.name in names else ()
        if any(inner.is_dir() or inner.stem == "metadata" for inner in inside):
            splits.setdefault(names[child.name], []).append(f"{_literal(child)}/**")
    return splits or {"train": [f"{_literal(folder)}/**"]}


def _literal(path: Path) -> str:
    """A path in which `[`, `*` and `?` are no wildcards, absolute since `datasets` would otherwise look it up twice."""
    return glob.escape(str(path.absolute()))


# --- columns and labels -------------------------------------------------------------------------------------------


def _column(features: Any, name: str | None, kind: type, what: str, where: str) -> str:
    """The named column, or the only one of its kind. Raises AstraError where there is none or a choice."""
    if name is not None:
        if name not in features:
            raise AstraError(f"--{what}-column {name}: {where} has no such column; it has {', '.join(features)}")
        return name
    found = [column for column, feature in features.items() if isinstance(feature, kind)]
    if len(found) > 1:
        raise AstraError(f"{where} has several {what} columns, {', '.join(found)}: choose with --{what}-column")
    if not found:
        hint = " (FOLDER/CLASS/PICTURE or FOLDER/SPLIT/CLASS/PICTURE with two or more classes names them)"
        raise AstraError(
            f"{where} has no {what} column among {', '.join(features)}{hint if what == 'label' else ''}: "
            f"choose with --{what}-column"
        )
    return found[0]


def _labels(
    rows: Any, column: str, classes: Sequence[str] | None, where: str
) -> tuple[Int[np.ndarray, "rows"], tuple[str, ...]]:
    """Numbers of all rows and the names of these numbers. A column of text or of plain numbers works when named."""
    import datasets

    feature, values = rows.features[column], rows.data.column(column)
    if values.null_count:
        row = values.is_null().index(True).as_py()
        raise AstraError(f"{where} row {row}: has no label in the column {column!r}: remove the row")
    numbers = values.to_numpy()
    if isinstance(feature, datasets.ClassLabel):
        return numbers, tuple(feature.names)
    if numbers.dtype.kind in "iu":
        # Without names a label is the checkpoint's own number.
        return numbers, tuple(classes or map(str, range(int(numbers.max()) + 1)))
    if getattr(feature, "dtype", None) in ("string", "large_string"):
        names, numbers = np.unique(numbers.astype(str), return_inverse=True)
        return numbers, tuple(map(str, names))
    raise AstraError(f"--label-column {column}: {where} has {feature} there; labels are whole numbers or text")


def _class_indices(names: Sequence[str], classes: Sequence[str] | None, where: str) -> Int[np.ndarray, "names"]:
    """Index into the checkpoint's classes of every class of the data, int32."""
    own = np.arange(len(names), dtype=np.int32)
    if classes is None or tuple(names) == tuple(classes):
        return own
    if len(names) > len(classes):
        raise AstraError(
            f"{where} has {len(names)} classes and the model {len(classes)}: "
            "evaluate a checkpoint that was trained on these classes"
        )
    shared = set(names) & set(classes)
    if len(shared) == len(names) == len(set(names)) and all(classes.count(name) == 1 for name in names):
        return np.asarray([classes.index(name) for name in names], np.int32)
    in_place = all(name == other for name, other in zip(names, classes, strict=False) if {name, other} & shared)
    number = re.compile(r"((label|class)_)?\d+", re.IGNORECASE)
    numbered = any(all(number.fullmatch(name) for name in side) for side in (names, classes))
    if in_place and (numbered or len(names) == len(classes)):
        return own
    unknown = next((name for name in names if name not in shared), names[0])
    raise AstraError(
        f"{where} has classes that do not match the model's: {unknown!r} is not (or not once) among its "
        f"{len(classes)} classes, such as {classes[0]!r}: rename the classes, or choose another --label-column"
    )
