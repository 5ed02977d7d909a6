"""Which strategy, how many devices and which G to use for a link, or to stay on one device where that is faster.

    astra plan vit-base --devices 4 --rate 20mbit

Compared are one device, and 2 to --devices of them with ASTRA under every G, sequence parallelism (sp), and tensor
parallelism (tp) where it divides heads and MLP. bp-ag and bp-sp are not: they need a model that was trained for them.

Compute is operations over a speed: that of --device-profile, or what every strategy reaches here, measured for the most
devices and taken for fewer, too. The link takes one device's bits over its rate, as in `astra bench`.
"""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from astra_jax.cli.arguments import Integers
from astra_jax.codecs.config import Site
from astra_jax.errors import AstraError
from astra_jax.report import Report, progress
from eval.cost.advice import Option, candidates, choose, reached_here, reason, usual_groups
from eval.cost.cost import cost
from eval.cost.device_profile import read_profile
from eval.cost.workload import ONE, Setting, open_workload
from eval.network.devices import Devices
from eval.network.model import Counting, Link, parse_rate, parse_seconds
from eval.quality.reached import Quality, read_quality

SHOWN = 8  # rows of the table, one device not counted
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
    unequal: Annotated[Devices, tyro.conf.arg(name="")] = Devices()
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


def candidate(option: Option, single: Option, quality: Quality | None) -> dict[str, Any]:
    """A row of the table."""
    setting = option.cost.setting
    known = {quality.metric: quality.of(setting.groups, setting.N)} if quality else {}
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


def budget_note(quality: Quality, budget: float, devices: int) -> str:
    """What of ASTRA a budget leaves, and what not."""
    unit, known = UNITS[quality.metric], sorted(way for way in quality.reached if way[0] <= devices)
    left = [(N, G) for N, G in known if (N, G) in quality.within(budget)]
    good = ", ".join(f"G={G} on {N} devices" for N, G in left) or "nothing"
    bad = ", ".join(
        f"G={G} on {N} (loses {quality.drop(quality.reached[N, G]):.3g})" for N, G in known if (N, G) not in left
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
    devices = args.unequal.of(args.devices)
    profile = read_profile(args.device_profile) if args.device_profile else None
    work = open_workload(args.model, args.tokens, args.site, args.dtype)
    quality = (
        read_quality(args.accuracy, work.astra if work.has_codes or args.site else None) if args.accuracy else None
    )
    known = tuple(sorted({G for _, G in quality.reached})) if quality else ()
    if quality and quality.codes:
        work = dataclasses.replace(work, astra=quality.codes)
        report.say(f"codes as in {args.accuracy}: {quality.codes.in_words()}", codes=quality.codes.as_dict())
    if quality and quality.others:
        report.say(f"left out are {quality.others} row(s) of {args.accuracy}, of other codes", others=quality.others)
    groups = args.groups or known or usual_groups(work)
    ways = candidates(work, devices, groups)
    if quality and args.accuracy_budget is not None:
        good = quality.within(args.accuracy_budget)
        ways = [way for way in ways if way.groups is None or (way.N, way.groups) in good]
        report.say(budget_note(quality, args.accuracy_budget, args.devices))
    if profile:
        reached = {(way.strategy, way.groups): profile.flops_per_second for way in (ONE, *ways)}
    else:
        reached = reached_here(work, [ONE, *ways])

    def option(way: Setting) -> Option:
        mine, flops_per_second = devices.fastest(way.N), reached[way.strategy, way.groups]
        return Option(cost(work, way, mine, flops_per_second), link, not devices.equal and devices.N > way.N)

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
