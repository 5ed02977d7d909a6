"""What encoding costs: its share of a block's time at the size of ViT-Base, on this machine.

    python -m eval.cost.encoding

One device of four holds 256 of 1,024 tokens. The block is everything that this device computes: projections, attention
over local and remote tokens, MLP, encoding, packing, and keys and values of remote tokens: from tables where that pays
(`models/key_value_tables.py`), or plain, decoded and projected. Encoding alone is timed in turns with both. The floor
is what encoding must take of the block's operations, `2 S K D` for its one matmul.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from astra_jax.cli.arguments import Integers, parse
from astra_jax.cli.main import guarded
from astra_jax.codecs.config import AstraConfig, VQConfig
from astra_jax.mesh.sharding import Shards
from astra_jax.models import mask
from astra_jax.models.blocks import block_at
from astra_jax.models.key_value_tables import fold
from astra_jax.models.vit import ViTConfig
from astra_jax.report import Report
from astra_jax.strategies.base import Single
from astra_jax.strategies.coded import Astra, AstraPlain, need_codec
from eval.cost.flops import flops
from eval.cost.timing import wall_seconds
from eval.cost.workload import Workload


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


class Block(NamedTuple):
    """One block and the tokens of one device: `run(state, x)` computes its share, the exchange excluded.

    Attributes:
      graphdef, state: the block, without an axis L.
      strategy: `Astra` of the last of N devices, without the others, or `Single`.
      x: the block's input.
    """

    graphdef: Any
    state: Any
    strategy: Any
    x: Float[Array, "1 slots D"]

    def run(self, state: Any, x: Array) -> Array:
        """[1,slots,D] -> [1,slots,D]."""
        return nnx.merge(self.graphdef, state)(x, self.strategy, (), mask.Block(0))[0]

    def call(self) -> Callable[[], Array]:
        """What computes the share, to be timed."""
        run = jax.jit(self.run)
        return lambda: run(self.state, self.x)


def one_block(
    config: ViTConfig, T: int, N: int = 1, astra: AstraConfig | None = None, strategy: type[Astra] = Astra
) -> Block:
    """A block of a ViT with random weights and codebooks, and random tokens: those of the last of N devices.

    Args:
      config: the architecture; neither its number of blocks nor its images matter.
      T, N: tokens, class token not counted, and devices; without `astra` there is one device.
      astra: the codec.
      strategy: with the codec; `AstraPlain` for a block without tables.
    """
    config = dataclasses.replace(config, num_hidden_layers=1)
    work = Workload("a block", "vit", config, astra or VQConfig(), config.num_patches, jnp.dtype(jnp.float32))
    model = work.model(work.weights(), astra.groups if astra else None)
    shards = Shards.split(T, N, "distributed")
    if astra and strategy.folds:
        model = fold(model)
    graphdef, state = nnx.split(block_at(model.blocks, 0))
    x = np.random.default_rng(1).standard_normal((1, shards.class_slots + shards.S, config.hidden_size), np.float32)
    return Block(graphdef, state, strategy(shards).alone(N) if astra else Single(shards), jnp.asarray(x))


def encoding(block: Block) -> Callable[[], Array]:
    """What finds the codes of a device's tokens, to be timed."""
    y = block.x[:, block.strategy.shards.home_slots :]

    @jax.jit
    def run(state: Any, y: Array) -> Array:
        return need_codec(nnx.merge(block.graphdef, state).attention.codec).encode(y)

    return lambda: run(block.state, y)


def floor_percent(block: Block, codewords: int) -> float:
    """Operations of encoding, `2 S K D`, in percent of those of the whole block."""
    tokens, D = block.strategy.shards.sent_slots, block.x.shape[-1]
    return 100 * 2 * tokens * codewords * D / flops(block.run, block.state, block.x)


def measure(config: ViTConfig, T: int, N: int, astra: AstraConfig | None, repeats: int = 21) -> dict[str, Any]:
    """A row: milliseconds of a block, with tables where they pay and plain, and of its encoding; what share that is.

    Without `astra` the block is that of a single device with all tokens.
    """
    none = ("plain block ms", "encoding ms", "share %", "share of plain %", "floor %")
    fast = one_block(config, T, N if astra else 1, astra)
    if not astra:
        (seconds,) = wall_seconds([fast.call()], repeats)
        return {"N": 1, "G": None, "block ms": 1e3 * float(np.median(seconds)), **dict.fromkeys(none)}
    plain = one_block(config, T, N, astra, AstraPlain)
    walls = wall_seconds([fast.call(), plain.call(), encoding(fast)], repeats)
    block_ms, plain_ms, encode_ms = (1e3 * float(np.median(seconds)) for seconds in walls)
    found = (plain_ms, encode_ms, 100 * encode_ms / block_ms, 100 * encode_ms / plain_ms)
    values = zip(none, (*found, floor_percent(fast, astra.codewords)), strict=True)
    return {"N": N, "G": astra.groups, "block ms": block_ms, **dict(values)}


def main(args: Args) -> None:
    """Runs the benchmark."""
    report = Report("encoding", args.json)
    D = args.hidden_size
    config = ViTConfig(hidden_size=D, num_attention_heads=D // 64, intermediate_size=4 * D)
    codecs = [None, *(VQConfig(groups=G) for G in args.groups)]
    rows = [measure(config, args.tokens, args.devices, astra) for astra in codecs]
    report.table("rows", f"one block of one device: D={D}, {args.tokens} tokens, K=1024", rows)
    report.close()


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(parse(Args, description=__doc__))))
