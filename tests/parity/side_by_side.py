"""A pass of one device, ours and that of transformers in torch, timed in turns: a program that `make bench` runs.

    python tests/parity/side_by_side.py --model vit-base --tokens 1024 --repeats 5

The same architecture, float32, one picture, random weights, from pixels to logits, on all cores that this process may
run on. Prints the seconds of every pass as JSON.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import torch
import transformers
from torch import Tensor

from astra_jax.mesh.sharding import make_mesh
from astra_jax.serving.compile import parallelize
from eval.cost.timing import wall_seconds
from eval.cost.workload import Workload, open_workload


def ours(work: Workload) -> Callable[[], Any]:
    """Our pass."""
    run = parallelize(work.model(work.weights(), None), make_mesh(1))
    pixels = jnp.ones_like(work.inputs())
    return lambda: run(pixels)


def theirs(work: Workload) -> Callable[[], Tensor]:
    """The pass of transformers."""
    names = [field.name for field in dataclasses.fields(work.config)]
    config = transformers.ViTConfig(
        **{name: getattr(work.config, name) for name in names}, attn_implementation="sdpa", dtype="float32"
    )
    model = transformers.ViTForImageClassification(config).eval()
    pixels = torch.ones(1, config.num_channels, config.image_size, config.image_size)

    def run() -> Tensor:
        with torch.inference_mode():
            return model(pixels).logits

    return run


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit-base")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    work = open_workload(args.model, args.tokens, None, "float32")
    walls = wall_seconds([ours(work), theirs(work)], args.repeats)
    print(json.dumps(dict(zip(("astra-jax", "transformers"), walls, strict=True))))


if __name__ == "__main__":
    main()
