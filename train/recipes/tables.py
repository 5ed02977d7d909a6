"""The shape of the paper's Tables 1, 12 and 13 on a model of your own: accuracy for every G, with and without NAVQ,
with distributed and with a single class token.

    python -m train.recipes.tables ORIGINAL OUT --data DATA

Every cell is calibrated from the original, finetuned, and evaluated on a mesh. A cell that OUT already has is not run
again, so an interrupted run goes on where it was.
"""

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Annotated, get_args

import tyro

import checkpoints
from astra_jax.cli.arguments import Integers, parse
from astra_jax.cli.main import guarded
from astra_jax.codecs.config import ClassToken
from astra_jax.mesh.sharding import make_mesh
from astra_jax.report import Report, say
from eval.datasets.labelled import DataArgs
from eval.verbs import evaluate
from train import calibrate, finetune
from train.loop import Training
from train.recipes.resumable import calibrated, finetuned, remembered


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(DataArgs):
    """Arguments of the recipe."""

    original: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ORIGINAL")]
    """A checkpoint made by `astra convert`."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the checkpoints and the results."""
    groups: Integers = (32, 16, 8, 1)
    """G, one after the other."""
    devices: int = 4
    """N: devices to train for and to evaluate on."""
    steps: int = 500
    """Finetuning steps of every cell."""
    tokens: int = 32_768
    """Tokens to cluster in every block."""
    batch_size: int = 64
    """Images per batch."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    test: str = "test"
    """Which part of the data to evaluate on."""
    json: Path | None = None
    """Also write everything printed to this file."""


def accuracy(checkpoint: Path, args: Args) -> float:
    """Accuracy in percent on `args.devices` devices, or on one for the original."""
    options = evaluate.Args(checkpoints=(checkpoint,), rates=(), **(args.source() | {"split": args.test}))
    return evaluate.measure(checkpoint, dataclasses.replace(options, devices=str(args.devices)), print)["accuracy %"]


def found(checkpoint: Path, result: Path, args: Args) -> float:
    """Accuracy in percent as `accuracy` finds it, or as the file `result` says that it did."""
    described = {**args.source(), "test": args.test, "devices": args.devices}
    digests = [checkpoints.read_meta(checkpoint).digest]
    return remembered(result, digests, described, lambda: {"accuracy %": accuracy(checkpoint, args)})["accuracy %"]


def cell(args: Args, G: int, class_token: ClassToken, noise: float) -> float:
    """Accuracy in percent of one model: calibrated, finetuned and evaluated, or read where an earlier run found it."""
    tuned = args.out / f"G{G}-{class_token}-noise{noise:g}"
    say(f"\n--- {tuned.name}")
    data = args.source()
    start = calibrated(
        calibrate.Args(
            checkpoint=args.original,
            out=args.out / f"calibrated-G{G}-{class_token}",
            groups=G,
            class_token=class_token,
            tokens=args.tokens,
            **data,
        )
    )
    training = Training(
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        shards=(args.devices,),
        noise=noise,
    )
    finetuned(finetune.Args(checkpoint=start, out=tuned, training=training, **data))
    return found(tuned, tuned / "accuracy.json", args)


def main(args: Args) -> None:
    """Runs the recipe."""
    report = Report("tables", args.json)
    make_mesh(args.devices)  # before JAX starts, so that it makes enough CPU devices
    args.out.mkdir(parents=True, exist_ok=True)
    original = found(args.original, args.out / "original.json", args)
    rows = []
    for G, class_token in itertools.product(args.groups, get_args(ClassToken)):
        plain, noisy = (cell(args, G, class_token, noise) for noise in (0.0, 1.0))
        rows.append({"G": G, "class token": class_token, "without NAVQ %": plain, "with NAVQ %": noisy})
    report.table("rows", f"{args.data} [{args.test}], N={args.devices}; original {original:.2f} %", rows)
    report.say(f"original on one device: {original:.2f} %", original=original)
    report.close()


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(parse(Args, description=__doc__))))
