"""Training batches that can be resumed exactly, and the handwritten digits of the demo."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from astra_jax.errors import AstraError
from astra_jax.inputs.images import ImageProcessor
from astra_jax.inputs.token_batches import Text, longest, pad
from astra_jax.inputs.tokenizer import Tokenizer
from astra_jax.report import progress
from checkpoints import Checkpoint
from eval.datasets.account import Tell
from eval.datasets.labelled import DataArgs, ImageData
from eval.datasets.labels import model_classes
from eval.datasets.windows import encode

CACHE_BYTES = 2**30  # resized pixels up to this size are kept in memory
DECODE_CHUNK = 64  # images that a thread decodes at a time
DIGITS_TEST = 600


@dataclasses.dataclass(frozen=True)
class Augment:
    """How training images are varied.

    Attributes:
      flip: mirror left and right with probability 1/2. Not for digits or text.
      crop: shift by up to this part of height and width; what enters is a copy of the edge. 0.125 is the usual
        "crop with 4 pixels of padding" at 32x32.

    Raises:
      AstraError: `crop` is outside 0..0.5.
    """

    flip: bool = True
    crop: float = 0.125

    def __post_init__(self) -> None:
        if not 0 <= self.crop <= 0.5:
            raise AstraError(f"crop is {self.crop}; it must be from 0 (none) to 0.5 of the image: try 0.125")

    def __call__(self, images: UInt8[np.ndarray, "B h w c"], rng: np.random.Generator) -> UInt8[np.ndarray, "B h w c"]:
        """Varies every image of a batch on its own."""
        B, h, w, c = images.shape
        down, right = round(self.crop * h), round(self.crop * w)
        rows = np.clip(np.arange(h) + rng.integers(-down, down + 1, (B, 1)), 0, h - 1)
        columns = np.clip(np.arange(w) + rng.integers(-right, right + 1, (B, 1)), 0, w - 1)
        if self.flip:
            columns = np.where(rng.random((B, 1)) < 0.5, columns[:, ::-1], columns)
        # One gather of whole pixels does all of it: 4 times faster than indexing images, rows and columns.
        pixels = (np.arange(B)[:, None] * h + rows)[:, :, None] * w + columns[:, None, :]
        return images.reshape(B * h * w, c).take(pixels, axis=0)


class Decoded:
    """Images of one size in memory. It is `ImageData`, too, so that evaluation need not decode again.

    Args:
      pixels: uint8 [n,h,w,c].
      labels: class index of every image, int32 [n].
      names: names of the classes.
    """

    def __init__(self, pixels: UInt8[np.ndarray, "n h w c"], labels: Int[np.ndarray, "n"], names: tuple[str, ...]):
        self.pixels, self.labels, self.names = pixels, labels, names

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.pixels[index], "label": int(self.labels[index])}

    def take(self, indices: Int[np.ndarray, "B"]) -> tuple[UInt8[np.ndarray, "B h w c"], Int[np.ndarray, "B"]]:
        """The images and labels of these rows."""
        return self.pixels[indices], self.labels[indices]


@dataclasses.dataclass(frozen=True)
class _OnDemand:
    """Images that are decoded and resized whenever they are read: for data that do not fit into memory."""

    data: ImageData
    processor: ImageProcessor

    def take(self, indices: Int[np.ndarray, "B"]) -> tuple[UInt8[np.ndarray, "B h w c"], Int[np.ndarray, "B"]]:
        rows = [self.data[int(i)] for i in indices]
        return self.processor.resize([row["image"] for row in rows]), np.asarray([r["label"] for r in rows], np.int32)


def decode(data: ImageData, processor: ImageProcessor) -> Decoded:
    """Decodes and resizes all images once, with a progress bar.

    Raises:
      AstraError: an image cannot be decoded; the message names it.
    """
    shape = (processor.height, processor.width, processor.channels)
    if isinstance(data, Decoded) and data.pixels.shape[1:] == shape and processor.size == shape[:2]:
        return data
    pixels, labels = np.empty((len(data), *shape), np.uint8), np.empty(len(data), np.int32)
    chunks = grain.MapDataset.range(len(data)).batch(DECODE_CHUNK, batch_fn=np.asarray)
    read = chunks.map(lambda indices: (indices, *_OnDemand(data, processor).take(indices)))
    with progress("decoding images", len(data)) as advance:
        for indices, images, classes in read.to_iter_dataset(_threads()):
            pixels[indices], labels[indices] = images, classes
            advance(len(indices))
    return Decoded(pixels, labels, data.names)


def train_batches(
    data: ImageData, processor: ImageProcessor, batch_size: int, seed: int, augment: Augment | None = None
) -> grain.DatasetIterator[dict[str, Any]]:
    """Endless batches of images; see `_endless` for their order. Data that fit into memory are decoded first, once.

    Returns:
      iterator over {"input": float32 [B,height,width,channels], "label": int32 [B]}.

    Raises:
      AstraError: `batch_size` or `seed` is outside its range, there are no images, or one cannot be decoded.
    """
    _check(batch_size, seed, len(data), "images")
    size = len(data) * processor.height * processor.width * processor.channels
    source = decode(data, processor) if size <= CACHE_BYTES else _OnDemand(data, processor)

    def batch(indices: Int[np.ndarray, "B"], rng: np.random.Generator) -> dict[str, Any]:
        images, labels = source.take(indices)
        return {"input": processor.normalize(augment(images, rng) if augment else images), "label": labels}

    # From memory one thread is enough, and several only contend for the interpreter.
    reading = _ONE_THREAD if isinstance(source, Decoded) else _threads()
    return _endless(len(data), batch_size, seed, batch, reading)


def text_batches(
    text: Text, labels: Int[np.ndarray, "n"] | None, batch_size: int, seed: int
) -> grain.DatasetIterator[dict[str, Any]]:
    """Endless batches of token sequences; see `_endless` for their order.

    Args:
      text: all sequences, padded to the same length.
      labels: the class of every sequence; None for language modelling.

    Returns:
      iterator over {"input": Text} or {"input": Text, "label": int32 [B]}.

    Raises:
      AstraError: `batch_size` or `seed` is outside its range, or there is no text.
    """
    _check(batch_size, seed, len(text.ids), "texts")

    def batch(indices: Int[np.ndarray, "B"], rng: np.random.Generator) -> dict[str, Any]:
        found: dict[str, Any] = {"input": Text(text.ids[indices], text.lengths[indices])}
        return found if labels is None else found | {"label": labels[indices]}

    return _endless(len(text.ids), batch_size, seed, batch, _ONE_THREAD)


def packed(documents: Sequence[str], tokenizer: Tokenizer, eos: Sequence[int], length: int) -> tuple[Text, str]:
    """Documents for language modelling: token ids end to end, an end-of-text token behind each, cut into `length`. And
    in words how many there are.

    Raises:
      AstraError: there are fewer tokens than one sequence takes.
    """
    ids: list[int] = []
    with progress("reading text", len(documents)) as advance:
        for document in documents:
            ids += [*tokenizer.encode(document), *eos[:1]]
            advance()
    n = len(ids) // length
    if n < 1:
        raise AstraError(f"the text has {len(ids)} tokens, fewer than one sequence of {length}: use a smaller --length")
    text = Text(np.asarray(ids[: n * length], np.int32).reshape(n, length), np.full(n, length, np.int32))
    return text, f"{n:,} sequences of {length:,} of their {len(ids):,} tokens"


def sequences(
    checkpoint: Checkpoint, data: DataArgs, length: int | None, tell: Tell
) -> tuple[Text, Int[np.ndarray, "n"] | None]:
    """The text of a data set as a checkpoint takes it: all sequences, padded to the same length, and their classes.

    A language model gets documents end to end, cut into `length` tokens; the others a text per row, cut to it, of a row
    that is a pair a sentence encoder each of both, and a classifier both as one. Only a model that says one class of
    all has classes.

    Args:
      length: tokens of a sequence; None for the model's limit, but at most 512.
      tell: is told what is read.

    Raises:
      AstraError: the data cannot be read, `length` is not from 2 to the model's limit, or there is too little text.
    """
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    limit = longest(config)
    length = min(limit, 512) if length is None else length
    if not 2 <= length <= limit:
        raise AstraError(f"--length is {length}; this model takes from 2 to {limit} tokens")
    if config.task == "causal-lm":
        documents = data.open_documents()
        text, how = packed(documents, tokenizer, checkpoint.eos_ids, length)
        tell(documents.account.noted(how))
        return text, None
    labels = None
    problem = checkpoint.problem(config.num_labels)
    if config.task == "embedding" or problem != "single_label_classification":
        read: Any = data.open_documents(pairs=True) if config.task == "embedding" else data.open_texts()
        texts, account = list(read), read.account
    else:
        rows = data.open_labelled(model_classes(checkpoint))
        texts, labels, account = [rows[i]["text"] for i in range(len(rows))], rows.labels, rows.account
    ids, cut = encode(tokenizer, texts, length)
    tell(account.noted(f"{cut:,} of {len(texts):,} texts were cut to {length:,} tokens") if cut else account)
    return pad(ids, limit), labels


def _check(batch_size: int, seed: int, count: int, what: str) -> None:
    if batch_size < 1:
        raise AstraError(f"the batch size is {batch_size}; it must be at least 1")
    if not 0 <= seed < 2**32:
        raise AstraError(f"the seed is {seed}; it must be from 0 to {2**32 - 1}")
    if not count:
        raise AstraError(f"the training data hold no {what}: choose another split")


def _endless(
    count: int, batch_size: int, seed: int, batch: Callable[..., dict[str, Any]], reading: grain.ReadOptions
) -> grain.DatasetIterator[dict[str, Any]]:
    """`batch(indices, rng)` for ever: every epoch holds all of `count` once, in an order of its own; batches may span
    two epochs.

    Order and variation depend on `seed` and the position alone: `set_state(state)` of an iterator with the same
    arguments continues bit for bit after the batch before `state = get_state()`, a dict for JSON.
    """
    # Grain moves indices only: gathering, varying and normalizing whole batches is many times faster.
    order = grain.MapDataset.range(count).seed(seed).shuffle().repeat().batch(batch_size, batch_fn=np.asarray)
    return iter(order.random_map(batch).to_iter_dataset(reading))


_ONE_THREAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)


def _threads() -> grain.ReadOptions:
    """Pillow releases the interpreter while it decodes, so that every core can work."""
    cores = os.cpu_count() or 1
    return grain.ReadOptions(num_threads=cores, prefetch_buffer_size=2 * cores)


class DigitsData(Decoded):
    """scikit-learn's 1,797 handwritten digits, 8x8 with values 0..16, as 32x32 RGB.

    A fixed split keeps the share of every digit: 1,197 to train, 600 to test. Never flip digits.

    Args:
      train: which part. `numbers` are its places in scikit-learn's order.
    """

    def __init__(self, train: bool):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        parts = train_test_split(
            np.arange(len(digits.target)), test_size=DIGITS_TEST, stratify=digits.target, random_state=0
        )
        self.numbers: Int[np.ndarray, "n"] = np.sort(parts[0 if train else 1])
        grey = np.round(digits.images[self.numbers] * (255 / 16)).astype(np.uint8)
        pixels = np.empty((len(grey), 32, 32, 3), np.uint8)
        for row, image in zip(pixels, grey, strict=True):
            row[...] = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC))[:, :, None]
        super().__init__(pixels, digits.target[self.numbers].astype(np.int32), tuple("0123456789"))


def write_digits(folder: Path) -> None:
    """Writes `DigitsData` as an ordinary folder of pictures, `FOLDER/{train,test}/{0..9}/NNNN.png`.

    Files of the same name are replaced; NNNN is the number of the picture in scikit-learn's order.

    Raises:
      AstraError: the folder cannot be written.
    """
    try:
        for split in ("train", "test"):
            data = DigitsData(train=split == "train")
            for name in data.names:
                (folder / split / name).mkdir(parents=True, exist_ok=True)
            for number, image, label in zip(data.numbers, data.pixels, data.labels, strict=True):
                Image.fromarray(image).save(folder / split / data.names[label] / f"{number:04d}.png")
    except OSError as error:
        raise AstraError(f"{folder}: cannot be written ({error.strerror}): choose another folder") from error
