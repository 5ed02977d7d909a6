"""Small experiments with the commands that make them: what every strategy costs, lost packets, unequal devices, weights
of few bits, and Llama-3-8B from shapes.

    make results

Runs the commands of docs/results.md, each as a process, and writes what they find into it. The checkpoints are those of
`make demo`. Times are of a machine that does nothing else; it takes a quarter of an hour.
"""

import dataclasses
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from astra_jax.cli.arguments import parse
from astra_jax.cli.main import guarded
from astra_jax.errors import AstraError
from astra_jax.files import write_atomically
from astra_jax.report import Report, progress
from eval.reports.tables import Rows, insert, markdown

DEMO = "demo/original demo/astra-G1 demo/astra-G8 demo/astra-G32 --data demo/digits"
RATES = "10mbit,20mbit,50mbit,100mbit,200mbit,500mbit"
BENCH = f"bench vit-base --devices 4 --strategies single,astra,sp,tp,bp-ag,bp-sp --groups 1,16,32 --rates {RATES}"
TERA = {"name": "tera", "flops_per_second": 1e12}


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of the report."""

    markdown: Path | None = None
    """Also put the tables into this file, between its marks."""
    sections: tuple[str, ...] = ()
    """Only these sections; by default all."""


class Commands:
    """Runs commands of `astra`, and keeps their lines for the page."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, words: str, program: str = "astra") -> dict[str, Any]:
        """What a command wrote with --json. Raises AstraError where it failed."""
        self.lines.append(f"{program} {words}")
        module = "astra_jax.cli.main" if program == "astra" else program.split()[-1]
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "out.json")
            call = [sys.executable, "-m", module, *shlex.split(words), "--json", str(out)]
            ended = subprocess.run(call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            if ended.returncode:
                raise AstraError(f"`{self.lines[-1]}` failed: {ended.stderr.strip()}")
            return dict(json.loads(out.read_text(encoding="utf8")))


def chosen(rows: Rows, *columns: str, **first: Any) -> Rows:
    """Some columns of rows, those that there are, behind others that are the same in all."""
    return [first | {column: row[column] for column in columns if column in row} for row in rows]


def strategies(astra: Commands) -> Rows:
    found = astra(BENCH)
    costs = chosen(found["costs"], "strategy", "GFLOP", "compute ms", "kbit per block", "kbit in total")
    return [cost | speed_up for cost, speed_up in zip(costs, found["speed_up"], strict=True)]


def traces(astra: Commands) -> Rows:
    command = "bench vit-base --devices 4 --strategies single,astra,sp --groups 1,16,32 --rates 10mbit --trace {}"
    columns = ("strategy", "requests", "mean ms", "95 % ms", "worst ms")
    return [
        row
        for trace in ("wifi", "step-down")
        for row in chosen(astra(command.format(trace))["trace"], *columns, link=trace)
    ]


def lost_packets(astra: Commands) -> Rows:
    losses = {"none": "0", "5 %": "0.05", "5 %, in bursts": "0.05 --burst 8", "20 %": "0.2"}
    columns = ("checkpoint", "N", "G", "accuracy %", "accuracy % sd")
    return [
        row
        for loss, words in losses.items()
        for row in chosen(astra(f"eval {DEMO} --packet-loss {words}")["rows"], *columns, lost=loss)
        if row["N"] > 1
    ]


def unequal(astra: Commands) -> Rows:
    command = "bench vit-base --strategies single,astra --groups 1 --rates 10mbit --device-profile build/tera.json"
    write_atomically(Path("build/tera.json"), json.dumps(TERA))
    astra.lines.append(f"echo '{json.dumps(TERA)}' > build/tera.json")
    ways = {"1,1,1,1": "all of speed 1", "1,1,0.5,0.5": "in proportion to speed"}
    return [
        row
        for speeds, name in ways.items()
        for row in chosen(astra(f"{command} --speeds {speeds}")["costs"], "strategy", "GFLOP", "compute ms", split=name)
    ]


def weights(astra: Commands) -> Rows:
    columns = ("checkpoint", "G", "accuracy %", "weight MB")
    return [
        row
        for kind in (None, "int8", "int4")
        for row in chosen(
            astra(f"eval {DEMO}" + (f" --weights {kind}" if kind else ""))["rows"], *columns, weights=kind or "float32"
        )
    ]


def weights_time(astra: Commands) -> Rows:
    command = "bench vit-base --strategies single,astra --groups 1 --rates 10mbit"
    return [
        row
        for kind in (None, "int8", "int4")
        for row in chosen(
            astra(command + (f" --weights {kind}" if kind else ""))["costs"],
            *("strategy", "compute ms"),
            weights=kind or "float32",
        )
    ]


def llama(astra: Commands) -> Rows:
    return list(astra("", "python -m eval.cost.ahead_of_time")["rows"])


SECTIONS: dict[str, tuple[str, Callable[[Commands], Rows]]] = {
    "strategies": ("ViT-Base, 1,024 tokens: what strategies cost, and times faster than one device", strategies),
    "traces": ("ViT-Base on links with changing rates", traces),
    "lost packets": ("digits, packets lost", lost_packets),
    "unequal": ("ViT-Base on unequal devices", unequal),
    "weights": ("digits, weights of 8 and 4 bits", weights),
    "weights' time": ("ViT-Base, weights of 8 and 4 bits", weights_time),
    "llama": ("Llama-3-8B from shapes", llama),
}


def main(args: Args) -> None:
    """Runs the commands, and prints and writes the tables."""
    if unknown := set(args.sections) - set(SECTIONS):
        raise AstraError(f"--sections {', '.join(sorted(unknown))}: there are {', '.join(SECTIONS)}")
    report = Report("results")
    with progress("sections", len(args.sections or SECTIONS)) as advance:
        for name in args.sections or SECTIONS:
            (title, measure), astra = SECTIONS[name], Commands()
            rows = measure(astra)
            report.table(name, title, rows)
            if args.markdown:
                commands = "\n".join(f"    {line}" for line in astra.lines)
                insert(args.markdown, name, f"{commands}\n\n{markdown(rows)}", "make results")
            advance(section=name)
    report.close()


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(parse(Args, description=__doc__))))
