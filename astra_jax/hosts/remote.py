"""Another host as this one sees it: where it is, keys and counters, and what is missing of what it sent."""

import time
from typing import NamedTuple

from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from astra_jax.hosts.counters import WINDOW, Counters
from astra_jax.hosts.keys import derived

OF_DATA, OF_CONTROL = 0, 1  # classes of packets: each has counters of its own
MOST_ASKED = 64  # counters in one packet
ORDER_SECONDS = 0.003  # that networks reorder at least
PATIENCE_SECONDS = 1.75  # without any sign of life, after which a host is gone


class Peer(NamedTuple):
    """Where another host is."""

    address: str
    port: int


class Remote:
    """Another host: keys, counters, and what is missing of what it sent."""

    def __init__(self, number: int, me: int, key: bytes, where: Peer):
        self.number, self.where = number, where
        self.to, self.of = (
            ChaCha20Poly1305(derived(key, f"datagrams from {sender} to {receiver}"))
            for sender, receiver in ((me, number), (number, me))
        )
        self.sending = [0, 0]  # the next counter of each class
        self.kept: dict[int, bytes] = {}  # packets of data by their counters
        self.heard = (Counters(), Counters())
        self.top = 0  # data that was sent up to here, as far as is known
        self.missing: dict[int, list[float]] = {}  # counter -> when it was missed, and asked for
        self.reordered = ORDER_SECONDS
        self.heard_at = time.monotonic()
        self.data_at = self.ping_at = 0.0
        self.round_trip: float | None = None
        self.said_gone = False
        self.telling = self.hearing = 0  # numbers of the next messages
        self.told: dict[int, dict[int, bytes]] = {}  # number -> packets of it
        self.lengths: dict[int, int] = {}  # how many these will be

    def gone(self, now: float) -> bool:
        return self.said_gone or now - self.heard_at > PATIENCE_SECONDS

    def miss(self, top: int, now: float) -> None:
        """All up to `top` was sent; what did not come is missing."""
        for counter in range(max(self.top, top - WINDOW), top):
            if self.heard[OF_DATA].fresh(counter):
                self.missing[counter] = [now, 0.0]
        self.top = max(self.top, top)

    def due(self, now: float) -> list[int]:
        """What is to be asked for now."""
        again = 1.5 * (self.round_trip or 0.05) + 0.01
        found = [
            counter
            for counter, (missed, asked) in self.missing.items()
            if now - missed > self.reordered and now - asked > again
        ][:MOST_ASKED]
        for counter in found:
            self.missing[counter][1] = now
        return found
