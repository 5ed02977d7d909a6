"""What is read: labelled pictures, labelled texts, documents, and pairs of sentences; batches of pictures in order."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from astra_jax.cli.arguments import Texts
from astra_jax.errors import AstraError
from astra_jax.inputs.images import ImageProcessor, decode_image
from eval.datasets.account import Account
from eval.datasets.columns import Labels, check_text, choose_column, choose_text, choose_texts, need_column, read_labels
from eval.datasets.files import allowed, is_regular, shown, walk
from eval.datasets.folders import has_pictures_alone, read_pictures
from eval.datasets.labels import match
from eval.datasets.sources import Rows, has_card, read, reading

PAIR = ("sentence1", "sentence2")  # the columns of a table of pairs that are compared
T = TypeVar("T")


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
    """The options of every verb that reads data."""

    data: str
    """A hub id, a folder of pictures in one folder per class, or .parquet, .csv, .tsv, .jsonl or .txt files."""
    split: str = "train"
    """Which part of the data; a slice such as train[:1000] goes too. A file whose name does not say is any part."""
    image_column: str | None = None
    """The column with the images, where there are several."""
    text_column: tuple[str, ...] = ()
    """The column with the text, where there are several; two for pairs of texts, which by default are sentence1
    sentence2, premise hypothesis, and other usual names."""
    label_column: str | None = None
    """The column with the labels, where there are several; for similarity that with the scores, score by default."""
    labels: Texts = ()
    """What the model calls the classes of the data, in their order (that of the error message: names sorted, 9 before
    10), where neither names nor the numbers in them say it. As well: what the data call the model's, in its order."""
    separator: str | None = None
    """Text files: what separates documents, such as <|endoftext|>; without it a file is one document."""

    @property
    def where(self) -> str:
        """What error messages call the data."""
        return f"{shown(self.data)}, split {self.split},"

    def source(self) -> dict[str, Any]:
        """The options that say what is read, under their names. Runs of before `labels` do not name it."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(DataArgs)}
        return {name: value for name, value in given.items() if name != "labels" or value}

    def open(self, classes: Sequence[str] | None = None) -> "FolderImages | DatasetImages":
        """The images; `classes` are those of a checkpoint. Raises AstraError; see `load_images`."""
        return load_images(
            self.data,
            self.split,
            image_column=self.image_column,
            label_column=self.label_column,
            classes=classes,
            said=self.labels,
        )

    def open_documents(self, pairs: bool = False) -> "Read[str]":
        """The documents: a row of a table, a text file, or a part of one; empty ones are left out.

        Args:
          pairs: whether the sentences of both columns of a table of pairs are documents, too.

        Raises:
          AstraError: the data cannot be read, the split or column does not exist, there is no text, or `labels` are
            given.
        """
        self._without_classes()
        rows = self._rows()
        columns = self._sentences(rows) if pairs else ()
        columns = columns or (choose_text(rows, self._one_text(), self.label_column),)
        texts = [(text or "").strip() for column in columns for text in rows.table[column]]
        return self._with_text(rows, columns, texts, [bool(text) for text in texts])

    def open_texts(self) -> "Read[str | tuple[str, str]]":
        """What a classifier reads, without classes: a text of every row, or a pair; what has no text is left out.

        Raises:
          AstraError: as `open_documents`.
        """
        self._without_classes()
        rows = self._rows()
        columns = choose_texts(rows, self.text_column, self.label_column)
        texts = [(text or "").strip() for text in rows.table[columns[0]]]
        if len(columns) == 1:
            return self._with_text(rows, columns, texts, [bool(text) for text in texts])
        seconds = [(text or "").strip() for text in rows.table[columns[1]]]
        pairs = list(zip(texts, seconds, strict=True))
        return self._with_text(rows, columns, pairs, [bool(a and b) for a, b in pairs])

    def _with_text(self, rows: Rows, columns: Sequence[str], found: Sequence[Any], there: Sequence[bool]) -> Any:
        """What has text of what was found. Raises AstraError where nothing has."""
        kept = [one for one, has_text in zip(found, there, strict=True) if has_text]
        if not kept:
            raise AstraError(f"{self.where} holds no text: choose another --split")
        empty = len(found) - len(kept)
        left_out = rows.left_out | ({"rows without text": empty} if empty else {})
        notes = rows.notes + ((f"text of the column(s) {', '.join(columns)}",) if len(rows.features) > 1 else ())
        of = rows.of * len(found) // max(1, len(rows))
        return Read(kept, rows.account("documents", read=len(kept), of=of, left_out=left_out, notes=notes))

    def open_labelled(self, classes: Sequence[str] | None = None) -> "LabelledTexts":
        """Texts, or pairs of texts, and their classes; `classes` are those of a checkpoint.

        Raises:
          AstraError: the data cannot be read, the split or column does not exist, or labels do not fit the classes.
        """
        rows = self._rows()
        columns = choose_texts(rows, self.text_column, self.label_column)
        return LabelledTexts(rows, columns, read_labels(rows, self.label_column, classes, self.labels))

    def open_pairs(self) -> "Read[tuple[str, str, float]]":
        """Pairs of sentences and how similar people find them.

        Raises:
          AstraError: the data cannot be read, the split or a column does not exist, a row has no text or score, or
            `labels` are given.
        """
        self._without_classes()
        rows = self._rows()
        columns = self.text_column or PAIR
        if len(columns) != 2:
            raise AstraError(f"--text-column {' '.join(columns)}: similarity takes two columns: sentence1 sentence2")
        first, second = (check_text(rows, column) for column in columns)
        scores = need_column(rows, self.label_column or "score", "--label-column")
        table = rows.table.select_columns([first, second, scores])
        pairs = [
            (
                _text(row[first], f"{self.where} row {i}"),
                _text(row[second], f"{self.where} row {i}"),
                _score(row[scores], f"{self.where} row {i}"),
            )
            for i, row in enumerate(table)
        ]
        return Read(pairs, rows.account("pairs"))

    def _without_classes(self) -> None:
        """Raises AstraError where an option says what classes are called, and none are read."""
        if self.labels:
            raise AstraError(
                f"--labels {','.join(self.labels)}: no classes are read for this model: leave the option out"
            )

    def _rows(self) -> Rows:
        rows = read(self.data, self.split, separator=self.separator)
        if not len(rows):
            raise AstraError(f"{self.where} holds no text: choose another --split")
        return rows

    def _one_text(self) -> str | None:
        """The one column with the text."""
        if len(self.text_column) > 1:
            raise AstraError(
                f"--text-column {' '.join(self.text_column)}: only similarity and classifiers take several: give one"
            )
        return self.text_column[0] if self.text_column else None

    def _sentences(self, rows: Rows) -> tuple[str, ...]:
        """The two columns of a table of pairs; none if it is no such table."""
        columns = self.text_column or tuple(column for column in PAIR if column in rows.features)
        return tuple(check_text(rows, column) for column in columns) if len(columns) == 2 else ()


class Read(list[T]):
    """What was read, and an account of it."""

    def __init__(self, values: Sequence[T], account: Account):
        super().__init__(values)
        self.account = account


class FolderImages:
    """Pictures in a folder of a folder per class, as `ImageData`; they are decoded when they are asked for."""

    def __init__(
        self,
        folder: Path,
        files: Sequence[str],
        split: str,
        where: str,
        classes: Sequence[str] | None,
        said: Sequence[str],
    ):
        """The arguments are those of `read_pictures` and `labels.match`, which tell what is raised."""
        found = read_pictures(folder, files, split)
        self._folder, self._files, self._where = folder, found.files, where
        indices, how = (np.arange(len(found.names), dtype=np.int32), None)
        if classes is not None:
            indices, how = match(found.names, classes, where, said=said)
        self.names, self.labels = tuple(classes or found.names), indices[np.asarray(found.classes, np.int64)]
        self.account = Account(
            where=where,
            what="pictures",
            read=len(self),
            of=found.of,
            classes=len(np.unique(self.labels)),
            of_classes=len(found.names),
            left_out=found.left_out,
            notes=_matched(how),
        )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises AstraError, which names row and file, where the image cannot be decoded."""
        file = self._folder / self._files[index]
        name = f"{self._where} row {index} ({shown(file)})"
        if not is_regular(file):
            raise AstraError(f"{name}: is no regular file: remove it")
        return {"image": decode_image(file, name), "label": int(self.labels[index])}


class DatasetImages:
    """One split of a `datasets.Dataset` as `ImageData`; images are decoded when they are asked for.

    Args:
      rows: their column `column` holds undecoded images (`{"bytes", "path"}`).
      labels: the class of every row, and the names of the classes.
    """

    def __init__(self, rows: Rows, column: str, labels: Labels):
        self.names, self.labels, self.account = labels.names, labels.indices, _labelled(rows, "pictures", labels)
        self._rows, self._column = rows.table.select_columns([column]), column
        self._where, self._root = rows.where, rows.root

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
        content = image["bytes"]
        if content is None:
            content = allowed(image["path"], self._root)
            if content is None:
                raise AstraError(f"{name}: is no regular file below {self._root}: put the picture there")
        return {"image": decode_image(content, name), "label": int(self.labels[index])}


class LabelledTexts:
    """Texts and their classes with random access: `data[i]` is `{"text": str, "label": int}`, of pairs a tuple of two.

    `names[label]` is the name of a class. The arguments are those of `DatasetImages`; the columns, one or two, hold
    text.
    """

    def __init__(self, rows: Rows, columns: Sequence[str], labels: Labels):
        account = _labelled(rows, "texts", labels)
        if len(columns) > 1:
            account = account.noted(f"pairs of the columns {' and '.join(columns)}")
        self.names, self.labels, self.account = labels.names, labels.indices, account
        self._texts, self._where = [rows.table[column] for column in columns], rows.where

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises AstraError, which names the row, where there is no text."""
        texts = tuple(_text(column[index], f"{self._where} row {index}") for column in self._texts)
        return {"text": texts if len(texts) > 1 else texts[0], "label": int(self.labels[index])}


def _labelled(rows: Rows, what: str, labels: Labels) -> Account:
    return rows.account(
        what,
        classes=len(np.unique(labels.indices)),
        of_classes=labels.of_data,
        notes=rows.notes + _matched(labels.how),
    )


def _matched(how: str | None) -> tuple[str, ...]:
    return () if how is None else (f"classes matched {how}",)


def _text(value: str | None, where: str) -> str:
    if value is None or not value.strip():
        raise AstraError(f"{where}: has no text: remove the row")
    return value


def _score(value: Any, where: str) -> float:
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise AstraError(
            f"{where}: the score {value!r} is no number: correct the row, or choose another --label-column"
        )
    return score


def load_images(
    source: str,
    split: str,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    classes: Sequence[str] | None = None,
    said: Sequence[str] = (),
) -> FolderImages | DatasetImages:
    """Opens labelled images.

    Args:
      source: a hub id (`owner/name`), a parquet file, a folder with parquet files, or a folder of pictures:
        `FOLDER/CLASS/PICTURE` (all of it is the split `train`) or `FOLDER/SPLIT/CLASS/PICTURE`.
      split: `test`, `test[:1000]`, `train[10%:20%]`, `train+validation`. No split stands in for another.
      image_column, label_column: needed only where the columns' types leave a choice.
      classes, said: of a checkpoint. Labels of the data become indices into them; see `labels.match`.

    Raises:
      AstraError: the data cannot be read, the split or column does not exist, or labels do not fit the classes.
    """
    import datasets  # takes over a second: only for those who read data

    where, folder = f"{shown(source)}, split {split},", Path(source).expanduser()
    if folder.is_dir() and not has_card(folder) and has_pictures_alone(files := list(walk(folder))):
        with reading(where[:-1], "check the files and --split"):
            images = FolderImages(folder, files, split, where, classes, said)
        if not len(images):
            raise AstraError(f"{where} holds no images: choose another --split")
        return images
    rows = read(source, split, pictures=True)
    if not len(rows):
        raise AstraError(f"{where} holds no images: choose another --split")
    column = choose_column(rows, image_column, lambda f: isinstance(f, datasets.Image), "image")
    with reading(f"{where} column {column!r}", "is it a column of images? Choose another --image-column"):
        rows = dataclasses.replace(rows, table=rows.table.cast_column(column, datasets.Image(decode=False)))
    return DatasetImages(rows, column, read_labels(rows, label_column, classes, said))


def check_counts(batch_size: int | None, limit: int | None) -> None:
    """Raises AstraError if a batch size, or how much to read at most, is below 1."""
    for option, value in (("batch size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise AstraError(f"the {option} is {value}; it must be at least 1")


def batches(
    data: ImageData, processor: ImageProcessor, batch_size: int, *, limit: int | None = None
) -> Iterator[tuple[Float[np.ndarray, "B height width channels"], Int[np.ndarray, "B"]]]:
    """Float32 images and int32 labels in the order of the data; the last batch may be smaller.

    Args:
      limit: how many images at most; None for all.

    Raises:
      AstraError: `batch_size` or `limit` is below 1, or an image cannot be decoded.
    """
    check_counts(batch_size, limit)
    return _batches(data, processor, batch_size, min(len(data), limit or len(data)))


def _batches(data: ImageData, processor: ImageProcessor, batch_size: int, total: int) -> Iterator[Any]:
    for start in range(0, total, batch_size):
        rows = [data[i] for i in range(start, min(start + batch_size, total))]
        yield processor([row["image"] for row in rows]), np.asarray([row["label"] for row in rows], np.int32)
