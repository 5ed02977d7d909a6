"""Turn a Hugging Face model into a checkpoint that astra can calibrate, finetune and run.

    astra convert google/vit-base-patch16-224 vit-base
    astra convert ./my-finetuned-vit vit-base

SOURCE is a folder with config.json and model.safetensors, or the id of a repository on the Hugging Face hub, which is
downloaded (a download that was interrupted goes on where it stopped). OUT is a new folder: the checkpoint.

Every weight is checked: nothing may be left over, missing, of another shape, or not a number. The checkpoint computes
what the original computes; codes come in with `astra calibrate`.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

import checkpoints
from astra_jax.console import Report, progress
from checkpoints import huggingface
from checkpoints.info import parameters


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of `astra convert`."""

    source: Annotated[str, tyro.conf.Positional]
    """A Hugging Face folder, or a hub id such as google/vit-base-patch16-224."""
    out: Annotated[Path, tyro.conf.Positional]
    """Where the checkpoint goes."""
    json: Path | None = None
    """Write everything that is printed to this file."""


def main(args: Args) -> None:
    """Runs `astra convert`."""
    report = Report("convert", args.json)
    checkpoint = huggingface.read(args.source, progress)
    checkpoints.save(args.out, checkpoint)
    count, classes = parameters(checkpoint.model), checkpoint.config.num_labels
    report.say(
        f"{checkpoint.family}: {count:,} parameters in {checkpoint.dtype}, {classes:,} labels",
        family=checkpoint.family,
        parameters=count,
        dtype=checkpoint.dtype,
        labels=classes,
    )
    report.say(f"wrote {args.out}", out=str(args.out))
    report.say(f"next: astra calibrate {args.out} {args.out}-calibrated --data DATA")
    report.close()
