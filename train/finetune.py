"""Finetune a calibrated model with Noise-Augmented Quantization (NAVQ), so that it lives with quantized exchange.

Every batch runs on N virtual shards: each token sees its own shard exactly and the others through noisy codes. The run
logs to OUT/train.jsonl and saves its state in OUT/train; after Ctrl-C or a crash the same command goes on where it was.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import tyro
from flax import nnx

import checkpoints
from astra_jax.errors import AstraError
from astra_jax.mesh.sharding import parse_devices
from astra_jax.report import Report
from checkpoints import Checkpoint
from checkpoints.configs import need_one_class
from checkpoints.tensor_maps import embeds
from eval.datasets.account import Tell, telling
from eval.datasets.labelled import DataArgs
from eval.datasets.labels import model_classes
from train.data import Augment, sequences, text_batches, train_batches
from train.loop import Training, train
from train.lora import Lora, add, merge_into
from train.memory import Memory, Remat, split, training_mesh
from train.objective import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(DataArgs):
    """Arguments of `astra finetune`."""

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A checkpoint made by `astra calibrate`."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Where the finetuned checkpoint goes. Repeat the command to resume."""
    training: Annotated[Training, tyro.conf.arg(name="training"), tyro.conf.OmitArgPrefixes] = Training()
    lora: Annotated[Lora, tyro.conf.arg(name="lora"), tyro.conf.OmitArgPrefixes] = Lora()
    augment: bool = True
    """Shift the images at random."""
    flip: bool = True
    """Also mirror them at random; turn off where left and right matter, as in digits."""
    length: int | None = None
    """Tokens of a text; by default what the model takes, but at most 512."""
    devices: str | None = None
    """Devices that share every batch and all large arrays; all accelerators by default, one CPU. DxF: D groups of F
    devices, of which each has all arrays."""
    remat: Remat = "none"
    """What a backward pass computes again to save memory: block, of every block all but its input."""
    save_every: int = 100
    """Steps between saved states."""
    profile: Path | None = None
    """Write a trace of the third to the fifth step into this folder, for TensorBoard or Perfetto."""
    json: Path | None = None
    """Also write everything printed to this file."""


def training_batches(checkpoint: Checkpoint, args: Args, tell: Tell) -> Iterator[Batch]:
    """Endless batches of the checkpoint's kind of data; `tell` is told what is read.

    Raises AstraError for a model that no loss is known for.
    """
    training = args.training
    need_one_class(checkpoint, args.checkpoint, "finetuned for")
    if embeds(checkpoint.config):
        raise AstraError(
            f"{args.checkpoint}: gives embeddings and has no classifier, so there is no loss for it: use it as "
            "`astra calibrate` made it"
        )
    if checkpoint.config.input_kind == "images":
        augment = Augment(flip=args.flip) if args.augment else None
        data = args.open(model_classes(checkpoint))
        tell(data.account)
        return train_batches(data, checkpoint.processor, training.batch_size, training.seed, augment)
    return text_batches(*sequences(checkpoint, args, args.length, tell), training.batch_size, training.seed)


def main(args: Args) -> None:
    """Runs `astra finetune`."""
    report = Report("finetune", args.json)
    training = args.training
    if args.out.resolve() == args.checkpoint.resolve():
        raise AstraError(f"{args.out}: is the checkpoint that training starts from: choose another output folder")
    data, fsdp = parse_devices(args.devices) if args.devices else (1, _all_devices())
    mesh, dtype = training_mesh(fsdp, data), jnp.dtype(training.dtype)
    memory = Memory(mesh if mesh.size > 1 else None, args.remat, dtype)
    memory.check(training.batch_size)
    args.lora.check(training.trains)
    checkpoint = checkpoints.load(
        args.checkpoint,
        dtype=dtype,
        param_dtype=jnp.float32 if training.trains == "all" else dtype,
        shardings=lambda model: split(nnx.state(model), mesh),
    )
    if training.trains == "lora":
        count = add(checkpoint.model, args.lora, training.seed)
        report.say(f"{count} layers of every block have an adapter of rank {args.lora.rank}", adapters=count)
    iterator = training_batches(checkpoint, args, telling(report))
    source = {
        "checkpoint": str(args.checkpoint),
        "checkpoint_sha256": checkpoint.digest,
        **args.source(),
        "augment": args.augment,
        "flip": args.flip,
        "length": args.length,
        **({"lora": dataclasses.asdict(args.lora)} if training.trains == "lora" else {}),
    }
    model, done = train(
        checkpoint.model,
        training,
        iterator,
        args.out,
        memory=memory,
        source=source,
        save_every=args.save_every,
        label="finetune",
        profile=args.profile,
    )
    provenance = {"verb": "finetune", **source, **dataclasses.asdict(training), "steps": done}
    if training.trains != "all":  # what was frozen is saved as it was stored, whatever was computed with
        trained, whole = model, None if training.trains == "codebooks" else jnp.float32
        model = checkpoints.load(args.checkpoint, param_dtype=whole).model
        nnx.update(model, jax.device_get(nnx.state(trained, nnx.Not(nnx.Param))))
        merge_into(model, trained)
    finished = dataclasses.replace(checkpoint, model=model, history=(*checkpoint.history, provenance))
    checkpoints.save(args.out, finished)
    report.say(f"wrote {args.out} after {done} of {training.steps} steps", out=str(args.out), steps=done)
    if done < training.steps:
        report.say("stopped early: repeat the command to go on")
        report.close()
        raise KeyboardInterrupt
    report.say(f"next: astra eval {args.out} --data {args.data} --devices {max(training.shards)}")
    report.close()


def _all_devices() -> int:
    devices = jax.devices()
    return 1 if devices[0].platform == "cpu" else len(devices)
