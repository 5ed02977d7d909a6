"""Which way to run a model takes least over a link, and a sentence that says so, for the verbs plan and net.

Several devices are advised where they save a share of `GAIN` of the time of one.
"""

import dataclasses
import math
from collections.abc import Sequence

from astra_jax.errors import AstraError
from astra_jax.report import progress
from eval.cost.cost import Cost, check_split, measured_flops_per_second
from eval.cost.workload import Setting, Workload
from eval.network.devices import Devices
from eval.network.model import Link, break_even_rate, exchange_seconds, pass_seconds, volume
from eval.quality.reached import Quality

GAIN = 0.05  # several devices must save this share of the time of one, or else they are not worth it (our choice)
GROUPS = (1, 16, 32)  # G of astra where neither the user nor a file says it
REPEATS = 3  # of every measurement


def candidates(work: Workload, devices: Devices, groups: Sequence[int]) -> list[Setting]:
    """Every way to run a model on 2 or more of these devices: the fewest first, so that they win among equals.

    Raises AstraError for what cannot be, but leaves out numbers of devices that tensor parallelism cannot use.
    """
    check_split(work, [Setting("sp", devices.N)], devices)
    ways = []
    for N in range(2, devices.N + 1):
        split = [Setting("astra", N, groups=G) for G in groups] + [Setting("sp", N)]
        check_split(work, split, devices)
        ways += split + [way for way in [Setting("tp", N)] if possible(work, way)]
    return ways


def usual_groups(work: Workload) -> list[int]:
    """Those of `GROUPS` that divide what is quantized."""
    return [G for G in GROUPS if possible(work, Setting("astra", 1, groups=G))]


def possible(work: Workload, way: Setting) -> bool:
    """Whether a model can be run in this way."""
    try:
        check_split(work, [way], Devices().of(way.N))
    except AstraError:
        return False
    return True


def reached_here(work: Workload, ways: Sequence[Setting]) -> dict[tuple[str, int | None], float]:
    """Operations per second that one device reaches here under every strategy and G, each with its most devices: small
    products are slower than large ones, and codes have to be found, so that one speed would not do for all."""
    most = {(way.strategy, way.groups): way for way in sorted(ways, key=lambda way: way.N)}
    weights, found = work.weights(), dict[tuple[str, int | None], float]()
    with progress("measured", len(most)) as advance:
        for kind, way in most.items():
            found[kind] = measured_flops_per_second(work, work.model(weights, way.groups), way, REPEATS)
            advance(strategy=str(way))
    return found


@dataclasses.dataclass(frozen=True)
class Option:
    """A way to run a model, over a link.

    Attributes:
      cost: what it costs whatever the link.
      link: what joins the devices.
      partial: whether there are more and slower devices than it uses.
    """

    cost: Cost
    link: Link
    partial: bool = False

    @property
    def N(self) -> int:
        """Devices."""
        return self.cost.setting.N

    @property
    def link_seconds(self) -> float:
        """Seconds of all exchanges of a forward pass."""
        return exchange_seconds(self.cost.messages, self.N, self.link)

    @property
    def seconds(self) -> float:
        """Seconds of a forward pass."""
        return pass_seconds(self.cost.compute, self.cost.messages, self.N, self.link)

    @property
    def waiting(self) -> tuple[int, float]:
        """Exchanges of a forward pass, and the seconds that all of them take besides their bits."""
        _, exchanges = volume(self.cost.messages, self.N, self.link.counting)
        return exchanges, exchanges * self.link.latency

    def pays_from(self, single: float) -> float | None:
        """The rate in bits per second from which on it saves a share of `GAIN` of the seconds of one device; None where
        no rate does."""
        limit = (1 - GAIN) * single
        return break_even_rate(
            limit, self.cost.compute, self.cost.messages, self.N, self.link.latency, self.link.counting
        )

    def __str__(self) -> str:
        setting = self.cost.setting
        how = setting.strategy + (f" with G={setting.groups}" if setting.groups else "")
        return f"{how} on {f'the {self.N} fastest' if self.partial else self.N} devices"


def choose(single: Option, several: Sequence[Option]) -> Option:
    """The fastest of several, if it saves a share of `GAIN` of the time of one device; else that."""
    best = min(several, key=lambda option: option.seconds, default=single)
    return best if best.seconds <= (1 - GAIN) * single.seconds else single


def reason(single: Option, several: Sequence[Option], quality: Quality | None = None) -> str:
    """What to do, and why, in one sentence.

    Args:
      single: one device.
      several: all other ways.
      quality: what is known of ASTRA's accuracy.
    """
    alone = f"stay on one device: it takes {milliseconds(single.seconds)}"
    if not several:
        return f"{alone}, and there is no other: try --devices 2"
    best = min(several, key=lambda option: option.seconds)
    if choose(single, several) is best:
        times = single.seconds / best.seconds
        return (
            f"use {best}: {milliseconds(best.seconds)} instead of {milliseconds(single.seconds)} on one "
            f"({times:.3g} times faster), of which {milliseconds(best.link_seconds)} are on the link"
            + accuracy(best.cost.setting, quality)
        )
    found = [(rate, option) for option in several if (rate := option.pays_from(single.seconds)) is not None]
    if not found:
        return f"{alone}, and no rate makes several devices faster, because {obstacle(several)}"
    rate, pays = min(found, key=lambda pair: pair[0])
    takes = f"saves less than {GAIN:.0%}:" if best.seconds < single.seconds else "takes"
    return (
        f"{alone}, and the best of several, {best}, {takes} {milliseconds(best.seconds)}, of which "
        f"{milliseconds(best.link_seconds)} are on the link; {'it' if pays is best else pays} pays from "
        f"{round_up(rate)} on"
    )


def obstacle(several: Sequence[Option]) -> str:
    """Why no rate is enough: what the fastest way would take on a link without limit."""
    best = min(several, key=lambda option: max(option.cost.compute) + option.waiting[1])
    exchanges, waiting = best.waiting
    computes = f"the least that they take, by {best}, is {milliseconds(max(best.cost.compute))} of computing"
    return f"{computes} and {milliseconds(waiting)} for the latency of {exchanges} exchanges" if waiting else computes


def accuracy(setting: Setting, quality: Quality | None) -> str:
    """What the sentence adds on the accuracy of a way to run a model; nothing for exact ones."""
    if setting.groups is None:
        return ""
    value = quality.of(setting.groups, setting.N) if quality else None
    if quality is None or value is None:
        return "; accuracy is not considered: check it with astra eval"
    return f", at {quality.metric} {value:.4g} instead of {quality.original:.4g}"


def milliseconds(seconds: float) -> str:
    """`0.0841` -> "84 ms"; below 10 ms with two digits."""
    ms = 1e3 * seconds
    return f"{ms:,.0f} ms" if ms >= 10 else f"{ms:.2g} ms"


def round_up(rate: float) -> str:
    """`34.56e6` -> "34.6mbit": what `parse_rate` reads, of three digits, not below the rate."""
    unit, size = next(((unit, size) for unit, size in (("gbit", 1e9), ("mbit", 1e6)) if rate >= size), ("kbit", 1e3))
    step = 10.0 ** (math.floor(math.log10(rate / size)) - 2)
    return f"{math.ceil(rate / size / step) * step:.10g}{unit}"
