"""Model families: the classes of transformers that are read, and what the usual sizes of each send.

    make models

Everything is counted from shapes: no weights are needed, and the tables are the same on every machine.
"""

import dataclasses
import sys
from pathlib import Path

from astra_jax.cli.arguments import parse
from astra_jax.cli.main import guarded
from astra_jax.mesh.sharding import make_mesh
from astra_jax.report import Report, progress
from checkpoints.info import parameters
from checkpoints.tensor_maps import FAMILIES
from eval.cost.presets import PRESETS
from eval.cost.workload import Setting, open_workload
from eval.reports.tables import Rows, insert, markdown

N, T = 4, 1024
WAYS = (Setting("astra", N, groups=1), Setting("astra", N, groups=32), Setting("sp", N))


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of the tables."""

    markdown: Path | None = None
    """Also put the tables into this file, between its marks."""
    json: Path | None = None
    """Also write everything printed to this file."""


# What models of a task give.
GIVES = {
    "causal-lm": "text that goes on",
    "classification": "classes",
    None: "classes",
    "embedding": "embeddings of texts",
    "image-embedding": "embeddings of pictures",
}


def classes() -> Rows:
    """The classes of every family, and what they give."""
    rows: Rows = []
    for name, family in FAMILIES.items():
        for gives in dict.fromkeys(GIVES[known.task] for known in family.architectures.values()):
            found = [one for one, known in family.architectures.items() if GIVES[known.task] == gives]
            rows.append({"model_type": f"`{name}`", "gives": gives, "classes": ", ".join(f"`{one}`" for one in found)})
    return rows


def sent(name: str) -> dict[str, object]:
    """What one of 4 devices sends of a known architecture in a pass of 1,024 tokens."""
    work = open_workload(name, T, None, "bfloat16")
    model = work.abstract(1)
    windows = model.blocks.attention.windows or ()
    row: dict[str, object] = {
        "model": name,
        "parameters": f"{parameters(work.abstract(None)) / 1e6:,.0f} M",
        "blocks": work.config.num_hidden_layers,
        "with a window": sum(window is not None and window < T for window in windows) or None,
    }
    for way in WAYS:
        model = work.abstract(way.groups)
        bits = sum(m.bits * m.times for m in way.make(model, N, work.inputs()).messages(model))
        row[f"{way} kB"] = f"{bits / 8e3:,.1f}"
    return row


def main(args: Args) -> None:
    """Prints the tables."""
    report = Report("models", args.json)
    make_mesh(N, to_run=False)  # before JAX starts, so that it makes enough CPU devices
    with progress("models", len(PRESETS)) as advance:
        rows = []
        for name in PRESETS:
            rows.append(sent(name))
            advance()
    tables = {"classes": classes(), "sent": rows}
    report.table("classes", "classes of transformers that are read", tables["classes"])
    report.table("sent", f"what a device sends, {T:,} tokens on {N} devices, bfloat16", tables["sent"])
    if args.markdown:
        for name, table in tables.items():
            insert(args.markdown, name, markdown(table), "make models")
        report.say(f"tables: {args.markdown}")
    report.close()


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(parse(Args, description=__doc__))))
