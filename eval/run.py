"""Classify images with one checkpoint, its tokens split over the devices that --devices picks.

On a CPU the devices are made by the program itself. Prints the likeliest classes, the time, and what crossed the link.
"""

import dataclasses
import time
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import checkpoints
from astra_jax.console import Report
from astra_jax.errors import AstraError
from astra_jax.preprocess import decode_image
from astra_jax.sharding import make_mesh, parse_devices
from astra_jax.strategies import Astra, need_codec, parallelize


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of `astra run`."""

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A checkpoint; with codebooks for more than one device."""
    image: tuple[Path, ...]
    """One or more pictures."""
    devices: str = "1"
    """The mesh: N devices over the tokens, or DxN for D batches at once."""
    top: int = 5
    """How many classes to print for each picture."""
    json: Path | None = None
    """Also write everything printed to this file."""


def main(args: Args) -> None:
    """Runs `astra run`."""
    report = Report("run", args.json)
    if args.top < 1:
        raise AstraError(f"--top is {args.top}; it must be at least 1")
    if not args.image:
        raise AstraError("no picture was given: add --image FILE")
    data_devices, N = parse_devices(args.devices)
    mesh = make_mesh(N, data_devices)
    checkpoint = checkpoints.load(args.checkpoint)
    model = checkpoint.model
    pictures = [decode_image(path) for path in args.image]
    images = jnp.asarray(checkpoint.processor(pictures))
    classify = parallelize(model, mesh)
    start = time.perf_counter()
    jax.block_until_ready(classify(images))
    first = time.perf_counter() - start
    start = time.perf_counter()
    logits = jax.block_until_ready(classify(images))
    seconds = time.perf_counter() - start
    probabilities = np.asarray(jax.nn.softmax(logits))
    names = checkpoint.labels or tuple(str(c) for c in range(probabilities.shape[1]))
    rows = [
        {"image": str(path), "class": names[c], "probability": float(p[c])}
        for path, p in zip(args.image, probabilities, strict=True)
        for c in np.argsort(-p)[: args.top]
    ]
    report.table("classes", f"{args.checkpoint} on {args.devices} device(s)", rows)
    L = model.config.num_hidden_layers
    sent = L * Astra(model.shards(N)).wire_bits(need_codec(model.codec)) // 8 if N > 1 else 0
    report.say(
        f"{1e3 * seconds:.1f} ms for {len(pictures)} image(s), {first:.1f} s with compilation; "
        f"each device sent {sent:,} bytes of codes per image",
        seconds=seconds,
        first_seconds=first,
        code_bytes_per_image=sent,
    )
    report.close()
