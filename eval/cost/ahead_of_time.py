"""Compile the prefill of Llama-3-8B for several devices without its weights: what it needs and what it sends.

    python -m eval.cost.ahead_of_time

The model is built from shapes, lowered and compiled; nothing of its size is allocated. Prints
parameters, memory of one device as the compiler plans it, and bits on the link, predicted and read from the program.
"""

import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from astra_jax.cli.arguments import Integers, parse
from astra_jax.cli.main import guarded
from astra_jax.codecs.config import AstraConfig, Site, VQConfig
from astra_jax.inputs.token_batches import Text
from astra_jax.mesh.sharding import make_mesh
from astra_jax.models.llama import LlamaConfig
from astra_jax.report import Report
from astra_jax.serving.compile import place
from astra_jax.serving.generate import prefill_program
from astra_jax.strategies.coded import Astra
from checkpoints.tensor_maps import build
from eval.cost.hlo import collectives_in
from eval.cost.presets import LLAMA_3_8B


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of the report. The defaults are the paper's setting."""

    devices: int = 4
    """N."""
    tokens: int = 1024
    """T: tokens of the prompt."""
    groups: Integers = (1, 32)
    """G, one after the other."""
    site: Site = "kv"
    """What is quantized."""
    json: Path | None = None
    """Also write everything printed to this file."""


def abstract(config: LlamaConfig, astra: AstraConfig) -> Any:
    """The model with shapes in place of weights: parameters in bfloat16, codebooks in float32."""
    graphdef, params, rest = nnx.split(build("llama", config, astra, jnp.bfloat16), nnx.Param, ...)  # type: ignore[misc]
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), params)
    return nnx.merge(graphdef, params, rest)


def measure(config: LlamaConfig, args: Args, G: int) -> dict[str, Any]:
    """One row: the prefill program of one G."""
    model, mesh = abstract(config, VQConfig(groups=G, site=args.site)), make_mesh(args.devices, to_run=False)
    graphdef, state = place(model, mesh)
    ids = jax.ShapeDtypeStruct((1, args.tokens), jnp.int32)
    text = Text(ids, jax.ShapeDtypeStruct((1,), jnp.int32))  # type: ignore[arg-type]  # shapes in place of arrays
    start = time.perf_counter()
    compiled = prefill_program(model, graphdef, mesh).lower(state, text).compile()
    seconds = time.perf_counter() - start
    gathered = sum(
        c.bytes // args.devices for c in collectives_in(compiled.as_text()) if c.kind == "all-gather" and c.in_loop
    )
    strategy = Astra.of(model, args.devices, Text(jnp.zeros((1, args.tokens), int), jnp.asarray([args.tokens])))
    memory = compiled.memory_analysis()
    return {
        "N": args.devices,
        "T": args.tokens,
        "G": G,
        "parameters": sum(math.prod(a.shape) for a in jax.tree.leaves(nnx.state(model, nnx.Param))),
        "weights GB": sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state)) / 1e9,
        "arguments GB": memory.argument_size_in_bytes / 1e9,
        "working GB": memory.temp_size_in_bytes / 1e9,
        "cache MB": memory.output_size_in_bytes / 1e6,
        "bytes per block": strategy.wire_bits(model) // config.num_hidden_layers // 8,
        "as compiled": gathered,
        "compile s": seconds,
    }


def main(args: Args) -> None:
    """Runs the report."""
    report = Report("ahead_of_time", args.json)
    rows = [measure(LLAMA_3_8B, args, G) for G in args.groups]
    report.table("rows", f"Llama-3-8B in bfloat16, one prompt, per device, site {args.site}, K=1024", rows)
    report.say(
        "weights: parameters in bfloat16, codebooks and statistics in float32; arguments, working memory and the\n"
        "cache (keys, values, codes and logits) are what the compiler plans for one device of this platform"
    )
    report.close()


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(parse(Args, description=__doc__))))
