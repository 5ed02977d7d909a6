"""k-means: where codebooks start from."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from astra_jax.quantizer import nearest


def assign(y: Float[Array, "M G d"], C: Float[Array, "G K d"]) -> tuple[Int[Array, "M G"], Array, Array]:
    """The codes of all vectors, how many chose each codeword [G,K], and their sums [G,K,d]."""
    z = nearest(y, C)
    scatter = jax.vmap(lambda values, codes: jax.ops.segment_sum(values, codes, C.shape[1]), in_axes=(1, 1))
    return z, scatter(jnp.ones(z.shape), z), scatter(y, z)


def lookup(C: Float[Array, "G K d"], z: Int[Array, "M G"]) -> Float[Array, "M G d"]:
    """The codewords that codes stand for."""
    return jax.vmap(lambda c, k: c[k], in_axes=(0, 1), out_axes=1)(C, z)


def kmeans(
    y: Float[Array, "M G d"], K: int, iterations: int, key: Key[Array, ""]
) -> tuple[Float[Array, "G K d"], Float[Array, "iterations"]]:
    """Lloyd's algorithm in every group: codewords, and the mean squared error of every iteration, which never rises
    but for the empty codewords, which start again from a random vector."""
    M, G, _ = y.shape
    start_key, *keys = jax.random.split(key, 1 + iterations)

    def draw(key: Key[Array, ""]) -> Array:
        """K random vectors for every group [G,K,d]. One drawn twice leaves a codeword empty, to be drawn again."""
        rows = jax.random.randint(key, (G, K), 0, M)
        return jax.vmap(lambda group, row: group[row], in_axes=(1, 0))(y, rows)

    def step(before: Array, key: Key[Array, ""]) -> tuple[Array, Array]:
        z, count, total = assign(y, before)
        C = jnp.where(count[..., None] > 0, total / jnp.maximum(count, 1.0)[..., None], draw(key))
        return C, jnp.mean((y - lookup(before, z)) ** 2)

    return jax.lax.scan(step, draw(start_key), jnp.stack(keys))
