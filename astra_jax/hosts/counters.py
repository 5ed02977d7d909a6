"""Which packets came already, and how long waiting for them usually takes."""

WINDOW = 4096  # packets that may overtake each other


class Counters:
    """Which counters of a sender came already: all but those of the last `WINDOW` count as such."""

    def __init__(self) -> None:
        self.next, self._seen = 0, 0  # bit n of _seen: the counter next - 1 - n

    def fresh(self, counter: int) -> bool:
        """Whether it may still come."""
        back = self.next - 1 - counter
        return back < 0 or (back < WINDOW and not self._seen >> back & 1)

    def take(self, counter: int) -> None:
        """It came."""
        ahead = counter - (self.next - 1)
        if ahead > 0:
            self._seen = ((self._seen << min(ahead, WINDOW)) | 1) & ((1 << WINDOW) - 1)
            self.next = counter + 1
        else:
            self._seen |= 1 << -ahead


class Usual:
    """How long waiting takes where nothing is lost: mean and deviation, of late ones more than of early ones."""

    def __init__(self) -> None:
        self._mean, self._deviation, self._count = 0.0, 0.0, 0

    def add(self, seconds: float) -> None:
        self._count += 1
        weight = max(0.1, 1 / self._count)
        away = seconds - self._mean
        self._mean += weight * away
        self._deviation += weight * (abs(away) - self._deviation)

    def most(self) -> float:
        """What it hardly ever takes longer than; a second before anything is known."""
        return self._mean + 4 * self._deviation if self._count >= 8 else 1.0
