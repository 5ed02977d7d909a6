"""What a preflight finds: the ways between hosts, and what is wrong."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from astra_jax.hosts.rendezvous import About


@dataclasses.dataclass(frozen=True)
class Way:
    """One direction between two hosts.

    Attributes:
      source, target: numbers of the hosts; the source connects and sends.
      round_trip: seconds of one byte there and back, the median of `preflight.PINGS`.
      rate: bits per second that arrived at the target.
      failure: why there is no round trip or rate; empty where all went well.
    """

    source: int
    target: int
    round_trip: float | None = None
    rate: float | None = None
    failure: str = ""


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two hosts, in both directions."""

    there: Way
    back: Way

    @property
    def round_trip(self) -> float | None:
        """Seconds: the shorter of both, as either may have waited for what was sent before it."""
        return min((way.round_trip for way in (self.there, self.back) if way.round_trip), default=None)

    @property
    def failure(self) -> str:
        """What went wrong; empty where all went well."""
        return "; ".join(way.failure for way in (self.there, self.back) if way.failure)


@dataclasses.dataclass(frozen=True)
class Findings:
    """What host 0 found; the other hosts learn of the problems alone.

    Attributes:
      hosts: those that came, by number.
      pairs: of these, the lower number first.
      notes: what is unusual, and no problem.
      problems: what to fix, each in a sentence.
    """

    hosts: tuple[About, ...] = ()
    pairs: tuple[Pair, ...] = ()
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def slowest(self) -> Way | None:
        """The way with the lowest rate; None where none was measured."""
        ways = [way for pair in self.pairs for way in (pair.there, pair.back) if way.rate]
        return min(ways, key=lambda way: way.rate or 0.0, default=None)

    @property
    def round_trip(self) -> float:
        """The longest of all pairs, in seconds; 0 where none was measured."""
        return max((pair.round_trip or 0.0 for pair in self.pairs), default=0.0)


def pair_rows(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """The table of pairs: what was measured, or why not."""
    return [
        {
            "hosts": f"{pair.there.source} - {pair.there.target}",
            "round trip ms": 1e3 * pair.round_trip if pair.round_trip else None,
            "Mbps there": pair.there.rate / 1e6 if pair.there.rate else None,
            "Mbps back": pair.back.rate / 1e6 if pair.back.rate else None,
            "problem": pair.failure or "-",
        }
        for pair in pairs
    ]
