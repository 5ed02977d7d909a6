"""Turn a Hugging Face model into a checkpoint that astra can calibrate, finetune and run.

    astra convert google/vit-base-patch16-224 vit-base
    astra convert ./my-finetuned-llama llama

SOURCE is a folder with config.json and model.safetensors (or several such files and their index), or the id of a
repository on the Hugging Face hub, which is downloaded (a download that was interrupted goes on where it stopped). It
may be a ViT or one of its relatives, a GPT-2, a Llama or what is built as one, a BERT or one of its relatives, also as
a sentence-transformers model: docs/models.md has all classes. OUT is a new folder: the checkpoint.

Every weight is checked: nothing may be left over, missing, of another shape, or not a number. The checkpoint computes
what the original computes, keeps its number format, and has its tokenizer; codes come in with `astra calibrate`.
Weights are read one block at a time: memory for the largest tensor or block is enough.
"""

import contextlib
import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

import checkpoints
from astra_jax.inputs.tokenizer import own_class
from astra_jax.report import Report, progress
from checkpoints import huggingface
from checkpoints.description import Checkpoint
from checkpoints.info import parameters
from checkpoints.tensor_maps import classifies


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of `astra convert`."""

    source: Annotated[str, tyro.conf.Positional]
    """A Hugging Face folder, or a hub id such as google/vit-base-patch16-224."""
    out: Annotated[Path, tyro.conf.Positional]
    """Where the checkpoint goes."""
    json: Path | None = None
    """Write everything that is printed to this file."""


def tokenizer_notes(checkpoint: Checkpoint) -> list[str]:
    """What somebody should know of a model's tokenizer. Raises AstraError unless it can be read and is the model's."""
    if checkpoint.tokenizer_files is None:
        return []
    beyond, notes = checkpoint.tokenizer.beyond, []
    if code := own_class(checkpoint.tokenizer_files):
        notes.append(
            f"the tokenizer asks for code of its own ({code}), which is never run; its tokenizer.json is read instead"
        )
    if beyond:
        tokens = ", ".join(map(repr, list(beyond)[:4]))
        notes.append(f"the model has no embedding for {len(beyond)} token(s) of its tokenizer, such as {tokens}")
    return notes


def main(args: Args) -> None:
    """Runs `astra convert`."""
    report = Report("convert", args.json)
    folder = huggingface.open_folder(args.source)
    checkpoint = folder.checkpoint
    notes = [*folder.notes, *tokenizer_notes(checkpoint)]
    with contextlib.closing(folder.parts(progress)) as parts:
        checkpoints.save(args.out, checkpoint, parts)
    count, config = parameters(checkpoint.model), checkpoint.config
    classes = config.num_labels if classifies(config) else 0
    report.say(
        f"{checkpoint.family}: {count:,} parameters in {checkpoint.dtype}" + f", {classes:,} labels" * bool(classes),
        family=checkpoint.family,
        parameters=count,
        dtype=checkpoint.dtype,
        labels=classes,
    )
    if hasattr(config, "vocab_size") and checkpoint.tokenizer_files is None:
        report.say(
            f"warning: {args.source} has no tokenizer, which verbs that read text need: put the model's tokenizer.json "
            "beside its config.json and convert it again"
        )
    for note in notes:
        report.say(f"note: {note}", notes=notes)
    report.say(f"wrote {args.out}", out=str(args.out))
    report.say(f"next: astra calibrate {args.out} {args.out}-calibrated --data DATA")
    report.close()
