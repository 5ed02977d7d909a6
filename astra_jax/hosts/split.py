"""How tokens are split over hosts that are not as fast as each other: so that all are done at the same time.

Passes themselves are the measurement: each host says how long it computed for its share of the tokens, and it handles
the codes of all others besides, which no split changes. So the split is changed in a few steps, and only where it saves
much, since each host compiles its program anew for it (our choice: the paper splits evenly).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

PARTS = 64  # that the tokens are split into
LOOKS = 3  # passes after each other before a split is changed
GAIN = 0.1  # of the slowest host's time above the mean, for which it is changed
LEAST_SECONDS = 0.2  # of a pass: what is shorter is noise, and fast enough
MOST_CHANGES = 4

Parts = tuple[int, ...]  # of every host


@dataclasses.dataclass
class _Tried:
    """Of the hosts of a pass: their split, the one before it, and how long each computed, over the mean of all."""

    parts: Parts | None
    before: Parts | None = None
    seen: list[np.ndarray] = dataclasses.field(default_factory=list)
    slowest: float = np.inf
    changes: int = 0


class Split:
    """What is known of hosts, by their numbers."""

    def __init__(self) -> None:
        self._tried: dict[tuple[int, ...], _Tried] = {}
        self._speeds: dict[int, float] = {}

    def of(self, order: tuple[int, ...]) -> Parts | None:
        """The parts of hosts that compute together; None where all get as much."""
        if order not in self._tried:
            if len(self._tried) >= PARTS:
                self._tried.clear()
            speeds = [self._speeds.get(number, 0.0) for number in order]
            self._tried[order] = _Tried(parts_of(speeds) if all(speeds) else None)
        return self._tried[order].parts

    def learn(self, order: tuple[int, ...], parts: Parts | None, seconds: Sequence[float]) -> None:
        """How long each of these hosts computed in a pass."""
        tried = self._tried.get(order)
        if tried is None or tried.parts != parts or len(seconds) != len(order):
            return
        if max(seconds) < LEAST_SECONDS:
            tried.seen.clear()  # or else a fast model would be judged by the few passes that something held up
            return
        tried.seen.append(np.asarray(seconds) / np.mean(seconds))
        if len(tried.seen) < LOOKS:
            return
        took = np.median(tried.seen, axis=0)
        tried.seen.clear()
        speeds = np.asarray(parts or [PARTS / len(order)] * len(order)) / np.maximum(took, 1e-3)
        self._speeds.update(zip(order, speeds.tolist(), strict=True))
        slowest = float(took.max())
        if slowest > 0.95 * tried.slowest:  # the last change was of no use
            tried.parts, tried.changes = tried.before, MOST_CHANGES
        elif slowest > 1 + GAIN and tried.changes < MOST_CHANGES:
            tried.before, tried.parts = tried.parts, parts_of(speeds)
            tried.slowest, tried.changes = slowest, tried.changes + 1


def parts_of(speeds: Sequence[float] | np.ndarray) -> Parts | None:
    """`PARTS` in proportion to speeds, at least one for each host; None where all would get about as many."""
    wanted = np.asarray(speeds) / np.sum(speeds) * PARTS
    found = np.maximum(np.floor(wanted).astype(int), 1)
    while found.sum() != PARTS:
        step = 1 if found.sum() < PARTS else -1
        away = np.where((found > 1) | (step > 0), step * (wanted - found), -np.inf)
        found[int(np.argmax(away))] += step
    return None if found.max() * len(found) < (1 + GAIN) * PARTS else tuple(found.tolist())
