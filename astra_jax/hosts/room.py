"""How many of a block's packets there is room for on the way to another host, learned from what was late there.

Codes whose first groups are a code by themselves are worth sending in part. The receiver sees when the first and the
last packet of a block came, and when it had nothing left to do but wait. What it waited for between the two is the
link's fault, and it tells the sender how many packets were in time. What it waited for before the first one came is
not: fewer packets would not have come sooner. The sender takes that number at once, and sends more again when nothing
has been late for a while (our choice).
"""

import math

GRACE_SECONDS, GRACE = 0.002, 0.05  # that may be waited for: so long, or that share of what a block's own work takes
GOOD = 4  # blocks that were not late, after which more is sent
MOST_GOOD = 64  # where sending more was late again and again
STEP = 1 / 16  # of all packets: the least by which more is sent


def in_time(sent: int, first: float, last: float, waited_from: float, worked: float) -> int | None:
    """How many of so many packets of a block were in time; None where the link did not hold it up.

    Args:
      first, last: when the first and the last one came, in seconds.
      waited_from: when there was nothing left to do but wait.
      worked: seconds of the block's own work before.
    """
    deadline = max(first, waited_from) + max(GRACE_SECONDS, GRACE * worked)
    if sent < 2 or last <= deadline:
        return None
    return math.floor(sent * (deadline - first) / (last - first))


class Room:
    """What a sender knows of the way to one receiver."""

    def __init__(self) -> None:
        self.share = 1.0  # of a block's packets
        self._good, self._patience, self._grown = 0, GOOD, False

    def packets(self, least: int, count: int) -> int:
        """How many of a block's packets to send; the first ones, of which so many have to go."""
        self._good += 1
        if self.share < 1 and self._good > self._patience:
            self._patience = GOOD if self._grown else self._patience
            self.share, self._good, self._grown = min(1.0, self.share + max(self.share / 4, STEP)), 0, True
        return max(least, self._of(count))

    def late(self, fit: int, sent: int, count: int) -> None:
        """Of a block's packets so many were sent, and so many of them in time."""
        if not 0 <= fit < sent <= self._of(count) <= count:  # it left before the last time that this was said
            return
        self._patience = min(2 * self._patience, MOST_GOOD) if self._grown else GOOD
        self.share, self._good, self._grown = fit / count, 0, False

    def _of(self, count: int) -> int:
        return max(1, min(count, math.ceil(self.share * count - 1e-9)))
