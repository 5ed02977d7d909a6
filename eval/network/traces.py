"""Links whose rate changes: traces, and how requests fare on them.

    python -m eval.network.traces

writes the two traces that come with the project, `wifi` and `step-down`, anew.
"""

import bisect
import csv
import dataclasses
import functools
import itertools
import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from astra_jax.errors import AstraError
from astra_jax.files import write_atomically
from astra_jax.strategies.base import Message
from eval.network.model import Counting, link_bits

FOLDER = Path(__file__).parent / "link_traces"
HEADER = ["seconds", "bits_per_second"]
FASTEST = 1e15  # bits per second; a link that carries anything carries 1 bit per second
SHORTEST, LONGEST = 1e-3, 1e7  # seconds of a trace
MOST_REQUESTS = 10_000_000  # of a replay: minutes


@dataclasses.dataclass(frozen=True)
class Trace:
    """The rate of a link as a step function of time. After its end it starts again.

    Attributes:
      seconds: when each row begins to hold; the first at 0. It holds until the next one begins, and the last for as
        long as the one before it (our choice). A single row is a constant rate.
      rates: bits per second of each row. 0 is an outage.

    Raises:
      AstraError: times do not grow from 0, or rates cannot be; the message names the row, counted from 1, and the fix.
    """

    seconds: tuple[float, ...]
    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.seconds:
            raise AstraError("there is no row: write at least one, such as 0,10000000")
        before = -math.inf
        for row, (second, rate) in enumerate(zip(self.seconds, self.rates, strict=True), 1):
            if not 0 <= second < math.inf or (row == 1 and second != 0):
                raise AstraError(f"row {row}: seconds is {second}; times are numbers that start at 0: correct it")
            if second <= before:
                raise AstraError(f"row {row}: seconds is {second} after {before}; times must grow: sort the rows")
            if not 0 <= rate < math.inf:
                raise AstraError(f"row {row}: bits_per_second is {rate}; it must be 0 (an outage) or more: correct it")
            before = second
        if not 0 < self.sent[-1] < math.inf:
            raise AstraError(
                f"all rows together carry {self.sent[-1]} bits; that must be finite and above 0: correct the rates"
            )
        self._check_sizes()

    def _check_sizes(self) -> None:
        """Numbers that are far from all links would make others of them that are none."""
        for row, rate in enumerate(self.rates, 1):
            if rate and not 1 <= rate <= FASTEST:
                raise AstraError(
                    f"row {row}: bits_per_second is {rate}; it must be 0 (an outage), or 1 to {FASTEST:g}: correct it"
                )
        if not SHORTEST <= self.edges[-1] <= LONGEST:
            raise AstraError(
                f"it lasts {self.edges[-1]:g} seconds; that must be from {SHORTEST:g} to {LONGEST:g}: correct the times"
            )

    @functools.cached_property
    def edges(self) -> tuple[float, ...]:
        """When every row begins, and when the last one ends, in seconds."""
        last = self.seconds[-1] - self.seconds[-2] if len(self.seconds) > 1 else 1.0
        return (*self.seconds, self.seconds[-1] + last)

    @functools.cached_property
    def sent(self) -> tuple[float, ...]:
        """Bits that can be sent from the start to every edge."""
        rows = zip(itertools.pairwise(self.edges), self.rates, strict=True)
        return tuple(itertools.accumulate(((end - begin) * rate for (begin, end), rate in rows), initial=0.0))


def read_trace(name: str) -> Trace:
    """Reads a trace: the name of one that comes with the project, or a CSV file with the columns
    `seconds,bits_per_second`.

    Raises:
      AstraError: there is no such file, or it is not a trace; the message names file, row, value and fix.
    """
    shipped = sorted(path.stem for path in FOLDER.glob("*.csv"))
    path = FOLDER / f"{name}.csv" if name in shipped else Path(name)
    try:
        rows = [row for row in csv.reader(path.read_text(encoding="utf-8-sig").splitlines()) if row]
    except FileNotFoundError:
        raise AstraError(f"{path}: is missing: give a CSV file, or {' or '.join(shipped)}") from None
    except OSError as error:
        raise AstraError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, csv.Error) as error:
        raise AstraError(f"{path}: is not a CSV file ({error}): give another one") from error
    if not rows or [cell.strip() for cell in rows[0]] != HEADER:
        found = ",".join(rows[0])[:40] if rows else ""
        raise AstraError(f"{path}: the header is {found!r}; it must be {','.join(HEADER)!r}: add it as the first line")
    try:
        numbers = [_numbers(number, row) for number, row in enumerate(rows[1:], 1)]
        return Trace(tuple(second for second, _ in numbers), tuple(rate for _, rate in numbers))
    except AstraError as error:
        raise AstraError(f"{path}: {error}") from None


def _numbers(number: int, row: Sequence[str]) -> tuple[float, float]:
    try:
        if any("_" in cell or not cell.isascii() for cell in row):  # which Python reads, and nobody else
            raise ValueError
        second, rate = map(float, row)
    except ValueError:
        found = ",".join(row)[:40]
        raise AstraError(f"row {number}: {found!r} must be two numbers, such as 0.5,10000000: correct it") from None
    return second, rate


def transfer_end(trace: Trace, start: float, bits: float) -> float:
    """When `bits` that are sent from second `start` on have arrived: the first time at which the integral of the rate
    from `start` reaches `bits`, exactly."""
    if bits == 0:
        return start
    turn, within = divmod(start, trace.edges[-1])
    row = bisect.bisect_right(trace.edges, within) - 1
    # Counted from the beginning of this turn of the trace; the rest of the sum is what could have been sent until now.
    target = trace.sent[row] + (within - trace.edges[row]) * trace.rates[row] + bits
    turns, rest = divmod(target, trace.sent[-1])
    if rest == 0:  # they arrive with the last bit of a turn, not after an outage at its end
        turns, rest = turns - 1, trace.sent[-1]
    row = bisect.bisect_left(trace.sent, rest) - 1
    end = (turn + turns) * trace.edges[-1] + trace.edges[row] + (rest - trace.sent[row]) / trace.rates[row]
    return max(start, end)  # bits that vanish in rounding would arrive before they are sent


def replay(
    compute: float | Sequence[float],
    messages: Sequence[Message],
    N: int,
    L: int,
    trace: Trace,
    duration: float,
    latency: float = 0.0,
    counting: Counting = "once",
) -> Float[np.ndarray, "requests"]:
    """Seconds that each of the requests takes that run one after the other, from the trace's start until `duration`.

    Every block of a request is `max_n compute_n / L` of computation, then its exchanges, each `latency` and then its
    bits at the rate that the link has at that moment. Where there are more or fewer exchanges than blocks, they are
    spread evenly over them; what is sent after the blocks ends the request. On a constant rate a request takes
    `eval.network.model.pass_seconds`.

    Args:
      compute: seconds of computation of one forward pass, above 0: of one device, or of each.
      messages: what one device gives to collectives (`strategy.messages(model)`).
      N: devices.
      L: blocks.
      trace: the link's rate.
      duration: the last request starts before this second; `trace.edges[-1]` is once through the trace.
      latency, counting: as in `eval.network.model.Link`.

    Raises:
      AstraError: so many requests fit that to replay them takes too long.
    """
    if duration > MOST_REQUESTS * float(np.max(compute)):
        raise AstraError(
            f"more than {MOST_REQUESTS:,} requests of {1e3 * float(np.max(compute)):.3g} ms fit into {duration:g} s of "
            "the trace: give one that ends sooner"
        )
    block_seconds = float(np.max(compute)) / L
    exchanges = [
        [link_bits(m, N, counting) for m in messages if N > 1 for _ in range(_due(m, block, L))] for block in range(L)
    ]
    now, found = 0.0, []
    while now < duration:
        start = now
        for block in exchanges:
            now += block_seconds
            for bits in block:
                now = transfer_end(trace, now + latency, bits)
        found.append(now - start)
    return np.array(found)


def _due(message: Message, block: int, L: int) -> int:
    """How often a message is sent after a block: by the end of block l, `(l + 1) times / L` of them, rounded down."""
    if not message.in_blocks:
        return message.times if block == L - 1 else 0
    return (block + 1) * message.times // L - block * message.times // L


def wifi() -> Trace:
    """A minute of a link that fluctuates as indoor Wi-Fi does, ten rows a second (our choice; no measurement).

    The logarithm of the rate is an AR(1) process around 40 Mbps: each step keeps 0.95 of the distance and adds noise
    so that its standard deviation is 0.4; the rate is kept between 10 and 80 Mbps. On top of it lies a two-state
    Markov chain: a fade begins with probability 0.01 per step, ends with 0.3 (it lasts 0.33 s on average), and
    divides the rate by 10. Rates are rounded to 0.1 Mbps.
    """
    keep, spread, draw = 0.95, 0.4, random.Random(2505)
    distance, fading, rates = 0.0, False, []
    for _ in range(600):
        distance = keep * distance + math.sqrt(1 - keep**2) * draw.gauss(0.0, spread)
        fading = draw.random() >= 0.3 if fading else draw.random() < 0.01
        rate = min(80.0, max(10.0, 40.0 * math.exp(distance))) / (10 if fading else 1)
        rates.append(1e5 * round(10 * rate))
    return Trace(tuple(row / 10 for row in range(600)), tuple(rates))


def step_down() -> Trace:
    """A link that gets worse: 100, 50, 20 and 10 Mbps, 15 seconds each (our choice)."""
    return Trace((0.0, 15.0, 30.0, 45.0), (100e6, 50e6, 20e6, 10e6))


def main() -> None:
    """Writes the traces that come with the project."""
    FOLDER.mkdir(exist_ok=True)
    for name, trace in (("wifi", wifi()), ("step-down", step_down())):
        rows = (f"{second:g},{rate:.0f}" for second, rate in zip(trace.seconds, trace.rates, strict=True))
        write_atomically(FOLDER / f"{name}.csv", "\n".join([",".join(HEADER), *rows]) + "\n")


if __name__ == "__main__":
    main()
