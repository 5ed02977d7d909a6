"""A stack of equal blocks: parameters are stacked on a leading axis L, and one scan runs them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from astra_jax.weights import dequantized


def stack_blocks(make: Callable[[nnx.Rngs], nnx.Module], L: int, rngs: nnx.Rngs) -> Any:
    """L blocks made by `make`, as one module whose variables have a leading axis L."""
    return nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(L))


def block_at(blocks: Any, index: int) -> Any:
    """Block `index` of a stack, as a module of its own (a copy)."""
    graphdef, state = nnx.split(blocks)
    return nnx.merge(graphdef, jax.tree.map(lambda a: a[index], state))


def scan_blocks(blocks: Any, x: Float[Array, "B S D"], strategy: Any) -> tuple[Float[Array, "B S D"], Any]:
    """Runs the stack: x [B,S,D] -> x [B,S,D] and the strategy's reports, stacked on a leading axis L.

    The carry of the scan is `(x, remote)`: `remote` is what a codec keeps per remote token, () for this one.
    """
    graphdef, state = nnx.split(blocks)
    L = jax.tree.leaves(state)[0].shape[0]

    def one_block(strategy: Any, carry: tuple[Array, Any], xs: tuple[Any, Array]) -> tuple[tuple[Array, Any], Any]:
        x, remote = carry
        block_state, number = xs
        x, remote, report = nnx.merge(graphdef, dequantized(block_state))(x, strategy, remote, number)
        return (x, remote), report

    (x, _), reports = strategy.run_blocks(one_block, (x, ()), (state, jnp.arange(L)))
    return x, reports
