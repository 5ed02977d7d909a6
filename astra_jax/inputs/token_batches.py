"""What a language model takes: batches of token ids."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Int

from astra_jax.errors import AstraError

SMALLEST_BUCKET = 32


class Text(NamedTuple):
    """Token sequences of different lengths, padded on the right.

    Attributes:
      ids: token ids, those of other types as `typed` has them; what stands in the padding does not matter.
      lengths: tokens of every sequence, at least 1.
    """

    ids: Int[Array | np.ndarray, "B T"]
    lengths: Int[Array | np.ndarray, "B"]


def check_text(option: str, value: Any) -> None:
    """Raises AstraError for what is no text, also a string with half a character in it: Python makes such of arguments
    that are not UTF-8, and no tokenizer takes them."""
    if not isinstance(value, str):
        raise AstraError(f"{option} is {value!r}; it must be a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        found = ascii(value[error.start])
        raise AstraError(
            f"{option}: its character {error.start + 1} is {found}, which is none: give the text in UTF-8"
        ) from error


def typed(ids: Sequence[int], types: Sequence[int], vocab_size: int) -> list[int]:
    """Numbers that say of every token its id and its type, 0 for a first text and 1 for a second: V more for each type.

    So the type of a token goes wherever its id goes, into shards and to other devices.
    """
    return [id + vocab_size * type for id, type in zip(ids, types, strict=True)]


def numbers_of_tokens(config: Any) -> int:
    """How many numbers tokens may have: one for every id of every type."""
    return int(config.vocab_size * max(1, getattr(config, "type_vocab_size", 0)))


def most_tokens(config: Any) -> int:
    """The most tokens that have places in a model of this configuration."""
    return int(getattr(config, "most_tokens", config.max_position_embeddings))


def longest(config: Any) -> int:
    """The most tokens of a text that a model of this configuration takes."""
    limit = most_tokens(config)
    return min(getattr(config, "max_seq_length", None) or limit, limit)


def bucket(T: int, limit: int) -> int:
    """The length that sequences of up to T tokens are padded to: 32, 64, 128, ... and `limit` itself.

    One program is compiled per bucket, not per length.
    """
    return min(limit, max(SMALLEST_BUCKET, 1 << (T - 1).bit_length()))


def pad(sequences: Sequence[Sequence[int]], limit: int, T: int | None = None) -> Text:
    """Token sequences -> a batch, padded to `T` or to their bucket.

    Args:
      limit: the most tokens that the model takes.

    Raises:
      AstraError: a sequence is empty or longer than `limit`.
    """
    most = max(map(len, sequences), default=0)
    if min(map(len, sequences), default=0) < 1:
        raise AstraError("the text is empty: give at least one token")
    if most > limit:
        raise AstraError(f"the text has {most} tokens; the model takes at most {limit}: shorten it")
    ids = np.zeros((len(sequences), T or bucket(most, limit)), np.int32)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    return Text(ids, np.asarray([len(sequence) for sequence in sequences], np.int32))
