"""A stack of equal blocks: parameters are stacked on a leading axis L, and one scan runs them."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from astra_jax.codecs.config import CODED, Kind
from astra_jax.errors import AstraError
from astra_jax.inputs.token_batches import numbers_of_tokens
from astra_jax.models.interface import Report, Strategy, TokenIds
from astra_jax.models.mask import Block
from astra_jax.models.weight_quantization import dequantized, is_quantized


def stack_blocks(make: Callable[[nnx.Rngs], nnx.Module], L: int, rngs: nnx.Rngs) -> Any:
    """L blocks made by `make`, as one module whose variables have a leading axis L."""
    return nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(L))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unstacked:
    """A weight of all blocks as L arrays, one for each, in place of a stack of them. `unstacked` makes these."""

    blocks: tuple[Any, ...]  # arrays; in a pytree also whatever was made of these


# Bytes of a block's weights from which they are unstacked. Smaller ones are copied in no time, and a program with one
# block in a loop is compiled sooner than one with all of them (our choice).
LEAST_UNSTACKED = 2**22


def unstacked(state: Any) -> Any:
    """A model's weights, those of its blocks each by itself, where the scan would copy much; else as they are.

    A scan on a CPU copies every block's weights out of the stack before it multiplies with them. The arrays of the
    blocks are views of the stack, so nothing is copied here (but what begins at no multiple of 64 bytes).

    Args:
      state: of a model, or of one within another, on its devices. Quantized weights stay in the stack: what is
        multiplied with is made anew from them anyway.
    """
    arrays = [a for path, a in jax.tree_util.tree_leaves_with_path(state) if in_blocks(path)]
    if any(isinstance(a, jax.ShapeDtypeStruct) or next(iter(a.devices())).platform != "cpu" for a in arrays):
        return state
    if sum(a.nbytes for a in arrays) < LEAST_UNSTACKED * len(arrays[0]):
        return state

    def one(path: Any, a: Any) -> Any:
        return _unstack(a) if in_blocks(path) and not is_quantized(a) else a

    return jax.tree_util.tree_map_with_path(one, state, is_leaf=is_quantized)


def in_blocks(path: Any) -> bool:
    """Whether the path of an array in a state, of a model or of what is made of one, leads into its stack."""
    return any("blocks" in (getattr(key, "key", None), getattr(key, "name", None)) for key in path)


def _unstack(stack: Array) -> Unstacked:
    sharding = stack.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, P(*sharding.spec[1:]))
    here = [(np.asarray(shard.data), shard.device) for shard in stack.addressable_shards]

    def one(number: int) -> Array:
        pieces = [jax.device_put(data[number], device) for data, device in here]
        return jax.make_array_from_single_device_arrays(stack.shape[1:], sharding, pieces)

    return Unstacked(tuple(map(one, range(len(stack)))))


def run_stack(
    parts: Sequence[tuple[Callable[[Any, Any], tuple[Any, Any]], int]], carry: Any, xs: Any
) -> tuple[Any, Any]:
    """`jax.lax.scan` over the blocks, whose weights are among `xs`; of `Unstacked` ones a loop instead.

    Args:
      parts: how blocks that follow each other are run, (carry, their part of xs) -> (carry, report), and how many.
    """
    reports: list[Any] = []
    ends = list(itertools.accumulate(count for _, count in parts))
    if any(map(_is_unstacked, jax.tree.leaves(xs, is_leaf=_is_unstacked))):
        for (block, count), end in zip(parts, ends, strict=True):
            traced_once = jax.jit(block)
            for number in range(end - count, end):
                carry, report = traced_once(carry, _block_of(xs, number))
                reports.append(report)
        return carry, jax.tree.map(lambda *blocks: jnp.stack(blocks), *reports)
    if len(parts) == 1 and ends[0] > 1:
        return jax.lax.scan(parts[0][0], carry, xs)

    def at(block: Any, carry: Any, number: Any) -> tuple[Any, Any]:
        # One by one: a scan over a part of the stack would copy nearly all of it first.
        return block(carry, jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, number, keepdims=False), xs))

    for (block, count), end in zip(parts, ends, strict=True):
        if count == 1:
            carry, report = block(carry, _block_of(xs, end - 1))
            report = jax.tree.map(lambda a: a[None], report)
        else:
            carry, report = jax.lax.scan(partial(at, block), carry, jnp.arange(end - count, end))
        reports.append(report)
    return carry, jax.tree.map(lambda *blocks: jnp.concatenate(blocks), *reports)


def length(xs: Any) -> int:
    """L: blocks in a stack."""
    first = jax.tree.leaves(xs, is_leaf=_is_unstacked)[0]
    return len(first.blocks) if _is_unstacked(first) else len(first)


def _is_unstacked(a: Any) -> bool:
    return isinstance(a, Unstacked)


def _block_of(xs: Any, number: Any) -> Any:
    return jax.tree.map(lambda a: a.blocks[number] if _is_unstacked(a) else a[number], xs, is_leaf=_is_unstacked)


def block_at(blocks: Any, index: int | Int[Array, ""]) -> Any:
    """Block `index` of a stack, or the part of it that is given, as a module of its own (a copy), its weights in full
    precision."""
    graphdef, state = nnx.split(blocks)
    return nnx.merge(graphdef, dequantized(_block_of(state, index)))


def token_ids(model: Any, ids: Int[Array, "B S"] | None) -> TokenIds | None:
    """What a text's model tells devices of the tokens that are here, where its schedule begins with a known block.

    What the first block's codec sees depends on ids and positions alone.

    Args:
      model: `embedded(ids, positions)` is the input of its first block, whose `attention_input` is what is projected.
      ids: of the slots that are here, class tokens included; None for what is no text.
    """
    if model.astra is None or "known" not in model.astra.kinds(model.config.num_hidden_layers):
        return None
    first = block_at(model.blocks, 0)

    def vectors_of(ids: Array, positions: Any) -> Array:
        return first.attention.codec_input(first.attention_input(model.embedded(ids, positions)))

    if ids is None:
        raise AstraError("schedule has a known block, which is for texts: calibrate it again")
    return TokenIds(ids, numbers_of_tokens(model.config), vectors_of)


def scan_blocks(
    model: Any, x: Float[Array, "B S D"], strategy: Strategy, ids: Int[Array, "B S"] | None = None
) -> tuple[Float[Array, "B S D"], Report]:
    """Runs the stack of a model: x [B,S,D] -> x [B,S,D] and the reports, stacked on a leading axis L.

    Args:
      model: may have `relative_positions`, which all of its blocks add to scores (`Block.relative`).
      ids: of a text, those of the slots that are here.
    """
    blocks, relative = model.blocks, getattr(model, "relative_positions", None)
    graphdef, state = nnx.split(blocks)
    codec, L = blocks.attention.codec, length(state)
    estimate = strategy.start(codec, x, token_ids(model, ids) if strategy.coded else None)

    def step(strategy: Strategy, kind: Kind, carry: tuple[Array, Any], xs: Any) -> tuple[tuple[Array, Any], Report]:
        x, estimate = carry
        block_state, number = xs
        block = nnx.merge(graphdef, dequantized(block_state))
        x, estimate, report = block(x, strategy, estimate, Block(number, kind, relative=relative))
        return (x, estimate), report

    kinds = model.astra.kinds(L) if model.astra else CODED * L
    (x, _), reports = strategy.run_blocks(step, kinds, (x, estimate), (state, jnp.arange(L)))
    return x, reports
