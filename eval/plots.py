"""Plots of what the verbs print. Needs no display."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from astra_jax.errors import AstraError
from eval.network import parse_rate


def check_plot(path: Path) -> None:
    """Raises AstraError, before any work, if a plot cannot be written there."""
    if path.suffix not in (".png", ".svg"):
        raise AstraError(f"--plot {path}: write a .png or a .svg file")
    if not path.parent.is_dir():
        raise AstraError(f"--plot {path}: the folder {path.parent} does not exist: create it first")


def metric_and_latency(
    rows: Sequence[dict[str, Any]], metric: str, what: str, rates: Sequence[str], path: Path
) -> None:
    """Two panels from the rows of `astra eval`: a metric over bits per token and block, and predicted latency over the
    link's rate. One-device rows are horizontal lines.

    Args:
      metric: the column of the left panel, which is also its label.
      what: what the latency is that of, such as `image`.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    single = [row for row in rows if row["N"] == 1]
    several = sorted((row for row in rows if row["N"] > 1), key=lambda row: row["bits"])
    for row in single:
        left.axhline(row[metric], color="black", linestyle="--", label=f"{row['checkpoint']}, one device")
    if several:
        bits = [row["bits"] for row in several]
        left.plot(bits, [row[metric] for row in several], marker="o", label=f"ASTRA, {several[0]['N']} devices")
        left.set_xscale("log", base=2)
        left.set_xticks(bits, [str(b) for b in bits])
    left.set_xlabel("bits per token and block")
    left.set_ylabel(metric)
    left.legend()
    megabits = [parse_rate(rate) / 1e6 for rate in rates]
    for row in [*single, *several]:
        style = {"color": "black", "linestyle": "--"} if row["N"] == 1 else {"marker": "o"}
        name = "one device" if row["N"] == 1 else f"ASTRA, G={row['G']}"
        right.plot(megabits, [row[rate] for rate in rates], label=name, **style)
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xticks(megabits, [f"{m:g}" for m in megabits])
    right.set_xlabel("link (Mbps)")
    right.set_ylabel(f"predicted latency of one {what} (ms)")
    right.legend(loc="upper left", bbox_to_anchor=(1, 1))
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)
