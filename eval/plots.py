"""Plots of what the verbs print. Needs no display."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from astra_jax.errors import AstraError
from eval.network import parse_rate


def accuracy_and_latency(rows: Sequence[dict[str, Any]], rates: Sequence[str], path: Path) -> None:
    """Two panels from the rows of `astra eval`: accuracy over bits per token and block, and predicted latency over
    the link's rate. One-device rows are horizontal lines. Raises AstraError if the file cannot be written."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    single = [row for row in rows if row["devices"] == 1]
    several = sorted((row for row in rows if row["devices"] > 1), key=lambda row: row["bits/token/block"])
    for row in single:
        left.axhline(row["accuracy %"], color="black", linestyle="--", label=f"{row['checkpoint']}, one device")
    if several:
        left.plot(
            [row["bits/token/block"] for row in several],
            [row["accuracy %"] for row in several],
            marker="o",
            label=f"ASTRA, {several[0]['devices']} devices",
        )
        left.set_xscale("log", base=2)
        bits = [row["bits/token/block"] for row in several]
        left.set_xticks(bits, [str(b) for b in bits])
    left.set_xlabel("bits per token and block")
    left.set_ylabel("accuracy (%)")
    left.legend()
    megabits = [parse_rate(rate) / 1e6 for rate in rates]
    for row in [*single, *several]:
        style = {"color": "black", "linestyle": "--"} if row["devices"] == 1 else {"marker": "o"}
        name = "one device" if row["devices"] == 1 else f"ASTRA, G={row['G']}"
        right.plot(megabits, [row[f"{rate} ms"] for rate in rates], label=name, **style)
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xticks(megabits, [f"{m:g}" for m in megabits])
    right.set_xlabel("link (Mbps)")
    right.set_ylabel("predicted latency of one image (ms)")
    right.legend()
    FigureCanvasAgg(figure)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise AstraError(f"cannot write the plot {path}: {error}") from error
