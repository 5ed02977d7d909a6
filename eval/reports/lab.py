"""One device and four hosts on slow links: every strategy measured, beside what the network model says.

    make lab

Four hosts of the lab with a share of a core each run `astra bench` together, at one rate after the other;
what host 0 measured becomes the tables and the plot of docs/lab.md. What was measured of this code is kept in build/lab
and not measured anew: remove a file of it for that. Needs root, a machine with two cores that does nothing else, and
half an hour, most of it for tensor parallelism at 10 Mbps.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import checkpoints
from astra_jax.cli.arguments import Texts, parse
from astra_jax.cli.main import guarded
from astra_jax.errors import AstraError
from astra_jax.hosts.agreement import source
from astra_jax.report import Report
from eval import plots
from eval.network.lab import Lab
from eval.network.model import parse_rate
from eval.reports.tables import insert, markdown

HOSTS, CPU = 4, 0.4  # of a core each, which leaves a fifth of two cores to the links between them
STRATEGIES, GROUPS = "single,astra,sp,tp", "1,16,32"
AGREE = 0.2  # how far from the prediction a measurement may be


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of the report."""

    model: str = "vit-base"
    """What is run: a checkpoint, or a known architecture."""
    tokens: int = 1024
    """T."""
    rates: Texts = ("10mbit", "100mbit", "500mbit")
    """Rates of the hosts' links, one after the other."""
    repeats: int = 5
    """How often each pass is measured."""
    folder: Path = Path("build/lab")
    """Where measurements are kept."""
    markdown: Path | None = None
    """Also put the tables into this file, between its marks, and a plot beside it."""


def folder_of(folder: Path, model: str) -> Path:
    """Where measurements of this code are kept, and of a checkpoint as it is now: others are not taken for them.

    Raises:
      AstraError: `model` is a folder that is no checkpoint.
    """
    digest = checkpoints.read_meta(model).digest if Path(model).is_dir() else None
    return folder / (f"{source()}-{digest[:12]}" if digest else source())


def measurement(path: Path, hosts: int, cpu: float, rate: str, model: str, options: dict[str, Any]) -> dict[str, Any]:
    """What `astra bench` wrote on host 0 of a lab: now, or before.

    Args:
      path: where that is kept.
      hosts, cpu, rate: of the lab, see `eval.network.lab.Lab`; `rate` as text, such as 10mbit.
      model: what is benchmarked.
      options: of `astra bench`, by their names without dashes before them.

    Raises:
      AstraError: there can be no lab here, or a host failed.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {
            **options,
            "rates": rate,
            "coordinator": "{coordinator}",
            "hosts": "{hosts}",
            "host": "{host}",
            "json": path,
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        with Lab(hosts, parse_rate(rate), cpu) as lab:
            ended = lab.run([sys.executable, "-m", "astra_jax.cli.main", "bench", model, *words])
        if ended[0].code:
            raise AstraError(f"`astra bench` at {rate} ended with exit code {ended[0].code}: what it printed says why")
    return dict(json.loads(path.read_text()))


def rows_of(rate: str, measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the report from those that `astra bench` measured at a rate: in seconds, and over one device."""
    single = next(row["measured ms"] for row in measured if row["strategy"] == "single")
    return [
        {
            "rate": rate,
            "strategy": row["strategy"],
            "measured s": row["measured ms"] / 1e3,
            "least s": row["least ms"] / 1e3,
            "most s": row["most ms"] / 1e3,
            "predicted s": row["predicted ms"] / 1e3,
            "measured / predicted": row["measured / predicted"],
            "times faster than one device": single / row["measured ms"],
        }
        for row in measured
    ]


def agreement(rows: list[dict[str, Any]]) -> str:
    """A sentence on how many rows are as predicted, and which are not."""
    off = [row for row in rows if abs(row["measured / predicted"] - 1) > AGREE]
    named = ", ".join(f"{row['strategy']} at {row['rate']} ({row['measured / predicted']:.2f})" for row in off)
    within = f"{len(rows) - len(off)} of {len(rows)} measurements are within {AGREE:.0%} of the prediction"
    return f"{within}; not so {named}." if off else f"{within}."


def main(args: Args) -> None:
    """Measures, and prints and writes the tables."""
    report, folder = Report("lab_report"), folder_of(args.folder, args.model)
    options = {"tokens": args.tokens, "strategies": STRATEGIES, "groups": GROUPS, "repeats": args.repeats}
    name = f"{Path(args.model).name}-{args.tokens}-{{}}-{args.repeats}.json"
    found = {
        rate: measurement(folder / name.format(rate), HOSTS, CPU, rate, args.model, options) for rate in args.rates
    }
    rows = [row for rate, data in found.items() for row in rows_of(rate, data["measured"])]
    exchanges = [{"rate": rate, "an exchange of 4 bytes, ms": data["exchange_ms"]} for rate, data in found.items()]
    report.table("passes", f"{args.model}, {args.tokens:,} tokens, {HOSTS} hosts with {CPU} of a core each", rows)
    report.table("exchanges", "exchanges", exchanges)
    report.say(agreement(rows))
    if args.markdown:
        parts = {"passes": f"{markdown(rows)}\n\n{agreement(rows)}", "exchanges": markdown(exchanges)}
        for name, text in parts.items():
            insert(args.markdown, name, text, "make lab")
        plot = args.markdown.with_suffix(".png")
        plots.measured_and_predicted(rows, args.rates, plot)
        report.say(f"tables: {args.markdown}; plot: {plot}")
    report.close()


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(parse(Args, description=__doc__))))
