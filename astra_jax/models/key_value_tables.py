"""Exact short cuts at the price of memory: keys and values of codewords, computed once instead of in every pass.

Keys and values of a remote token are linear in its codewords: `K^ = sum_g C_g[z_g] Wk_g + b`. So the products of all
codewords with the weights are put into tables (`attention.Folded`), and a token's key and value are G rows of them,
added up. That saves the projection of remote tokens, which is the same on all devices and otherwise limits what N of
them can save. With G=1 the tables also let attention count codewords instead of tokens (`attention.remote_source`).

Of a `nested-pq` codec with too many groups for tables, a token is projected from its few axes at once, instead of from
the vector of width D that these stand for (`attention.Readout`).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from astra_jax.models.attention import Folded, MixedPrecisionAttention, Readout
from astra_jax.models.blocks import block_at

# Operations that a processor does in the time in which it reads a byte from memory. Of a CPU as measured on one x86-64
# core: projecting 768 tokens of ViT-Base, beside adding up their rows of float32 tables of G=32, which fit no cache. Of
# accelerators by data sheets (H200 in bfloat16: 989 TFLOP/s and 4.8 TB/s).
FLOPS_PER_BYTE = {"cpu": 10.0}
FLOPS_PER_BYTE_OF_OTHERS = 200.0


def folding_pays(model: Any, platform: str) -> bool:
    """Whether tables save time, and are not too large.

    A token's rows, `G * 2JE` numbers, must be read in less time than its projection `2 * D * 2JE` takes; and the tables
    may take as much memory as the blocks' weights (our choice). At site `kv` nothing is projected, and a table is only
    there to be counted in, or, of `nested-pq`, to find keys and values without a product.

    Args:
      model: a model with codebooks; may be abstract.
      platform: what it runs on, as JAX names it.
    """
    attention: MixedPrecisionAttention = model.blocks.attention
    codec, L = attention.codec, model.config.num_hidden_layers
    assert codec is not None
    G, K = codec.groups, codec.codewords
    itemsize = model.dtype.itemsize
    if attention.site == "kv" and not codec.rotates:
        return G == 1 and attention.rotary is None
    width = 2 * attention.J * attention.E
    table_bytes = L * G * K * width * itemsize
    weights = sum(math.prod(a.shape) for a in jax.tree.leaves(nnx.state(model.blocks, nnx.Param))) * itemsize
    balance = FLOPS_PER_BYTE.get(platform, FLOPS_PER_BYTE_OF_OTHERS)
    return bool(G * itemsize * balance < 2 * codec.width and table_bytes <= weights)


def fold(model: Any, platform: str | None = None) -> Any:
    """The same model with tables of its codewords' keys and values, or a shorter projection, where that pays; else the
    model itself.

    Args:
      model: a model of `astra_jax.models` with codebooks, which stays as it is. Of an abstract one, shapes stay shapes.
      platform: what it will run on; None for JAX's default.
    """
    attention = model.blocks.attention
    if attention.codec.remembers:  # then attention is given estimates, not codes
        return model
    tables = folding_pays(model, platform or jax.default_backend())
    if not tables and not (attention.codec.rotates and attention.site == "hidden"):
        return model
    of_block, (graphdef, state) = _tables if tables else _readout, nnx.split(attention)

    def make(state: Any) -> Float[Array, "L *shape"]:
        numbers = jnp.arange(model.config.num_hidden_layers)
        return jax.lax.map(lambda n: of_block(block_at(nnx.merge(graphdef, state), n)).astype(model.dtype), numbers)

    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state))
    made = jax.eval_shape(make, state) if abstract else jax.jit(make)(state)
    graphdef, state = nnx.split(model)
    folded = nnx.merge(graphdef, state)
    folded.blocks.attention.tables = Folded(made) if tables else Readout(made)
    return folded


def _readout(attention: Any) -> Float[Array, "axes width"]:
    """Keys and values of a unit vector along every axis of the codec, and in the last row those of its origin."""
    codec, layers = attention.codec, (attention.k, attention.v)
    if attention.site == "kv":
        assert codec.rotates  # or nothing is to be read out: codewords are keys and values
        return jnp.concatenate([codec.synthesis[...], codec.mean[...][None]])
    kernel = jnp.concatenate([layer.kernel[...] for layer in layers], axis=-1).astype(jnp.float32)
    biased = attention.k.bias is not None
    bias = jnp.concatenate([layer.bias[...] for layer in layers]) if biased else jnp.zeros(kernel.shape[1])
    if not codec.rotates:
        return jnp.concatenate([kernel, bias[None]])
    axes, origin = (jnp.matmul(a, kernel, precision="highest") for a in (codec.synthesis[...], codec.mean[...]))
    return jnp.concatenate([axes, (origin + bias)[None]])


def _tables(attention: Any) -> Float[Array, "G K width"]:
    """`C_g [Wk_g Wv_g]`, biases added in the first group."""
    if attention.site == "kv" and not attention.codec.rotates:
        return attention.codec.codebook[...]
    readout = _readout(attention)
    return attention.codec.products(readout[:-1]).at[0].add(readout[-1])
