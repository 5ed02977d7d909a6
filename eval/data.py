"""What is read: labelled pictures, labelled texts, documents, and pairs of sentences; batches of pictures in order."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from astra_jax.errors import AstraError
from astra_jax.preprocess import ImageProcessor, decode_image
from eval.sources import choose_column, is_text, need_column, read, read_labels, reading


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
    """The column with the text, where there are several; two for similarity, sentence1 sentence2 by default."""
    label_column: str | None = None
    """The column with the labels, where there are several; for similarity that with the scores, score by default."""
    separator: str | None = None
    """Text files: what separates documents, such as <|endoftext|>; without it a file is one document."""

    @property
    def where(self) -> str:
        """What error messages call the data."""
        return f"{self.data}, split {self.split},"

    def source(self) -> dict[str, Any]:
        """The options that say what is read, under their names."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(DataArgs)}

    def open(self, labels: Sequence[str] | None = None) -> "DatasetImages":
        """The images; `labels` are the classes of a checkpoint. Raises AstraError; see `load_images`."""
        return load_images(
            self.data, self.split, image_column=self.image_column, label_column=self.label_column, labels=labels
        )

    def open_documents(self) -> list[str]:
        """The documents: a row of a table, a text file, or a part of one; empty ones are left out.

        Raises:
          AstraError: the data cannot be read, the split or column does not exist, or there is no text.
        """
        rows = self._texts()
        column = self._text_column(rows)
        documents = [text.strip() for text in rows[column] if text is not None]
        documents = [text for text in documents if text]
        if not documents:
            raise AstraError(f"{self.where} holds no text: choose another --split")
        return documents

    def open_labelled(self, labels: Sequence[str] | None = None) -> "LabelledTexts":
        """Texts and their classes; `labels` are the classes of a checkpoint.

        Raises:
          AstraError: the data cannot be read, the split or column does not exist, or labels do not fit the classes.
        """
        rows = self._texts()
        column = self._text_column(rows)
        indices, names = read_labels(rows, self.label_column, labels, self.where)
        return LabelledTexts(rows, column, indices, names, self.where)

    def open_pairs(self) -> list[tuple[str, str, float]]:
        """Pairs of sentences and how similar people find them.

        Raises:
          AstraError: the data cannot be read, the split or a column does not exist, or a row has no text or score.
        """
        rows = self._texts()
        columns = self.text_column or ("sentence1", "sentence2")
        if len(columns) != 2:
            raise AstraError(f"--text-column {' '.join(columns)}: similarity takes two columns: sentence1 sentence2")
        first, second = (self._checked_text(rows, column) for column in columns)
        scores = need_column(rows.features, self.label_column or "score", "--label-column", self.where)
        table = rows.select_columns([first, second, scores])
        return [
            (
                _text(row[first], f"{self.where} row {i}"),
                _text(row[second], f"{self.where} row {i}"),
                _score(row[scores], f"{self.where} row {i}"),
            )
            for i, row in enumerate(table)
        ]

    def _texts(self) -> Any:
        rows = read(self.data, self.split, separator=self.separator)
        if not len(rows):
            raise AstraError(f"{self.where} holds no text: choose another --split")
        return rows

    def _text_column(self, rows: Any) -> str:
        """The one column with the text."""
        if len(self.text_column) > 1:
            raise AstraError(f"--text-column {' '.join(self.text_column)}: only similarity takes several: give one")
        name = self.text_column[0] if self.text_column else None
        return self._checked_text(rows, name)

    def _checked_text(self, rows: Any, name: str | None) -> str:
        column = choose_column(rows.features, name, is_text, "text", self.where)
        if not is_text(rows.features[column]):
            raise AstraError(
                f"--text-column {column}: {self.where} has {rows.features[column]} there, no text: "
                f"choose another of {', '.join(rows.features)}"
            )
        return column


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


class LabelledTexts:
    """Texts and their classes with random access: `data[i]` is `{"text": str, "label": int}`.

    `names[label]` is the name of a class. The arguments are those of `DatasetImages`; the column holds text.
    """

    def __init__(self, rows: Any, column: str, labels: Int[np.ndarray, "rows"], names: tuple[str, ...], where: str):
        self.names = names
        self._texts, self._labels, self._where = rows[column], labels, where

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises AstraError, which names the row, where there is no text."""
        text = _text(self._texts[index], f"{self._where} row {index}")
        return {"text": text, "label": int(self._labels[index])}


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

    rows = read(source, split, pictures=True)
    where = f"{source}, split {split},"
    if not len(rows):
        raise AstraError(f"{where} holds no images: choose another --split")
    column = choose_column(rows.features, image_column, lambda f: isinstance(f, datasets.Image), "image", where)
    with reading(f"{where} column {column!r}", "is it a column of images? Choose another --image-column"):
        rows = rows.cast_column(column, datasets.Image(decode=False))
    return DatasetImages(rows, column, *read_labels(rows, label_column, labels, where), where)


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
