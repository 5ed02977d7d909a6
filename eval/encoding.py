"""What encoding costs: its share of a block's time at the size of ViT-Base, on this machine.

    python -m eval.encoding

One device of four holds 256 of 1,024 tokens. The block is everything that this device computes: projections, attention
over local and remote tokens, MLP, encoding, packing, decoding. Encoding alone is timed in the same run.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from flax import nnx
from jaxtyping import Array

from astra_jax.config import AstraConfig
from astra_jax.console import Report
from astra_jax.models.vit import ViTBlock, ViTConfig
from astra_jax.sharding import Shards
from astra_jax.strategies import OneOfN, need_codec
from eval.timing import median_seconds


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of the benchmark. The defaults are ViT-Base on four devices."""

    tokens: int = 1024
    """T: tokens of the sequence."""
    devices: int = 4
    """N."""
    hidden_size: int = 768
    """D; heads are 64 wide and the MLP is 4 D."""
    groups: tuple[int, ...] = (1, 8, 16, 32)
    """G, one after the other."""
    json: Path | None = None
    """Also write everything printed to this file."""


def measure(args: Args, G: int) -> dict[str, Any]:
    """Milliseconds of a block and of its encoding."""
    D = args.hidden_size
    config = ViTConfig(hidden_size=D, num_attention_heads=D // 64, intermediate_size=4 * D)
    block = ViTBlock(config, AstraConfig(groups=G), jnp.float32, nnx.Rngs(0))
    codec = need_codec(block.attention.codec)
    codec.codebook[...] = jax.random.normal(jax.random.key(0), codec.codebook[...].shape)
    graphdef, state = nnx.split(block)
    strategy = OneOfN(Shards.even(args.tokens, args.devices, "distributed"))
    x = jax.random.normal(jax.random.key(1), (1, 1 + strategy.shards.S, D))

    @jax.jit
    def whole(state: Any, x: Array) -> Array:
        return nnx.merge(graphdef, state)(x, strategy, (), 0)[0]

    @jax.jit
    def encoding(state: Any, y: Array) -> Array:
        return need_codec(nnx.merge(graphdef, state).attention.codec).encode(y)

    block_ms = 1e3 * median_seconds(lambda: whole(state, x), 21)
    encode_ms = 1e3 * median_seconds(lambda: encoding(state, x[:, 1:]), 21)
    return {"G": G, "block ms": block_ms, "encoding ms": encode_ms, "share %": 100 * encode_ms / block_ms}


def main(args: Args) -> None:
    """Runs the benchmark."""
    report = Report("encoding", args.json)
    rows = [measure(args, G) for G in args.groups]
    report.table("rows", f"D={args.hidden_size}, {args.tokens} tokens on {args.devices} devices, K=1024", rows)
    report.close()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
