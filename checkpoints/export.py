"""Write a checkpoint back as a Hugging Face folder, which `transformers` loads.

    astra export vit-base-finetuned hf-vit

The folder has config.json, model.safetensors and what else the model came with (its tokenizer, its image preprocessing,
its generation settings), with the names and the number format of the model that the checkpoint was converted from.
Weights that were not trained come back bit for bit. Codebooks are left out: a Hugging Face model has no place for them,
so keep the checkpoint too.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

import checkpoints
from astra_jax.report import Report
from checkpoints import huggingface


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of `astra export`."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A checkpoint."""
    out: Annotated[Path, tyro.conf.Positional]
    """The Hugging Face folder: a new or empty one, or an earlier export, which is overwritten."""
    dtype: Literal["original", "float32", "float16", "bfloat16"] = "original"
    """Number format of the weights; `original` is that of the converted model."""
    json: Path | None = None
    """Write everything that is printed to this file."""


def main(args: Args) -> None:
    """Runs `astra export`."""
    report = Report("export", args.json)
    checkpoint = checkpoints.load(args.checkpoint, param_dtype=None)
    dtype = checkpoint.dtype if args.dtype == "original" else args.dtype
    huggingface.write_folder(checkpoint, args.out, dtype)
    report.say(f"wrote {args.out} in {dtype}", out=str(args.out), dtype=dtype)
    if checkpoint.astra is not None:
        report.say("codebooks are left out: a Hugging Face model has no place for them", codebooks=False)
    report.close()
