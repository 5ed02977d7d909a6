"""Weights of 8 or 4 bits (paper's Table 5): the kernels of a model's blocks as integers and scales, by qwix.

Embeddings, heads, norms, biases and codebooks stay as they are. A kernel is used in full precision: `dequantized` gives
it back inside the scan over blocks, so that only one block's kernels are in full precision at a time and every strategy
works as before. For inference only: integers have no gradient, and the checkpoint store keeps full-precision weights.
"""

import math
from functools import partial
from typing import Any, Literal

import jax
import qwix
from flax import nnx
from jaxtyping import Array, Float

from astra_jax.errors import AstraError

Weights = Literal["int8", "int4"]

ROWS = 32  # that share a scale at 4 bits: fewer have a smaller largest weight, so finer steps, but more scales


def is_quantized(a: Any) -> bool:
    """Whether this is an array of integers and scales."""
    return isinstance(a, qwix.QArray)


@partial(jax.jit, static_argnames="weights")
def _quantize(kernel: Float[Array, "L inputs outputs"], weights: Weights) -> qwix.QArray:
    rows = {1: math.gcd(kernel.shape[1], ROWS)} if weights == "int4" else {}
    return qwix.quantize(kernel, weights, channelwise_axes=(0, 2), tiled_axes=rows)


def quantize_weights(model: Any, weights: Weights) -> Any:
    """The same model with the kernels of the linear layers in its blocks quantized: `W ~ scale * integer`.

    The integer is the nearest one, and `scale = max |W| / 127.5` over a group at 8 bits, `/ 7.5` at 4 bits: a weight is
    off by half a scale at most. A group is a column of a block's kernel at 8 bits, and at 4 bits 32 rows of one, or as
    many as the greatest common divisor of 32 and the rows (our choice; the paper does not say).

    Args:
      model: a model of `astra_jax.models`, which stays as it is.
      weights: "int8" or "int4".

    Raises:
      AstraError: the weights are quantized already.
    """

    def is_kernel(path: tuple[Any, ...], _: Any) -> bool:
        return path[0] == "blocks" and path[-1] == "kernel"

    graphdef, kernels, *others = nnx.split(model, is_kernel, ...)
    if any(map(is_quantized, jax.tree.leaves(kernels, is_leaf=is_quantized))):
        raise AstraError(f"the weights are quantized already: load the checkpoint again to have them in {weights}")
    return nnx.merge(graphdef, jax.tree.map(lambda kernel: _quantize(kernel, weights), kernels), *others)


def dequantized(state: Any) -> Any:
    """A state, or any tree, with every quantized array in full precision."""
    return jax.tree.map(lambda a: qwix.dequantize(a) if is_quantized(a) else a, state, is_leaf=is_quantized)


def weight_bytes(model: Any) -> int:
    """Bytes of a model's parameters, codebooks not counted. Two 4-bit integers are a byte, also in memory."""
    parameters = jax.tree.leaves(nnx.state(model, nnx.Param))
    return sum(a.size * jax.dtypes.itemsize_bits(a.dtype) for a in parameters) // 8
