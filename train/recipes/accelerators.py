"""What finetunings take on TPU chips: makes the table of docs/accelerators.md.

    make accelerators

Each row is a command, `python -m train.fits ...`, which compiles a step for chips that need not be here: some minutes.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from astra_jax.cli.arguments import parse
from astra_jax.cli.main import guarded
from astra_jax.report import Report, progress
from eval.reports.results import Commands
from eval.reports.tables import insert, markdown

COMMAND, NAME = "make accelerators", "memory"
SHOWN = ("arguments GB", "working GB", "all GB", "there GB")
CASES = (
    "gpt2-m --on v6e-1 --batch-size 16 --dtype bfloat16 --remat block",
    "llama-3-8b --site kv --on v5e-4 --batch-size 8 --dtype bfloat16 --trains codebooks",
    "llama-3-8b --site kv --on v6e-4 --batch-size 8 --dtype bfloat16 --trains lora --remat block",
    "llama-3-8b --site kv --on v6e-8 --batch-size 8 --dtype bfloat16 --remat block",
)


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of the recipe."""

    markdown: Path | None = None
    """Also put the table into this file, between its marks."""
    json: Path | None = None
    """Also write everything printed to this file."""


def run(words: str) -> dict[str, Any]:
    """A row, and the command that made it. Raises AstraError where it failed."""
    (row,) = Commands()(words, "python -m train.fits")["rows"]
    return {"`python -m train.fits`": f"`{words}`", **{name: row[name] for name in SHOWN}}


def main(args: Args) -> None:
    """Runs the recipe."""
    report, rows = Report("accelerators", args.json), []
    with progress("compiling", len(CASES)) as advance:
        for words in CASES:
            rows.append(run(words))
            advance()
    report.table("rows", "a step of finetuning, per chip", rows)
    if args.markdown:
        insert(args.markdown, NAME, markdown(rows), COMMAND)
    report.close()


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(parse(Args, description=__doc__))))
