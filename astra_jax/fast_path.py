"""Exact short cuts at the price of memory: keys and values of codewords, computed once instead of in every pass.

Keys and values of a remote token are linear in its codewords: `K^ = sum_g C_g[z_g] Wk_g + b`. So the products of all
codewords with the weights are put into tables (`attention.Folded`), and a token's key and value are G rows of them,
added up. That saves the projection of remote tokens, which is the same on all devices and otherwise limits what N of
them can save. With G=1 the tables also let attention count codewords instead of tokens (`attention.remote_source`).
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from astra_jax.attention import Folded, MixedPrecisionAttention
from astra_jax.weights import dequantized

# Operations that a processor does in the time in which it reads a byte from memory: of a CPU as `python -m eval.pieces`
# measures it, of accelerators by their data sheets (an H200 in bfloat16: 989 TFLOP/s and 4.8 TB/s).
FLOPS_PER_BYTE = {"cpu": 10.0}
FLOPS_PER_BYTE_OF_OTHERS = 200.0


def folding_pays(model: Any, platform: str) -> bool:
    """Whether tables save time, and are not too large.

    A token's rows, `G * 2JE` numbers, must be read in less time than its projection `2 * D * 2JE` takes; and the tables
    may take as much memory as the blocks' weights (our choice). At site `kv` nothing is projected, and a table is only
    there to be counted in.

    Args:
      model: a model with codebooks; may be abstract.
      platform: what it runs on, as JAX names it.
    """
    attention: MixedPrecisionAttention = model.blocks.attention
    L, G, K, d = attention.codec.codebook.shape  # type: ignore[union-attr]
    itemsize = model.dtype.itemsize
    if attention.site == "kv":
        return G == 1 and attention.rotary is None
    width = 2 * attention.J * attention.E
    table_bytes = L * G * K * width * itemsize
    weights = sum(math.prod(a.shape) for a in jax.tree.leaves(nnx.state(model.blocks, nnx.Param))) * itemsize
    balance = FLOPS_PER_BYTE.get(platform, FLOPS_PER_BYTE_OF_OTHERS)
    return bool(G * itemsize * balance < 2 * G * d and table_bytes <= weights)


def fold(model: Any, platform: str | None = None) -> Any:
    """The same model with tables of its codewords' keys and values, where that pays; else the model itself.

    Args:
      model: a model of `astra_jax.models` with codebooks, which stays as it is. Of an abstract one, shapes stay shapes.
      platform: what it will run on; None for JAX's default.
    """
    if not folding_pays(model, platform or jax.default_backend()):
        return model
    graphdef, state = nnx.split(model)
    folded = nnx.merge(graphdef, state)
    attention = folded.blocks.attention
    C, k, v = (nnx.state(part) for part in (attention.codec, attention.k, attention.v))
    make = partial(_codewords if attention.site == "kv" else _tables, dtype=model.dtype)
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((C, k, v)))
    attention.folded = Folded(jax.eval_shape(make, C, k, v) if abstract else jax.jit(make)(C, k, v))
    return folded


def _codewords(codec: Any, k: Any, v: Any, dtype: Any) -> Float[Array, "L G K width"]:
    """At site `kv` codewords are keys and values already."""
    return codec["codebook"][...].astype(dtype)


def _tables(codec: Any, k: Any, v: Any, dtype: Any) -> Float[Array, "L G K width"]:
    """`C_g [Wk_g Wv_g]` of all blocks, biases added in the first group."""

    def one_block(block: tuple[Array, Any, Any]) -> Array:
        C, *layers = block
        G, _, d = C.shape
        layers = [dequantized(layer) for layer in layers]
        kernel = jnp.concatenate([layer["kernel"][...] for layer in layers], axis=-1).reshape(G, d, -1)
        table = jnp.einsum("gkd,gdf->gkf", C, kernel.astype(C.dtype), precision="highest")
        if "bias" in layers[0]:
            table = table.at[0].add(jnp.concatenate([layer["bias"][...] for layer in layers], axis=-1))
        return table.astype(dtype)

    return jax.lax.map(one_block, (codec["codebook"][...], k, v))
