"""Token sequences on their way through a model: windows over long documents, and batches of equal shape."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from astra_jax.inputs.token_batches import Text, bucket, pad
from astra_jax.inputs.tokenizer import Tokenizer
from astra_jax.report import progress


def encode(
    tokenizer: Tokenizer, texts: Sequence[str | tuple[str, str]], limit: int | None = None
) -> tuple[list[list[int]], int]:
    """The token ids of texts or pairs of texts, cut to `limit` tokens if given, and how many were cut."""
    encoded, cut = [], 0
    with progress("tokens", len(texts)) as advance:
        for text in texts:
            ids = tokenizer.encode(text)
            if limit is not None and len(ids) > limit:
                ids, cut = tokenizer.encode(text, limit), cut + 1
            encoded.append(ids)
            advance()
    return encoded, cut


class Window(NamedTuple):
    """A part of a document that a model can take. Prediction `i` of a window is that of its token `i + 1`.

    Attributes:
      ids: the tokens.
      counted: the first prediction that counts; those before it count in an earlier window.
    """

    ids: list[int]
    counted: int


def windows(ids: Sequence[int], length: int, stride: int) -> list[Window]:
    """Sliding windows over one document: every token but the first is predicted and counted exactly once.

    The first window starts with the document, and all of its predictions count. Each further one starts `stride` tokens
    later, and only its predictions of tokens that no window had before count: the last `stride` ones, or those that are
    left in the document's last window. So each but the first window's counts with at least `length - stride` tokens of
    context. A token can only be predicted from one before it: `stride = length` moves by `length - 1`.

    Args:
      ids: the document; one of less than 2 tokens has no window.
      length: the most tokens of a window, at least 2.
      stride: from 1 (the most context, the most work) to `length` (the least).
    """
    if not 1 <= stride <= length or length < 2:
        raise ValueError(f"length {length} must be at least 2, and stride {stride} from 1 to it")
    step = min(stride, length - 1)
    starts = range(0, max(1, len(ids) - length + step), step) if len(ids) > 1 else ()
    return [Window(list(ids[start : start + length]), length - step - 1 if start else 0) for start in starts]


def even_strides(lengths: Sequence[int]) -> list[int]:
    """The strides whose windows count predictions from all places of a shard alike: the last shard, the last two, and
    so on. With any other, tokens at the end of a shard count more often, which have more exact context.

    Args:
      lengths: tokens of every shard of a window.
    """
    return list(itertools.accumulate(reversed(lengths)))


def bucketed(
    sequences: Sequence[Sequence[int]], limit: int, batch_size: int
) -> Iterator[tuple[Int[np.ndarray, "rows"], Text]]:
    """Batches of `batch_size` sequences of one bucket, so that few programs are compiled.

    Yields:
      the places of the sequences in `sequences`, and the batch. A bucket's last batch is filled up with copies of its
      first sequence, which have no place: there may be fewer places than rows.

    Raises:
      AstraError: a sequence is empty or longer than `limit`, the most tokens that the model takes.
    """
    buckets: dict[int, list[int]] = {}
    for place, sequence in enumerate(sequences):
        buckets.setdefault(bucket(max(1, len(sequence)), limit), []).append(place)
    for T, places in sorted(buckets.items()):
        for start in range(0, len(places), batch_size):
            part = places[start : start + batch_size]
            filled = part + part[:1] * (batch_size - len(part))
            yield np.asarray(part), pad([sequences[place] for place in filled], limit, T)


def run_batches(
    run: Callable[[Text], Any], sequences: Sequence[Sequence[int]], limit: int, batch_size: int, label: str
) -> Iterator[tuple[int, np.ndarray]]:
    """Runs all sequences under a progress bar; yields the place of each in `sequences`, and its row of the output."""
    with progress(label, len(sequences)) as advance:
        for places, text in bucketed(sequences, limit, batch_size):
            yield from zip(map(int, places), jax.device_get(run(text)), strict=False)
            advance(len(places))
