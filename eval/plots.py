"""Plots of what the verbs print. Needs no display."""

import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from astra_jax.errors import AstraError
from astra_jax.files import check_output, write_output
from eval.network.model import parse_rate


def check_plot(path: Path) -> None:
    """Raises AstraError, before any work, if a plot cannot be written there."""
    if path.suffix not in (".png", ".svg"):
        raise AstraError(f"--plot {path}: write a .png or a .svg file")
    check_output("--plot", path)


def _save(figure: Figure, path: Path) -> None:
    content = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(content, dpi=110, format=path.suffix.removeprefix("."))
    write_output(path, content.getvalue())


def metric_and_latency(
    rows: Sequence[dict[str, Any]], metric: str, what: str, rates: Sequence[str], path: Path
) -> None:
    """Two panels from the rows of `astra eval`: a metric over bits per token and block, and predicted latency over the
    link's rate. What has no bits per token, such as one device, is a horizontal line; rows without latency have none.

    Args:
      metric: the column of the left panel, which is also its label. Where there is a column of its standard deviation,
        that is drawn as error bars.
      what: what the latency is that of, such as `image`.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    exact = [row for row in rows if row["bits"] is None]
    coded = sorted((row for row in rows if row["bits"] is not None), key=lambda row: row["bits"])
    for row in exact:
        left.axhline(row[metric], color="black", linestyle="--", label=f"{row['checkpoint']}, {_how(row)}")
    if coded:
        bits = [row["bits"] for row in coded]
        spread = [row.get(f"{metric} sd") or 0.0 for row in coded]
        label = f"ASTRA, {coded[0]['N']} devices"
        left.errorbar(bits, [row[metric] for row in coded], spread, marker="o", capsize=3, label=label)
        left.set_xscale("log", base=2)
        left.set_xticks(bits, [str(b) for b in bits])
    left.set_xlabel("bits per token and block")
    left.set_ylabel(metric)
    left.legend()
    megabits = [parse_rate(rate) / 1e6 for rate in rates]
    for row in [*exact, *coded]:
        if row["compute ms"] is None:
            continue
        style = {"color": "black", "linestyle": "--"} if row["N"] == 1 else {"marker": "o"}
        name = f"ASTRA, G={row['G']}" if row["G"] else _how(row)
        right.plot(megabits, [row[rate] for rate in rates], label=name, **style)
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xticks(megabits, [f"{m:g}" for m in megabits])
    right.set_xlabel("link (Mbps)")
    right.set_ylabel(f"predicted latency of one {what} (ms)")
    if right.lines:
        right.legend(loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, path)


def speed_up(cells: Sequence[dict[str, Any]], rates: Sequence[str], path: Path) -> None:
    """Speed-up over one device at every rate of the link, one line per strategy, from the cells of `astra bench`."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1.0, color="black", linestyle="--", label="one device")
    megabits = [parse_rate(rate) / 1e6 for rate in rates]
    for name in dict.fromkeys(cell["strategy"] for cell in cells if cell["N"] > 1):
        found = {cell["rate"]: cell["speed-up"] for cell in cells if cell["strategy"] == name}
        axes.plot(megabits, [found[rate] for rate in rates], marker="o", label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(megabits, [f"{m:g}" for m in megabits])
    axes.minorticks_off()
    ticks = [
        t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 3, 4, 8) if axes.get_ylim()[0] <= t <= axes.get_ylim()[1]
    ]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_xlabel("link (Mbps)")
    axes.set_ylabel("times faster than one device")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, path)


def measured_and_predicted(rows: Sequence[dict[str, Any]], rates: Sequence[str], path: Path) -> None:
    """Latency at every rate of the link, one colour per strategy, from the rows of `make lab`: points with their spread
    are measured, dashed lines predicted."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    megabits = [parse_rate(rate) / 1e6 for rate in rates]
    for number, name in enumerate(dict.fromkeys(row["strategy"] for row in rows)):
        found = {row["rate"]: row for row in rows if row["strategy"] == name}
        measured, least, most, predicted = (
            np.array([found[rate][f"{column} s"] for rate in rates])
            for column in ("measured", "least", "most", "predicted")
        )
        spread = (measured - least, most - measured)
        axes.errorbar(megabits, measured, spread, fmt="o", capsize=3, color=f"C{number}", label=name)
        axes.plot(megabits, predicted, linestyle="--", color=f"C{number}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(megabits, [f"{m:g}" for m in megabits])
    axes.minorticks_off()
    axes.set_xlabel("link (Mbps)")
    axes.set_ylabel("latency (s): measured, and predicted (dashed)")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, path)


def changing_rates(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Two panels over the requests of `make network` while the rate of links changes: seconds of each, beside the
    median at a steady rate, and packets of codes that were left out."""
    asked = [row for row in rows if row["request"] is not None]
    steady = [row for row in rows if row["request"] is None]
    figure = Figure(figsize=(7, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    numbers = [row["request"] for row in asked]
    above.plot(numbers, [row["s"] for row in asked], marker=".")
    middle = float(np.median([row["s"] for row in steady]))
    above.axhline(middle, color="black", linestyle="--", label=f"median at a steady {steady[0]['rate']}")
    above.set_ylim(bottom=0)
    above.set_ylabel("time of the pass (s)")
    above.legend()
    below.plot(numbers, [row["left out"] for row in asked], marker=".")
    below.set_ylabel("packets left out, all hosts")
    below.set_xlabel("request")
    for row, before in zip(asked[1:], asked, strict=False):
        if row["rate"] != before["rate"]:
            for axes in (above, below):
                axes.axvline(row["request"] - 0.5, color="C3", linestyle=":")
            above.annotate(row["rate"], (row["request"], 0), color="C3")
    _save(figure, path)


def times_faster(groups: Sequence[tuple[str, Sequence[dict[str, Any]]]], path: Path) -> None:
    """A bar for every measured strategy: how many times faster than one device. From the tables of `make bench` that
    have this column, each with a label; one device itself is the line at 1."""
    found = [(f"{label}: {row['strategy']}", row) for label, rows in groups for row in rows]
    bars = [(name, row["times faster than one device"]) for name, row in found if "single" not in row["strategy"]]
    figure = Figure(figsize=(7, 0.8 + 0.35 * len(bars)), layout="constrained")
    axes = figure.subplots()
    names, values = zip(*bars, strict=True)
    drawn = axes.barh(range(len(bars)), values, color=["C0" if value >= 1 else "C3" for value in values])
    axes.bar_label(drawn, [f"{value:.3g}" for value in values], padding=3)
    axes.set_yticks(range(len(bars)), names)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linestyle="--")
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_xlabel("times faster than one device")
    _save(figure, path)


def quality_over_bits(rows: Sequence[dict[str, Any]], metrics: Sequence[str], path: Path) -> None:
    """A panel for every number of devices and metric over bits per token and block, from the rows of
    `train.recipes.accuracy_per_bit`: a line for every codec, which gives its colour, and way of making it; what has no
    codec is a horizontal line."""
    coded = [row for row in rows if row["codec"] is not None]
    codecs, made, Ns = (list(dict.fromkeys(row[column] for row in coded)) for column in ("codec", "made by", "N"))
    bits = sorted({row["bits"] for row in coded})
    figure = Figure(figsize=(7 * len(metrics), 4.5 * len(Ns)), layout="constrained")
    panels = figure.subplots(len(Ns), len(metrics), squeeze=False)
    for (N, metric), axes in zip(itertools.product(Ns, metrics), panels.flat, strict=True):
        here = [row for row in rows if row["N"] in (1, N)]
        for number, row in enumerate(row for row in here if row["codec"] is None):
            style = ("-", "--", ":", "-.")[number % 4]
            axes.axhline(row[metric], color="black", linewidth=1, linestyle=style, label=row["made by"])
        for codec, how in dict.fromkeys((row["codec"], row["made by"]) for row in coded):
            line = [row for row in here if (row["codec"], row["made by"]) == (codec, how)]
            line.sort(key=lambda row: row["bits"])
            axes.plot(
                [row["bits"] for row in line],
                [row[metric] for row in line],
                color=f"C{codecs.index(codec)}",
                linestyle=("--", "-", ":", "-.")[made.index(how) % 4],
                marker="os^D"[made.index(how) % 4],
                label=f"{codec}, {how}",
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(bits, [str(b) for b in bits])
        axes.minorticks_off()
        axes.set_xlabel("bits per token and block")
        axes.set_ylabel(metric)
        if len(Ns) > 1:
            axes.set_title(f"{N} devices")
    panels[0, -1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, path)


def remote_attention(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Time of attention to remote tokens over how many there are, from the rows of `make bench`."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    remote = [row["remote tokens"] for row in rows]
    axes.plot(remote, [row["plain ms"] for row in rows], marker="o", color="C3", label="plain")
    axes.plot(remote, [row["fast path ms"] for row in rows], marker="o", color="C0", label="fast path")
    axes.set_xticks(remote, [f"{R:,}" for R in remote])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("remote tokens")
    axes.set_ylabel(f"attention of {rows[0]['local tokens']:,} tokens to them, in one block (ms)")
    axes.legend()
    _save(figure, path)


def _how(row: dict[str, Any]) -> str:
    return "one device" if row["N"] == 1 else f"{row['strategy']}, {row['N']} devices"
