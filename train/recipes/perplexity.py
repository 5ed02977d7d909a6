"""The shape of the paper's Table 3 on a language model of your own: perplexity on one device, and as ASTRA for every G
and number of devices, calibrated only and finetuned.

    python -m train.recipes.perplexity ORIGINAL OUT --data train.txt --test test.txt other.txt

Every G is calibrated from the original, finetuned for all numbers of devices at once, and evaluated on virtual shards.
The control is the original itself, trained for as many steps on one device: finetuning is training, too. What OUT
already has is not run again, so an interrupted run goes on where it was.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from astra_jax.cli.arguments import Integers, parse
from astra_jax.cli.main import guarded
from astra_jax.codecs.config import Site
from astra_jax.report import Report, say
from eval.datasets.labelled import DataArgs
from eval.verbs import evaluate
from train import calibrate, finetune
from train.loop import Training
from train.recipes.resumable import calibrated, evaluated, finetuned, short_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(DataArgs):
    """Arguments of the recipe."""

    original: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ORIGINAL")]
    """A language model made by `astra convert`."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the checkpoints and the results."""
    test: tuple[str, ...]
    """Text files to evaluate on."""
    groups: Integers = (1, 16, 32)
    """G, one after the other."""
    site: Site = "hidden"
    """What is quantized."""
    devices: Integers = (4,)
    """N: devices to train for and to evaluate on."""
    steps: int = 300
    """Finetuning steps of every G."""
    batch_size: int = 16
    """Sequences per batch."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    length: int | None = None
    """Tokens of a sequence; by default what the model takes, but at most 512."""
    stride: int | None = None
    """Tokens by which the windows of the evaluation move on; by default half their length."""
    json: Path | None = None
    """Also write everything printed to this file."""


def perplexities(checkpoint: Path, N: int, args: Args) -> dict[str, float]:
    """Perplexity of a checkpoint on every test file, or read where an earlier run found it."""
    found = {}
    for number, test in enumerate(args.test):
        options = evaluate.Args(
            checkpoints=(checkpoint,),
            data=test,
            separator=args.separator,
            devices=str(N),
            virtual=True,
            length=args.length,
            stride=args.stride,
            rates=(),
        )
        (row,) = evaluated(args.out / f"{checkpoint.name}-N{N}-test{number}.json", options)
        found[short_name(test)] = row["perplexity"]
    return found


def trained(checkpoint: Path, name: str, shards: tuple[int, ...], args: Args) -> Path:
    """A checkpoint trained on virtual shards."""
    training = Training(steps=args.steps, batch_size=args.batch_size, learning_rate=args.learning_rate, shards=shards)
    return finetuned(
        finetune.Args(
            checkpoint=checkpoint, out=args.out / name, training=training, length=args.length, **args.source()
        )
    )


def checkpoints_of(G: int, args: Args) -> dict[str, Path]:
    """The calibrated and the finetuned checkpoint of one G."""
    options = calibrate.Args(
        checkpoint=args.original,
        out=args.out / f"calibrated-G{G}",
        groups=G,
        site=args.site,
        length=args.length,
        **args.source(),
    )
    start = calibrated(options)
    return {"calibrated": start, "finetuned": trained(start, f"finetuned-G{G}", args.devices, args)}


def main(args: Args) -> None:
    """Runs the recipe."""
    report = Report("perplexity", args.json)
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    originals = {"original": args.original, "control": trained(args.original, "control", (1,), args)}
    for made, checkpoint in originals.items():
        row = {"N": 1, "G": None, "bits": None, "made by": made}
        rows.append(row | perplexities(checkpoint, 1, args))
    for G in args.groups:
        say(f"\n--- G={G}")
        for made, checkpoint in checkpoints_of(G, args).items():
            for N in args.devices:
                row = {"N": N, "G": G, "bits": 10 * G, "made by": made}
                rows.append(row | perplexities(checkpoint, N, args))
    report.table("rows", "perplexity", rows)
    report.close()


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(parse(Args, description=__doc__))))
