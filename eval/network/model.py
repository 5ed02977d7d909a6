"""The network model: what exchanges cost, as pure functions. Units are bits, seconds, and bits per second.

A forward pass is computation and exchanges, one after the other: all devices compute, then each waits until it has
what the others sent. What it waits for is a multiple of the bits of one device, by how messages are counted:

    counting   all-gather   all-reduce      all-to-all    collective-permute
    once       1            1               (N - 1) / N   1
    each       N - 1        2 (N - 1) / N   (N - 1) / N   1

`once` is the paper's convention: a device waits for the volume of one shard, as on a medium where all hear all. `each`
is unicast, as between hosts (docs/lab.md): what is for all goes to every other device by itself or once round a ring,
which is as much, and an all-reduce is a ring. An all-reduce that is counted once is every device telling all others
its partial sum; an all-to-all has another part for each of them, and nothing to save. The latency of a
link is paid once per exchange, however many steps that takes.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np

from astra_jax.errors import AstraError
from astra_jax.strategies.base import Message

Counting = Literal["once", "each"]

_RATES = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def _quantity(text: str, units: Mapping[str, float]) -> float | None:
    """`"10mbit"` -> 10e6, of these units; None where the text is something else."""
    match = re.fullmatch(rf"([0-9]{{1,15}}(?:\.[0-9]{{1,15}})?)\s*({'|'.join(units)})", text.strip().lower())
    return float(match[1]) * units[match[2]] if match else None


def parse_rate(text: str) -> float:
    """`"10mbit"` -> 10e6 bits per second. Raises AstraError without a unit."""
    rate = _quantity(text, _RATES)
    if rate is None:
        raise AstraError(f"the rate {text!r} is not understood: write a number and kbit, mbit or gbit, such as 10mbit")
    if rate < 1:
        raise AstraError(f"the rate {text!r} is less than 1 bit per second: write one such as 10mbit")
    return rate


def parse_seconds(text: str) -> float:
    """`"2ms"` -> 0.002 seconds. Raises AstraError without a unit."""
    seconds = _quantity(text, _TIMES)
    if seconds is None:
        raise AstraError(f"the time {text!r} is not understood: write a number and us, ms or s, such as 2ms")
    return seconds


@dataclasses.dataclass(frozen=True)
class Link:
    """What joins the devices.

    Attributes:
      rate: bits per second, of every device at once.
      latency: seconds that an exchange takes besides its bits. The paper has 0: its network stack costs nothing.
      counting: how a message is counted (see the module's docstring).

    Raises:
      AstraError: a value is outside its range; the message names value, range and fix.
    """

    rate: float
    latency: float = 0.0
    counting: Counting = "once"

    def __post_init__(self) -> None:
        if not 0 < self.rate < math.inf:
            raise AstraError(f"the link's rate is {self.rate!r} bits per second; it must be above 0: try 10e6")
        if not 0 <= self.latency < math.inf:
            raise AstraError(f"the link's latency is {self.latency!r} seconds; it must be at least 0: try 0.002")
        if self.counting not in get_args(Counting):
            raise AstraError(f"counting is {self.counting!r}; it must be one of {', '.join(get_args(Counting))}")


def link_bits(message: Message, N: int, counting: Counting) -> float:
    """Bits that a device waits for in one exchange among N: the table in the module's docstring; 0 for N = 1."""
    if N == 1:
        return 0.0
    once = {"all-gather": 1.0, "all-reduce": 1.0, "all-to-all": (N - 1) / N, "collective-permute": 1.0}
    each = {"all-gather": N - 1.0, "all-reduce": 2 * (N - 1) / N, "all-to-all": (N - 1) / N, "collective-permute": 1.0}
    return message.bits * (once if counting == "once" else each)[message.kind]


def volume(messages: Sequence[Message], N: int, counting: Counting) -> tuple[float, int]:
    """Bits that a device waits for in one forward pass, `sum times * link_bits`, and the number of exchanges."""
    if N == 1:
        return 0.0, 0
    bits = sum((m.times * link_bits(m, N, counting) for m in messages), 0.0)
    return bits, sum(m.times for m in messages)


def exchange_seconds(messages: Sequence[Message], N: int, link: Link) -> float:
    """Seconds of all exchanges of one forward pass: `sum times * (latency + link_bits / rate)`."""
    bits, exchanges = volume(messages, N, link.counting)
    return exchanges * link.latency + bits / link.rate


def pass_seconds(compute: float | Sequence[float], messages: Sequence[Message], N: int, link: Link) -> float:
    """Seconds of one forward pass: `max_n compute_n + exchange_seconds`.

    No device goes on to the next block before it has heard all others, so that the slowest sets the pace. That
    computation goes on while messages travel is not modelled: with overlap a pass takes between
    `max(compute, exchange)` and this sum.

    Args:
      compute: seconds of computation of one device if all have the same to do, or of each of the N devices.
      messages: what one device gives to collectives (`strategy.messages(model)`).
      N: devices.
      link: what joins them.
    """
    return float(np.max(compute)) + exchange_seconds(messages, N, link)


def break_even_rate(
    single: float,
    compute: float | Sequence[float],
    messages: Sequence[Message],
    N: int,
    latency: float = 0.0,
    counting: Counting = "once",
) -> float | None:
    """The link's rate in bits per second at which N devices take as long as one; above it they are faster.

    It is `bits / (single - max_n compute_n - exchanges * latency)`, which is `pass_seconds = single` solved for the
    rate; 0 where nothing is sent. None where no rate makes N devices faster.

    Args:
      single: seconds of the forward pass on one device.
      compute, messages, N: as in `pass_seconds`.
      latency, counting: as in `Link`.
    """
    bits, exchanges = volume(messages, N, counting)
    spare = single - float(np.max(compute)) - exchanges * latency
    return bits / spare if spare > 0 else None
