"""What is answered, message by message: the same from a checkpoint that is loaded here and from workers.

Every message is a dataclass of what JSON can say. Rows are dicts of a table's columns.
"""

import dataclasses
import json
from typing import Any, cast

from astra_jax.errors import AstraError
from astra_jax.serving.continuation import End


class Message:
    """A part of an answer."""


@dataclasses.dataclass(frozen=True)
class Quantized(Message):
    """Bytes of the weights as integers, and of what they were."""

    weight_bytes: int
    full_weight_bytes: int


@dataclasses.dataclass(frozen=True)
class ShortText(Message):
    """A text has fewer tokens than there are devices."""

    tokens: int
    devices: int


@dataclasses.dataclass(frozen=True)
class Table(Message):
    """The answer as a table: `classes` of inputs, or `similarities` of pairs of them."""

    name: str
    checkpoint: str
    devices: int
    rows: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class PassTime(Message):
    """How long the pass took.

    Attributes:
      seconds, first_seconds: of the pass, and of an earlier one that had to compile (0: none had to).
      inputs: pictures or texts in it.
      sent, codes: bytes that a device sent for each of them, and whether they were codes.
    """

    seconds: float
    first_seconds: float
    inputs: int
    sent: int
    codes: bool


@dataclasses.dataclass(frozen=True)
class TextBegins(Message):
    """Texts follow, of so many tokens at most."""

    new_tokens: int


@dataclasses.dataclass(frozen=True)
class Piece(Message):
    """A text went on by a token; see `astra_jax.serving.engine.Event`."""

    row: int
    token: int
    text: str
    end: End | None


@dataclasses.dataclass(frozen=True)
class TextTime(Message):
    """All texts have ended.

    Attributes:
      prompt_tokens: of every prompt.
      first_token_seconds, compile_seconds: until the first token, and of an earlier pass that had to compile.
      tokens_per_second: of every text, from the second token on.
      sent: bytes of codes that a device sent for a prompt.
      cache_code_bytes, cache_full_bytes: of remote tokens in the cache, and of keys and values in their place.
      devices: that a prompt was spread over.
    """

    prompt_tokens: list[int]
    first_token_seconds: float
    compile_seconds: float
    tokens_per_second: float
    sent: int
    cache_code_bytes: int
    cache_full_bytes: int
    devices: int


@dataclasses.dataclass(frozen=True)
class HostTimes(Message):
    """Where the time of the pass went, a row per host; how long host 0 alone would have taken by its operations, and
    how many times as long as the pass (None where it is not known)."""

    rows: list[dict[str, Any]]
    single_ms: float | None
    speed_up: float | None


@dataclasses.dataclass(frozen=True)
class NoHostTimes(Message):
    """Where the time went is not known."""

    why: str


@dataclasses.dataclass(frozen=True)
class Ways(Message):
    """How fast the links between hosts are.

    Attributes:
      rows: of the table.
      hosts: how many there are.
      rate, round_trip: bits per second of the slowest way, and seconds of the longest; None where none was measured.
    """

    rows: list[dict[str, Any]]
    hosts: int
    rate: float | None
    round_trip: float | None


@dataclasses.dataclass(frozen=True)
class Without(Message):
    """The answer is without some codes.

    Attributes:
      packets: that did not come to host 0.
      hosts: that were gone while it was computed.
      left_out: packets that were not sent to host 0, as they would have been late.
    """

    packets: int
    hosts: list[str]
    left_out: int


@dataclasses.dataclass(frozen=True)
class Done(Message):
    """The answer is complete."""


@dataclasses.dataclass(frozen=True)
class Failed(Message):
    """There is no answer."""

    why: str


LAST = (Done, Failed)  # after which nothing comes
_KINDS = {kind.__name__: kind for kind in Message.__subclasses__()}


def pack(message: Message) -> tuple[str, bytes]:
    """A message as its kind and a body."""
    return type(message).__name__, json.dumps(dataclasses.asdict(cast(Any, message))).encode()


def unpack(kind: Any, body: bytes) -> Message:
    """The inverse of `pack`. Raises AstraError for anything else."""
    try:
        return cast(Message, cast(Any, _KINDS[kind])(**json.loads(body)))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise AstraError("what workers say is not understood: use the same version of astra for both") from error
