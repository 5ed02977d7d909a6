"""Which strategy, how many devices and which G to use for a link, or to stay on one device where that is faster.

    astra plan vit-base --devices 4 --rate 20mbit

Compared are one device, and 2 to --devices of them with ASTRA under every G, sequence parallelism (sp), and tensor
parallelism (tp) where it divides heads and MLP. bp-ag and bp-sp are not: they need a model that was trained for them.

Compute is operations over a speed: that of --device-profile, or what every strategy reaches here, measured for the most
devices and taken for fewer, too. The link takes one device's bits over its rate, as in `astra bench`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from astra_jax.cli.arguments import Integers, Numbers
from astra_jax.codecs.config import AstraConfig, Site, from_dict
from astra_jax.errors import AstraError
from astra_jax.report import Report, progress
from checkpoints.files import read_json
from eval.cost.cost import Cost, check_speeds, check_split, cost, fastest, share_flops
from eval.cost.device_profile import read_profile
from eval.cost.timing import compute_seconds
from eval.cost.workload import ONE, Setting, Workload, open_workload
from eval.network.model import (
    Counting,
    Link,
    break_even_rate,
    exchange_seconds,
    parse_rate,
    parse_seconds,
    pass_seconds,
    volume,
)
from eval.verbs.evaluate import METRICS

GAIN = 0.05  # several devices must save this share of the time of one, or else they are not worth it (our choice)
GROUPS = (1, 16, 32)  # G of astra where neither the user nor a file says it
SHOWN = 8  # rows of the table, one device not counted
REPEATS = 3  # of every measurement
LIMITS = {"perplexity": (1.0, 1e300), "accuracy %": (0.0, 100.0), "Spearman": (-1.0, 1.0)}  # what there can be
UNITS = {"perplexity": "%", "accuracy %": " points", "Spearman": " hundredths"}  # in which a budget counts


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of `astra plan`."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A checkpoint, or vit-base, vit-large, bert-base, gpt2-s, gpt2-m, llama-s, llama-3-8b."""
    rate: str
    """The link's rate, such as 20mbit."""
    devices: int = 4
    """How many devices there are; fewer may be used."""
    latency: str = "0ms"
    """What every exchange takes besides its bits, such as 2ms."""
    counting: Counting = "once"
    """Whether a device waits for the bits of one message, as in the paper, or for one from each of the others."""
    tokens: int | None = None
    """T; by default 1,024, or what the model takes."""
    groups: Integers = ()
    """G of astra; by default 1,16,32, or those in --accuracy."""
    device_profile: Path | None = None
    """Predict compute from the speed in this file, instead of measuring it here."""
    speeds: Numbers = ()
    """Relative speeds of the devices, such as 1,1,0.5,0.5: tokens are split in proportion; by default equal."""
    site: Site | None = None
    """What astra quantizes; by default what the checkpoint does, or hidden."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What is computed in."""
    accuracy: Path | None = None
    """What `astra eval ORIGINAL CHECKPOINT... --json FILE` wrote of this model. Costs are of the codes there; if MODEL
    has codes, they must be the same."""
    accuracy_budget: float | None = None
    """How much worse than the original it may be: points of accuracy, hundredths of correlation, or percent of
    perplexity. Only what --accuracy has within it is considered of astra."""
    json: Path | None = None
    """Also write everything printed to this file."""


@dataclasses.dataclass(frozen=True)
class Quality:
    """What a model reaches under ASTRA, as `astra eval` measured it.

    Attributes:
      metric: the column, of `eval.verbs.evaluate.METRICS`.
      original: what the original reaches on one device.
      reached: (N, G) -> what ASTRA reaches.
      codes: how the codes are made that reach it: what all rows have in common.
      others: how many rows were left out, as they are of other codes.
    """

    metric: str
    original: float
    reached: Mapping[tuple[int, int], float]
    codes: AstraConfig | None = None
    others: int = 0

    def loss(self, value: float) -> float:
        """How much worse than the original a value is: points of accuracy, hundredths of correlation, or percent of
        perplexity; below 0 for a better one."""
        if self.metric == "perplexity":
            return 100 * (value / self.original - 1)
        return (self.original - value) * (1 if self.metric == "accuracy %" else 100)

    def within(self, budget: float) -> set[tuple[int, int]]:
        """The (N, G) that lose at most this."""
        return {way for way, value in self.reached.items() if self.loss(value) <= budget}

    def of(self, setting: Setting) -> float | None:
        """What a setting reaches: of an exact strategy what the original does; None where that is not known."""
        return self.original if setting.groups is None else self.reached.get((setting.N, setting.groups))


def code(astra: AstraConfig) -> AstraConfig:
    """What a configuration says of codes whatever their number: that of the first group alone."""
    return astra.with_groups(1)


def code_name(astra: AstraConfig) -> str:
    """How a configuration's codes are made, in words."""
    parts = [astra.codec + f"+{astra.predictor}" * (astra.predictor != "none"), f"K={astra.codewords}"]
    parts += [f"site {astra.site}"] + [f"side info {astra.side_info}"] * (astra.side_info != "none")
    parts += [f"the first {astra.coded_blocks} blocks"] * (astra.coded_blocks is not None)
    parts += ["a single class token"] * (astra.class_token == "single")
    parts += [f"{width} axes in the first group" for width in astra.widths[:1]]
    return ", ".join(parts)


def read_quality(path: Path, planned: AstraConfig | None) -> Quality:
    """Reads what `astra eval --json` wrote of one kind of codes: what others reach would be paired with a cost that is
    not theirs. Of several checkpoints with the same N and G the best counts, and what is not finite counts as not
    measured.

    Args:
      path: the file.
      planned: the codes that are planned with; None to plan with those of the file.

    Raises:
      AstraError: the file is missing or is something else, there is no original, it has rows of several kinds of codes
        and none is planned with, or none of those that are; the message names file and fix.
    """
    data = read_json(path)
    rows = data.get("rows")
    if data.get("verb") != "eval" or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise AstraError(f"{path}: is not what `astra eval --json` wrote: give the file of such a run")
    metric = next((name for name in METRICS.values() if any(name in row for row in rows)), "")
    for number, row in enumerate(rows, 1):
        for column, kinds in (("N", (int,)), ("G", (int, type(None))), (metric, (int, float))):
            if column not in row:
                raise AstraError(
                    f"{path}: row {number} has no column {column or ' or '.join(METRICS.values())!r}: "
                    "give the file of a run of `astra eval --json`"
                )
            _check(row[column], column, kinds, f"{path}: row {number}")
    originals = [row[metric] for row in rows if row["N"] == 1]
    if not originals or not math.isfinite(originals[0]):
        raise AstraError(f"{path}: no row says what the original reaches on one device: give it to astra eval first")
    coded = [(row, _codes(path, row)) for row in rows if row["N"] > 1 and row["G"] is not None]
    chosen = _choose(path, [astra for _, astra in coded], planned) if coded else None
    quality = Quality(metric, float(originals[0]), {})
    reached: dict[tuple[int, int], float] = {}
    mine = [row for row, astra in coded if chosen and code(astra) == code(chosen)]
    for row in mine:
        if math.isfinite(row[metric]):
            way = row["N"], row["G"]
            reached[way] = min(float(row[metric]), reached.get(way, float(row[metric])), key=quality.loss)
    return dataclasses.replace(quality, reached=reached, codes=chosen, others=len(coded) - len(mine))


def _choose(path: Path, found: Sequence[AstraConfig], planned: AstraConfig | None) -> AstraConfig:
    """Those with the most groups of the codes that are planned with, or of the only kind that there is."""
    kinds = {code(astra): astra for astra in sorted(found, key=lambda astra: astra.groups)}
    if planned is None and len(kinds) == 1:
        return next(iter(kinds.values()))
    if planned is not None and code(planned) in kinds:
        return kinds[code(planned)]
    names = "; ".join(map(code_name, kinds))
    plans = f"codes are planned as {code_name(code(planned))}" if planned else "only one kind can be planned"
    raise AstraError(f"{path} is of codes made as {names}, and {plans}: plan for one of the checkpoints it is of")


def _codes(path: Path, row: Mapping[str, Any]) -> AstraConfig:
    """How the codes of a row are made. Raises AstraError where it does not say."""
    if not isinstance(row.get("astra"), dict):
        raise AstraError(f"{path}: does not say how its codes are made: run astra eval --json again")
    return from_dict(AstraConfig, row["astra"], str(path))


def _check(value: Any, column: str, kinds: tuple[Any, ...], where: str) -> None:
    """Raises AstraError for what a column cannot say; what is not finite was not measured, which it may."""
    if value is None and type(None) in kinds:
        return
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise AstraError(f"{where}: {column} is {value!r}; it must be a number: correct it")
    least, most = LIMITS.get(column, (1, 2**31))
    measured = not isinstance(value, float) or math.isfinite(value)
    if measured and not least <= value <= most:
        raise AstraError(f"{where}: {column} is {value!r}; it is from {least:g} to {most:g}: correct it")


def candidates(work: Workload, speeds: Sequence[float], groups: Sequence[int]) -> list[Setting]:
    """Every way to run a model on 2 or more devices of these speeds: the fewest first, so that they win among equals.

    Raises AstraError for what cannot be, but leaves out numbers of devices that tensor parallelism cannot use.
    """
    check_split(work, [Setting("sp", len(speeds))], speeds)
    ways = []
    for N in range(2, len(speeds) + 1):
        split = [Setting("astra", N, groups=G) for G in groups] + [Setting("sp", N)]
        check_split(work, split, speeds)
        ways += split + [way for way in [Setting("tp", N)] if possible(work, way)]
    return ways


def usual_groups(work: Workload) -> list[int]:
    """Those of `GROUPS` that divide what is quantized."""
    return [G for G in GROUPS if possible(work, Setting("astra", 1, groups=G))]


def possible(work: Workload, way: Setting) -> bool:
    """Whether a model can be run in this way."""
    try:
        check_split(work, [way], (1.0,) * way.N)
    except AstraError:
        return False
    return True


def measured_speeds(work: Workload, ways: Sequence[Setting]) -> dict[tuple[str, int | None], float]:
    """Operations per second that one device reaches here under every strategy and G, each with its most devices: small
    products are slower than large ones, and codes have to be found, so that one speed would not do for all."""
    most = {(way.strategy, way.groups): way for way in sorted(ways, key=lambda way: way.N)}
    weights, found = work.weights(), dict[tuple[str, int | None], float]()
    with progress("measured", len(most)) as advance:
        for kind, way in most.items():
            model = work.model(weights, way.groups)
            seconds = compute_seconds(model, way.N, work.inputs(), way.make, REPEATS, way.fast_path)
            found[kind] = share_flops(work, way) / seconds
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


def candidate(option: Option, single: Option, quality: Quality | None) -> dict[str, Any]:
    """A row of the table."""
    setting = option.cost.setting
    known = {quality.metric: quality.of(setting)} if quality else {}
    return {
        "strategy": setting.strategy,
        "N": setting.N,
        "G": setting.groups,
        "compute ms": 1e3 * max(option.cost.compute),
        "link ms": 1e3 * option.link_seconds,
        "total ms": 1e3 * option.seconds,
        "speed-up": single.seconds / option.seconds,
        **known,
    }


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
    value = quality.of(setting) if quality else None
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


def budget_note(quality: Quality, budget: float, devices: int) -> str:
    """What of ASTRA a budget leaves, and what not."""
    unit, known = UNITS[quality.metric], sorted(way for way in quality.reached if way[0] <= devices)
    left = [(N, G) for N, G in known if (N, G) in quality.within(budget)]
    good = ", ".join(f"G={G} on {N} devices" for N, G in left) or "nothing"
    bad = ", ".join(
        f"G={G} on {N} (loses {quality.loss(quality.reached[N, G]):.3g})" for N, G in known if (N, G) not in left
    )
    return (
        f"of astra, measured for these numbers of devices only, {good} is within {budget:g}{unit} of "
        f"{quality.metric} {quality.original:.4g}" + (f", and not {bad}" if bad else "")
    )


def check(args: Args) -> None:
    """Raises AstraError, before any work, for what cannot be."""
    if args.devices < 1:
        raise AstraError(f"--devices is {args.devices}; it must be at least 1: try 4")
    if args.accuracy_budget is not None:
        if args.accuracy is None:
            raise AstraError(
                "--accuracy-budget needs to know what is lost: give --accuracy FILE, which astra eval --json wrote"
            )
        if not 0 <= args.accuracy_budget < math.inf:
            raise AstraError(f"--accuracy-budget is {args.accuracy_budget:g}; it must be at least 0: try 1")


def main(args: Args) -> None:
    """Runs `astra plan`."""
    check(args)
    report = Report("plan", args.json)
    link = Link(parse_rate(args.rate), parse_seconds(args.latency), args.counting)
    speeds = check_speeds(args.speeds, args.devices)
    profile = read_profile(args.device_profile) if args.device_profile else None
    work = open_workload(args.model, args.tokens, args.site, args.dtype)
    quality = (
        read_quality(args.accuracy, work.astra if work.has_codes or args.site else None) if args.accuracy else None
    )
    known = tuple(sorted({G for _, G in quality.reached})) if quality else ()
    if quality and quality.codes:
        work = dataclasses.replace(work, astra=quality.codes)
        report.say(f"codes as in {args.accuracy}: {code_name(quality.codes)}", codes=dataclasses.asdict(quality.codes))
    if quality and quality.others:
        report.say(f"left out are {quality.others} row(s) of {args.accuracy}, of other codes", others=quality.others)
    groups = args.groups or known or usual_groups(work)
    ways = candidates(work, speeds, groups)
    if quality and args.accuracy_budget is not None:
        good = quality.within(args.accuracy_budget)
        ways = [way for way in ways if way.groups is None or (way.N, way.groups) in good]
        report.say(budget_note(quality, args.accuracy_budget, args.devices))
    if profile:
        reached = {(way.strategy, way.groups): profile.flops_per_second for way in (ONE, *ways)}
    else:
        reached = measured_speeds(work, [ONE, *ways])

    def option(way: Setting) -> Option:
        mine, flops_per_second = fastest(speeds, way.N), reached[way.strategy, way.groups]
        return Option(cost(work, way, mine, flops_per_second), link, len(set(speeds)) > 1 and args.devices > way.N)

    with progress("ways to run it", len(ways)) as advance:
        single, several = option(ONE), []
        for way in ways:
            several.append(option(way))
            advance(way=str(several[-1]))
    chosen = choose(single, several)
    ranked = sorted([single, *several], key=lambda found: found.seconds)
    rows = [candidate(found, single, quality) for found in ranked]
    shown = [row for place, row in enumerate(rows) if place < SHOWN or row["strategy"] == "single"]
    where = profile.name if profile else "this machine"
    title = f"{args.model}: {work.T:,} tokens, {work.dtype}, {args.rate}, compute as on {where}"
    report.table("candidates", title, shown)
    report.data["candidates"] = rows
    why = reason(single, several, quality)
    report.say(
        f"{why}.",
        choice={"strategy": chosen.cost.setting.strategy, "N": chosen.N, "groups": chosen.cost.setting.groups},
        seconds=chosen.seconds,
        single_seconds=single.seconds,
        reason=why,
    )
    report.close()
