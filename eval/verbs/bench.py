"""Every strategy on the same model and the same link: compute, bits, latency, and speed-up over one device.

    astra bench vit-base --devices 4 --tokens 1024 --strategies single,astra,sp,tp,bp-ag,bp-sp --groups 1,16,32
    astra bench vit-base --strategies astra --codecs vq,nested-pq,vq+linear --groups 1,4,16

MODEL is a checkpoint or a known architecture with random weights (vit-base, vit-large, bert-base, gpt2-s, gpt2-m,
llama-s, llama-3-8b): latency does not depend on their values. Of a language model it is the time to the first token.

What one device computes is measured here, or predicted by the speed in --device-profile. What it sends is predicted by
the strategy and read from the compiled program, and the two must agree. The link is the network model of
network/model.py: one device's bits over the rate, and nothing overlaps. Strategies bp-ag and bp-sp need a model
that was trained for them.

On several hosts whole passes are measured, too, and set beside the prediction for the first of the rates: with messages
counted each, as TCP sends them, and with what an exchange of hardly any bits takes between these hosts as its latency.
"""

import csv
import dataclasses
import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from astra_jax.cli.arguments import Integers, Texts
from astra_jax.codecs.config import Site
from astra_jax.errors import AstraError
from astra_jax.files import check_output, write_output
from astra_jax.hosts.agreement import contents, inputs, options
from astra_jax.hosts.distributed import Hosts, open_mesh
from astra_jax.mesh.sharding import make_mesh
from astra_jax.models.weight_quantization import Weights, quantize_weights, weight_bytes
from astra_jax.report import Report, progress
from eval import plots
from eval.cost.cost import Cost, check_split, cost, share_flops
from eval.cost.device_profile import DeviceProfile, read_profile, write_profile
from eval.cost.timing import alone, compute_seconds, exchange_latency, wall_seconds
from eval.cost.traffic import messages, pass_on_mesh
from eval.cost.workload import ONE, Setting, Workload, open_workload, settings
from eval.network.devices import Devices
from eval.network.model import Counting, Link, exchange_seconds, parse_rate, parse_seconds, pass_seconds
from eval.network.traces import Trace, read_trace, replay


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of `astra bench`."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A checkpoint, or vit-base, vit-large, bert-base, gpt2-s, gpt2-m, llama-s, llama-3-8b."""
    devices: int | None = None
    """N; by default 4, or one on each host."""
    several: Annotated[Hosts, tyro.conf.arg(name="several hosts as one mesh"), tyro.conf.OmitArgPrefixes] = Hosts()
    tokens: int | None = None
    """T; by default 1,024, or what the model takes."""
    strategies: Texts = ("single", "astra", "sp", "tp", "bp-ag", "bp-sp")
    """Which to compare; astra-plain, too, is astra without tables of keys and values (docs/performance.md)."""
    groups: Integers = (1, 16, 32)
    """G of astra, one after the other."""
    codecs: Texts = ()
    """Codecs of astra, one after the other, with random codebooks: vq, nested-pq, or with a predictor, such as
    vq+linear or nested-pq+mlp. By default what the checkpoint has, or vq."""
    exchanges: Integers = (1,)
    """Nb of bp-ag and bp-sp: exchanges over the whole network."""
    rates: Texts = ("10mbit", "20mbit", "50mbit", "100mbit", "200mbit", "500mbit")
    """Rates of the link."""
    latency: str = "0ms"
    """What every exchange takes besides its bits; the paper has none."""
    counting: Counting = "once"
    """Whether a device waits for the bits of one message, as in the paper, or for one from each of the others."""
    trace: str | None = None
    """Also replay a link whose rate changes: wifi, step-down, or a CSV file of seconds,bits_per_second."""
    device_profile: Path | None = None
    """Predict compute from the speed in this file, instead of measuring it here."""
    save_profile: Path | None = None
    """Measure this machine's speed on one device, and write it to this file."""
    unequal: Annotated[Devices, tyro.conf.arg(name="")] = Devices()
    site: Site | None = None
    """What astra quantizes; by default what the checkpoint does, or hidden."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What is computed in."""
    weights: Weights | None = None
    """Measure with the blocks' weights rounded to 8 or 4 bits; by default they stay in full precision."""
    repeats: int = 5
    """How often each measurement is repeated; the median counts."""
    plot: Path | None = None
    """Draw the speed-up over the link's rate into this file (PNG or SVG)."""
    csv: Path | None = None
    """Write a line for every strategy and rate to this file."""
    json: Path | None = None
    """Also write everything printed to this file."""


def summary(found: Cost, L: int) -> dict[str, Any]:
    """A row of the table of what strategies cost."""
    in_blocks = sum(m.bits * m.times for m in found.messages if m.in_blocks)
    return {
        "strategy": str(found.setting),
        "N": found.setting.N,
        "GFLOP": max(found.flops) / 1e9,
        "compute ms": 1e3 * max(found.compute),
        "messages": sum(m.times for m in found.messages),
        "kbit per block": in_blocks / L / 1e3,
        "kbit in total": found.bits / 1e3,
    }


def cells(costs: Sequence[Cost], single: Cost, rates: Sequence[str], latency: float, counting: Counting) -> list[dict]:
    """Every strategy at every rate: time of compute, of the link and in total, speed-up, and the link's share."""
    rows = []
    for found in costs:
        for rate in rates:
            link, N = Link(parse_rate(rate), latency, counting), found.setting.N
            total = pass_seconds(found.compute, found.messages, N, link)
            on_link = exchange_seconds(found.messages, N, link)
            rows.append(
                {
                    "strategy": str(found.setting),
                    "N": N,
                    "rate": rate,
                    "compute ms": 1e3 * max(found.compute),
                    "kbit in total": found.bits / 1e3,
                    "link ms": 1e3 * on_link,
                    "total ms": 1e3 * total,
                    "speed-up": max(single.compute) / total,
                    "link %": 100 * on_link / total,
                }
            )
    return rows


def pivot(rows: Sequence[dict[str, Any]], column: str) -> list[dict[str, Any]]:
    """One row per strategy with one column of the cells, a rate beside the other."""
    table: dict[str, dict[str, Any]] = {}
    for row in rows:
        table.setdefault(row["strategy"], {"strategy": row["strategy"]})[row["rate"]] = row[column]
    return list(table.values())


def replayed(costs: Sequence[Cost], L: int, trace: Trace, latency: float, counting: Counting) -> list[dict[str, Any]]:
    """Requests one after the other over one turn of a trace: how many, and their latencies."""
    rows = []
    for found in costs:
        N, compute = found.setting.N, max(found.compute)
        ms = 1e3 * replay(compute, found.messages, N, L, trace, trace.edges[-1], latency, counting)
        quantiles = np.quantile(ms, [0.5, 0.95, 1.0])
        names = ("median ms", "95 % ms", "worst ms")
        rows.append(
            {"strategy": str(found.setting), "requests": len(ms), "mean ms": float(ms.mean())}
            | dict(zip(names, map(float, quantiles), strict=True))
        )
    return rows


def measured_seconds(work: Workload, model: Any, way: Setting, repeats: int) -> list[list[float]]:
    """Wall-clock seconds of one device's share, on every host by itself, and of whole passes, until the answer is here.

    The two take turns, and the hosts begin each one together, so that both meet the same machine. A pass of one device
    is its share once more, on every host at once: how well the two agree is how sure a measurement is.
    """
    mine = whole = alone(model, way.N, work.inputs(), way.make)
    if way.N > 1:
        run, state = pass_on_mesh(model, make_mesh(way.N), way.make)
        whole = partial(run, state, jax.tree.map(np.asarray, work.inputs()))
    return wall_seconds([mine, whole], repeats, lambda: multihost_utils.sync_global_devices(str(way)))


def on_link(found: Cost, walls: Sequence[float], link: Link) -> dict[str, Any]:
    """A row of measured passes: median, least and most of them, and what the network model says for this link."""
    predicted, measured = pass_seconds(found.compute, found.messages, found.setting.N, link), float(np.median(walls))
    return {
        "strategy": str(found.setting),
        "compute ms": 1e3 * max(found.compute),
        "predicted ms": 1e3 * predicted,
        "measured ms": 1e3 * measured,
        "least ms": 1e3 * min(walls),
        "most ms": 1e3 * max(walls),
        "measured / predicted": measured / predicted,
    }


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes rows with the same keys as a table with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_output(path, text.getvalue())


def check(args: Args) -> None:
    """Raises AstraError, before any work, for what cannot be."""
    if args.devices is not None and args.devices < 1:
        raise AstraError(f"--devices is {args.devices}; it must be at least 1: try 4")
    if args.repeats < 1:
        raise AstraError(f"--repeats is {args.repeats}; it must be at least 1: try 5")
    if args.device_profile and args.weights:
        raise AstraError("--device-profile predicts, and does not know what --weights change: leave one of them out")
    if args.device_profile and args.save_profile:
        raise AstraError("--save-profile measures this machine, and --device-profile is not to: give one of them")
    for option, path in (("--csv", args.csv), ("--save-profile", args.save_profile)):
        if path is not None:
            check_output(option, path)
    if args.plot:
        plots.check_plot(args.plot)


def brought(args: Args, work: Workload, profile: DeviceProfile | None, trace: Trace | None) -> dict[str, str]:
    """What has to be the same on all hosts; of files it is what is in them."""
    named = contents([work.checkpoint]) if work.checkpoint else {"MODEL": work.name}
    return options(args) | named | inputs("device profile", [repr(profile)]) | inputs("trace", [repr(trace)])


def measured(
    args: Args,
    work: Workload,
    weights: Any,
    ways: Sequence[Setting],
    devices: Devices,
    profile: DeviceProfile | None,
    mesh: Mesh,
) -> tuple[dict[Setting, Cost], dict[Setting, list[float]], dict[Setting, float]]:
    """What every way costs; on several hosts the seconds of its whole passes; and the operations per second of one
    device of speed 1 in it.

    Args:
      weights: of the model; None with a profile, which says the speed of all ways.

    Raises:
      AstraError: a strategy sends something else than it says.
    """
    costs, walls, speed = dict[Setting, Cost](), dict[Setting, list[float]](), dict[Setting, float]()
    with progress("strategies", len(ways)) as advance:
        for way in ways:
            coded = work.of(way)
            messages(coded.abstract(way.groups), way.N, coded.inputs(), way.make)  # are as predicted
            if profile:
                speed[way] = profile.flops_per_second
            else:
                model = coded.model(weights, way.groups)
                model = quantize_weights(model, args.weights) if args.weights else model
                if mesh.is_multi_process:
                    mine, walls[way] = measured_seconds(coded, model, way, args.repeats)
                    seconds = float(np.median(mine))
                else:
                    seconds = compute_seconds(model, way.N, coded.inputs(), way.make, args.repeats)
                speed[way] = share_flops(coded, way) / seconds
            costs[way] = cost(coded, way, devices.fastest(way.N), speed[way])
            advance(strategy=str(way))
    return costs, walls, speed


def main(args: Args) -> None:
    """Runs `astra bench`."""
    check(args)
    report = Report("bench", args.json)
    rates = args.rates
    for rate in rates:
        parse_rate(rate)
    N = args.devices or args.several.devices(4)
    latency, devices = parse_seconds(args.latency), args.unequal.of(N)
    trace = read_trace(args.trace) if args.trace else None
    profile = read_profile(args.device_profile) if args.device_profile else None
    ways = settings(args.strategies, N, args.groups, args.exchanges, args.codecs)
    work = open_workload(args.model, args.tokens, args.site, args.dtype)
    # Before JAX starts, so that it makes enough CPU devices. On one host only shares are run.
    mesh = open_mesh(str(N), args.several, to_run=False, same=lambda: brought(args, work, profile, trace))
    for way in ways:
        check_split(work.of(way), [way], devices)
    L = work.config.num_hidden_layers
    weights = None if profile else work.weights()
    if args.weights:
        bare = work.model(weights, None)
        full, rounded = (weight_bytes(model) / 1e6 for model in (bare, quantize_weights(bare, args.weights)))
        report.say(f"the weights take {rounded:,.1f} MB instead of {full:,.1f}", weight_mb=rounded, full_weight_mb=full)
    costs, walls, speed = measured(args, work, weights, list(dict.fromkeys([ONE, *ways])), devices, profile, mesh)
    single, shown = costs[ONE], [costs[way] for way in ways]
    where = f"{profile.name}" if profile else "this machine"
    precision = f"{work.dtype}{f' with {args.weights} weights' if args.weights else ''}"
    title = f"{args.model}: {work.T:,} tokens, {precision}, compute of one device on {where}"
    report.table("costs", title, [summary(found, L) for found in shown])
    rows = cells(shown, single, rates, latency, args.counting)
    report.table("total_ms", "latency in ms", pivot(rows, "total ms"))
    report.table("speed_up", "times faster than one device", pivot(rows, "speed-up"))
    report.table("link_percent", "share of the link in %", pivot(rows, "link %"))
    report.data["cells"] = rows
    if walls:
        # Hosts tell each other one by one (gloo's rings), and to wake up and begin to talk costs them time.
        link = Link(parse_rate(rates[0]), exchange_latency(mesh), "each")
        passes = [on_link(costs[way], walls[way], link) for way in ways]
        report.table("measured", f"a pass on {N} hosts: measured, and predicted for {rates[0]}", passes)
        report.say(
            f"predicted: compute + {1e3 * link.latency:.3g} ms per exchange, as one of 4 bytes takes, + bits / rate, "
            "messages counted each",
            exchange_ms=1e3 * link.latency,
        )
    if trace:
        report.table("trace", f"link {args.trace}", replayed(shown, L, trace, latency, args.counting))
    report.say(
        "compute: the slowest device; kbit: what one device gives to collectives, predicted and compiled the same;\n"
        f"latency: compute + {args.latency} per exchange + bits / rate, messages counted {args.counting}"
    )
    if args.save_profile:
        profile = DeviceProfile(args.save_profile.stem, speed[ONE])
        write_profile(args.save_profile, profile)
        report.say(
            f"profile: {args.save_profile}, {profile.flops_per_second / 1e9:,.1f} GFLOP per second",
            flops_per_second=profile.flops_per_second,
        )
    if args.csv:
        write_csv(args.csv, rows)
        report.say(f"csv: {args.csv}", csv=str(args.csv))
    if args.plot:
        plots.speed_up(rows, rates, args.plot)
        report.say(f"plot: {args.plot}", plot=str(args.plot))
    report.close()
