"""How fast the links between hosts are: a train of packets from each host to each other one, one way after the other.

A train is as many packets as fast as they can be sent, and its rate is what comes between its first and its last one:
that is the narrowest place on the way, or the sender, and nobody's clock but the receiver's counts.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from astra_jax.hosts.datagrams import TRAIN, Datagrams

PACKETS, BYTES = 64, 1200  # of a train
HEADERS = 28 + 52  # bytes of a packet besides: of IP, UDP, and of its seal
SECONDS = 20.0  # that a train may take: at 31 kbit/s it does
BETWEEN_SECONDS = 1e-5  # packets at least: what is faster is not measured


class Way(NamedTuple):
    """One direction between two hosts, by their numbers.

    Attributes:
      rate: bits per second that came, headers included; None where no two packets came.
      round_trip: seconds to the sender and back; None where nothing came back.
      lost: share of the packets.
    """

    sender: int
    receiver: int
    rate: float | None
    round_trip: float | None
    lost: float


def send(link: Datagrams, receiver: int) -> None:
    """Sends a train to a shard's host."""
    packets = np.random.default_rng(0).integers(0, 256, (PACKETS, BYTES), np.uint8)
    link.post(TRAIN, packets, [receiver], PACKETS)


def hear(link: Datagrams, order: Sequence[int], sender: int, receiver: int) -> Way:
    """What comes of one, to this host.

    Args:
      order: which host has each shard.
      sender, receiver: shards.
    """
    came, seconds = link.train(PACKETS, sender, SECONDS)
    rate = 8 * (BYTES + HEADERS) * (came - 1) / max(seconds, BETWEEN_SECONDS) if came > 1 else None
    return Way(order[sender], order[receiver], rate, link.round_trip(order[sender], 0.0), 1 - came / PACKETS)


def rows(ways: Sequence[Way]) -> list[dict[str, Any]]:
    """A table: a row for two hosts, in both directions."""
    of = {(way.sender, way.receiver): way for way in ways}
    pairs = [(of[a, b], of[b, a]) for a, b in sorted(of) if a < b and (b, a) in of]
    return [
        {
            "hosts": f"{there.sender} - {there.receiver}",
            "round trip ms": _milliseconds(there, back),
            "Mbps there": there.rate / 1e6 if there.rate else None,
            "Mbps back": back.rate / 1e6 if back.rate else None,
            "lost %": 100 * max(there.lost, back.lost),
        }
        for there, back in pairs
    ]


def slowest(ways: Sequence[Way]) -> Way | None:
    """The one with the lowest rate; None where none was measured."""
    return min((way for way in ways if way.rate), key=lambda way: way.rate or 0.0, default=None)


def _milliseconds(there: Way, back: Way) -> float | None:
    """The shorter of both, as either may have waited for what was sent before it."""
    return min((1e3 * way.round_trip for way in (there, back) if way.round_trip), default=None)
