"""The paper's latency figures beside ours, from operations and bits counted in our programs, and one fitted number.

    make paper

The paper simulates its link and times its devices; what a device computes in a second is not published. It is found
here from one published ratio (ASTRA over sequence parallelism at 10 Mbps), and everything else is predicted. Nothing is
timed and no weights are needed, so that the tables are the same on every machine.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from astra_jax.cli.arguments import parse
from astra_jax.cli.main import guarded
from astra_jax.mesh.sharding import make_mesh
from astra_jax.report import Report
from eval.cost.cost import share_flops
from eval.cost.traffic import messages
from eval.cost.workload import Setting, Workload, open_workload
from eval.network.model import Link, exchange_seconds, parse_rate
from eval.reports.tables import insert, markdown

N, T = 4, 1024  # the paper's setting

ONE, SP, TP = Setting("single", 1), Setting("sp", N), Setting("tp", N)
BP = Setting("bp-ag", N, exchanges=1)
G1, G32 = Setting("astra", N, groups=1), Setting("astra", N, groups=32)

# What is compared, faster over slower; the rate; and what the paper is reported to say (arXiv 2505.19342).
FITTED = (G1, SP, "10mbit", 171.82)
PUBLISHED = (
    (G1, ONE, "10mbit", 2.64),
    (G1, BP, "10mbit", 15.25),
    (G1, ONE, "20mbit", 2.74),
    (G32, ONE, "20mbit", 1.27),
    (G1, TP, "10mbit", None),
    (G32, ONE, "500mbit", None),
)
# Seconds of the prefill of Llama-3-8B, 1,024 tokens on 4 devices: one device, and ASTRA with G=1 at two rates.
LLAMA_SINGLE = 4.578
LLAMA = ((G1, "10mbit", 1.563), (G1, "500mbit", 1.540))


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of the table."""

    markdown: Path | None = None
    """Also put the tables into this file, between its marks."""
    json: Path | None = None
    """Also write everything printed to this file."""


@dataclasses.dataclass(frozen=True)
class View:
    """What is counted of a pass.

    Attributes:
      name: of the column.
      encoding: whether finding codes counts; without it ASTRA computes what sequence parallelism does.
      class_state: whether the state that the head reads counts, which devices add up once after the last block.
      folded: whether keys and values of remote tokens come from tables instead of projections.
    """

    name: str
    encoding: bool
    class_state: bool
    folded: bool = False


PAPER = View("codes and attention alone", encoding=False, class_state=False)
FULL = View("all that we send and compute", encoding=True, class_state=True)
FOLDED = View("the same, remote K and V from tables", encoding=True, class_state=True, folded=True)


def plain(setting: Setting) -> Setting:
    """The setting in the plain form, which is the paper's."""
    return dataclasses.replace(setting, strategy="astra-plain") if setting.groups else setting


def remote_projection_flops(work: Workload) -> int:
    """Operations of projecting all remote tokens to keys and values: 4 R D J E per block, R = T - T/N tokens."""
    attention = work.abstract(None).blocks.attention
    width = attention.J * attention.E
    return 4 * (work.T - work.T // N) * work.config.hidden_size * width * work.config.num_hidden_layers


class Model:
    """Operations and bits of every setting of a workload, each counted once, and in the plain form: the paper's."""

    def __init__(self, work: Workload):
        self.work = work
        self._flops: dict[Setting, int] = {}
        self._messages: dict[Setting, list[Any]] = {}

    def flops(self, setting: Setting, view: View) -> int:
        """Operations of one device."""
        counted = SP if setting.groups and not view.encoding else plain(setting)
        if counted not in self._flops:
            self._flops[counted] = share_flops(self.work, counted)
        folded = remote_projection_flops(self.work) if view.folded and setting.groups else 0
        return self._flops[counted] - folded

    def link_seconds(self, setting: Setting, rate: str, view: View) -> float:
        """Seconds on the link, by the paper's convention."""
        if setting not in self._messages:
            model = self.work.abstract(setting.groups)
            self._messages[setting] = messages(model, setting.N, self.work.inputs(), plain(setting).make)
        counted = [m for m in self._messages[setting] if m.in_blocks or view.class_state]
        return exchange_seconds(counted, setting.N, Link(parse_rate(rate)))

    def seconds(self, setting: Setting, rate: str, view: View, flops_per_second: float) -> float:
        """Seconds of a pass."""
        return self.flops(setting, view) / flops_per_second + self.link_seconds(setting, rate, view)


def fit(model: Model, view: View = PAPER) -> float:
    """Operations per second of the paper's device: where sequence parallelism takes `ratio` times as long as ASTRA.

    `flops_sp / s + link_sp = ratio (flops_astra / s + link_astra)`, solved for s.
    """
    fast, slow, rate, ratio = FITTED
    spare = model.link_seconds(slow, rate, view) - ratio * model.link_seconds(fast, rate, view)
    return (ratio * model.flops(fast, view) - model.flops(slow, view)) / spare


def ratios(model: Model, flops_per_second: float) -> list[dict[str, Any]]:
    """How many times faster, published and in every view."""
    rows = []
    for fast, slow, rate, published in (FITTED, *PUBLISHED):
        found = {
            view.name: model.seconds(slow, rate, view, flops_per_second)
            / model.seconds(fast, rate, view, flops_per_second)
            for view in (PAPER, FULL, FOLDED)
        }
        off = f"{100 * (found[PAPER.name] / published - 1):+.1f} %" if published else "-"
        names = {"faster": str(fast), "than": str(slow), "rate": rate, "paper": published}
        rows.append({**names, PAPER.name: found.pop(PAPER.name), "off": off, **found})
    return rows


def llama() -> list[dict[str, Any]]:
    """Seconds of a Llama-3-8B prefill, published and ours, on a device that takes alone what is published."""
    rows = []
    for site in ("hidden", "kv"):
        model = Model(open_workload("llama-3-8b", T, site, "bfloat16"))
        speed = model.flops(ONE, FULL) / LLAMA_SINGLE
        for setting, rate, published in LLAMA:
            ours = model.seconds(setting, rate, FULL, speed)
            rows.append(
                {"strategy": str(setting), "site": site, "rate": rate, "paper s": published, "ours s": ours}
                | {"off": f"{100 * (ours / published - 1):+.1f} %"}
            )
    return rows


def main(args: Args) -> None:
    """Prints the tables."""
    report = Report("paper", args.json)
    make_mesh(N, to_run=False)  # before JAX starts, so that it makes enough CPU devices
    model = Model(open_workload("vit-base", T, None, "float32"))
    speed = fit(model)
    single = model.flops(ONE, PAPER) / speed
    tables = {
        "ratios": ratios(model, speed),
        "operations": [
            {
                "strategy": str(s),
                "GFLOP": model.flops(s, FULL) / 1e9,
                "one device / this": model.flops(ONE, FULL) / model.flops(s, FULL),
            }
            for s in (ONE, G1, G32, SP, TP, BP)
        ],
        "llama": llama(),
    }
    report.table("ratios", f"ViT-Base, {T:,} tokens, {N} devices: how many times faster", tables["ratios"])
    report.table("operations", "operations of one device, encoding included", tables["operations"])
    report.table("llama", "Llama-3-8B, prefill of 1,024 tokens: seconds", tables["llama"])
    report.say(
        f"fitted: {speed / 1e12:.3f} TFLOP per second, one device takes {1e3 * single:.1f} ms",
        flops_per_second=speed,
        single_seconds=single,
    )
    if args.markdown:
        for name, rows in tables.items():
            insert(args.markdown, name, markdown(rows), "make paper")
        report.say(f"tables: {args.markdown}")
    report.close()


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(parse(Args, description=__doc__))))
