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

from astra_jax.arguments import Integers
from astra_jax.collectives import Alone
from astra_jax.config import AstraConfig
from astra_jax.console import Report
from astra_jax.models.vit import ViTBlock, ViTConfig
from astra_jax.sharding import Shards
from astra_jax.strategies import Astra, Single, need_codec
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
    groups: Integers = (1, 8, 16, 32)
    """G, one after the other."""
    json: Path | None = None
    """Also write everything printed to this file."""


def measure(args: Args, G: int | None) -> dict[str, Any]:
    """Milliseconds of a block and of its encoding; without G of the block of a single device with all tokens."""
    D = args.hidden_size
    config = ViTConfig(hidden_size=D, num_attention_heads=D // 64, intermediate_size=4 * D)
    block = ViTBlock(config, AstraConfig(groups=G) if G else None, jnp.float32, nnx.Rngs(0))
    shards = Shards.split(args.tokens, args.devices if G else 1, "distributed")
    strategy = Astra(shards, peers=Alone(args.devices)) if G else Single(shards)
    x = jax.random.normal(jax.random.key(1), (1, 1 + shards.S, D))
    if G:
        codec = need_codec(block.attention.codec)
        codec.codebook[...] = jax.random.normal(jax.random.key(0), codec.codebook[...].shape)
    graphdef, state = nnx.split(block)

    @jax.jit
    def whole(state: Any, x: Array) -> Array:
        return nnx.merge(graphdef, state)(x, strategy, (), 0)[0]

    @jax.jit
    def encoding(state: Any, y: Array) -> Array:
        return need_codec(nnx.merge(graphdef, state).attention.codec).encode(y)

    block_ms = 1e3 * median_seconds(lambda: whole(state, x), 21)
    if not G:
        return {"N": 1, "G": None, "block ms": block_ms, "encoding ms": None, "share %": None}
    encode_ms = 1e3 * median_seconds(lambda: encoding(state, x[:, 1:]), 21)
    share = 100 * encode_ms / block_ms
    return {"N": args.devices, "G": G, "block ms": block_ms, "encoding ms": encode_ms, "share %": share}


def main(args: Args) -> None:
    """Runs the benchmark."""
    report = Report("encoding", args.json)
    rows = [measure(args, G) for G in (None, *args.groups)]
    report.table("rows", f"one block of one device: D={args.hidden_size}, {args.tokens} tokens, K=1024", rows)
    report.close()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
