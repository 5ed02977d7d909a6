"""Accuracy, bits and predicted latency of one or more checkpoints, as one table and one plot.

A checkpoint with codebooks runs as ASTRA over the mesh that --devices picks, one without on a single device: give the
original first to compare. On a CPU the devices are made by the program itself.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jaxtyping import Array

import checkpoints
from astra_jax.console import Report, progress
from astra_jax.errors import AstraError
from astra_jax.preprocess import ImageProcessor
from astra_jax.sharding import make_mesh, parse_devices
from astra_jax.strategies import Astra, Single, Virtual, need_codec, parallelize
from eval import plots
from eval.data import DataArgs, ImageData, batches
from eval.hlo import collectives_in
from eval.network import latency, parse_rate
from eval.timing import compute_seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(DataArgs):
    """Arguments of `astra eval`."""

    checkpoints: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT...")]
    """One or more checkpoints, the original first."""
    split: str = "test"
    """Which part of the data; a slice such as test[:1000] goes too."""
    devices: str = "4"
    """The mesh: N devices over the tokens, or DxN for D batches at once."""
    virtual: bool = False
    """Run the N shards on one device: the same numbers, no mesh needed."""
    strategy: Literal["auto", "single"] = "auto"
    """`single` also runs checkpoints with codebooks on one device, without exchange."""
    batch_size: int = 64
    """Images per batch."""
    limit: int | None = None
    """Stop after this many images."""
    rates: tuple[str, ...] = ("10mbit", "20mbit", "50mbit", "100mbit", "200mbit", "500mbit")
    """Link rates to predict the latency of one image for."""
    plot: Path | None = None
    """Draw accuracy over bits and latency over the link's rate into this file (PNG or SVG)."""
    json: Path | None = None
    """Also write everything printed to this file."""


def classifier(model: Any, N: int, data_devices: int, virtual: bool) -> Callable[[Array], Array]:
    """Images -> logits: on a (data, N) mesh, or with N virtual shards on one device. N = 1 is one device."""
    if not virtual:
        return parallelize(model, make_mesh(N, data_devices))
    graphdef, state = nnx.split(model)
    shards = model.shards(N)

    @jax.jit
    def run(state: Any, images: Array) -> Array:
        model = nnx.merge(graphdef, state)
        strategy = Virtual(shards) if N > 1 else Single(shards)
        return model(shards.scatter(model.to_tokens(images)), strategy)[0]

    return lambda images: run(state, images)


def accuracy(
    classify: Callable[[Array], Array], data: ImageData, processor: ImageProcessor, batch: int, limit: int | None
) -> float:
    """Share of the images whose highest logit is their label."""
    total = min(len(data), limit or len(data))
    right = 0
    with progress("images", total) as advance:
        for images, labels in batches(data, processor, batch, limit=limit):
            # The last batch is filled up, so that one compiled program serves all.
            filled = np.pad(images, [(0, batch - len(images))] + [(0, 0)] * 3)
            predicted = np.argmax(np.asarray(classify(jnp.asarray(filled))), axis=-1)[: len(labels)]
            right += int((predicted == labels).sum())
            advance(len(labels), accuracy=right / total)
    return right / total


def sent_bytes(model: Any, N: int, virtual: bool) -> tuple[int, int]:
    """Bytes that one device sends for one image: codes in all blocks, and the class state after the last.

    Read from the compiled program, or as the strategy predicts where the shards are virtual and no program gathers.
    Raises AstraError if the two differ.
    """
    config = model.config
    predicted = Astra(model.shards(N)).wire_bits(need_codec(model.codec)) * config.num_hidden_layers
    if virtual:
        return predicted // 8, 4 * config.hidden_size
    image = jnp.zeros((1, config.image_size, config.image_size, config.num_channels))
    program = parallelize(model, make_mesh(N)).lower(image).compile().as_text()
    found = collectives_in(program)
    codes = sum(c.bytes // N * (c.trip_count or 1) for c in found if c.kind == "all-gather")
    if 8 * codes != predicted:
        raise AstraError(f"the program gathers {8 * codes} bits, but {predicted} were predicted: please report it")
    return codes, sum(c.bytes for c in found if c.kind != "all-gather")


def measure(path: Path, args: Args) -> dict[str, Any]:
    """One row of the table: what a checkpoint reaches and what it costs."""
    checkpoint = checkpoints.load(path)
    model, astra = checkpoint.model, checkpoint.astra
    data_devices, N = parse_devices(args.devices)
    if astra is None or args.strategy == "single":
        astra, N = None, 1
    data = args.open(checkpoint.labels)
    processor = checkpoint.processor
    classify = classifier(model, N, data_devices, args.virtual)
    reached = accuracy(classify, data, processor, args.batch_size, args.limit)
    codes, pooled = sent_bytes(model, N, args.virtual) if N > 1 else (0, 0)
    compute = compute_seconds(model, N)
    bits = astra.groups * astra.bits if astra else None
    return {
        "checkpoint": path.name,
        "N": N,
        "G": astra.groups if astra else None,
        "accuracy %": 100 * reached,
        "bits": bits,
        "ratio": model.config.hidden_size * 32 / bits if bits else None,
        "bytes": codes + pooled,
        "compute ms": 1e3 * compute,
        **{rate: 1e3 * latency(compute, 8 * codes, 8 * pooled, parse_rate(rate)) for rate in args.rates},
    }


def main(args: Args) -> None:
    """Runs `astra eval`."""
    report = Report("eval", args.json)
    if not args.checkpoints:
        raise AstraError("no checkpoint was given: astra eval CHECKPOINT [CHECKPOINT ...] --data DATA")
    for rate in args.rates:
        parse_rate(rate)
    if args.plot:
        plots.check_plot(args.plot)
    data_devices, N = parse_devices(args.devices)
    if not args.virtual:
        make_mesh(N, data_devices)  # before JAX starts, so that it makes enough CPU devices
    rows = [measure(path, args) for path in args.checkpoints]
    report.table("rows", f"{args.data} [{args.split}]", rows)
    report.say(
        "N devices; bits per token and block; compression ratio; bytes that a device sends for one image, as compiled\n"
        "compute: one device's share of one image, measured here; then its latency in ms, predicted for each rate"
    )
    if args.plot:
        plots.accuracy_and_latency(rows, args.rates, args.plot)
        report.say(f"plot: {args.plot}", plot=str(args.plot))
    report.close()
