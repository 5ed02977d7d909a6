"""k-means: where codebooks start from."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from astra_jax.quantizer import lookup, nearest

AT_ONCE = 1024  # vectors whose scores with all codewords are held at once: more leave a CPU's cache
PARTS, ENOUGH, LAST = 4, 8, 4  # see `kmeans`


def assign(y: Float[Array, "M G d"], C: Float[Array, "G K d"]) -> tuple[Int[Array, "M G"], Array, Array]:
    """The codes of all vectors, how many chose each codeword [G,K], and their sums [G,K,d]."""
    M, n = len(y), min(AT_ONCE, len(y))
    chunks = jnp.pad(y, ((0, -M % n), (0, 0), (0, 0))).reshape(-1, n, *y.shape[1:])
    z = jax.lax.map(lambda chunk: nearest(chunk, C), chunks).reshape(-1, y.shape[1])[:M]
    scatter = jax.vmap(lambda values, codes: jax.ops.segment_sum(values, codes, C.shape[1]), in_axes=(1, 1))
    return z, scatter(jnp.ones(z.shape), z), scatter(y, z)


def kmeans(
    y: Float[Array, "M G d"], K: int, iterations: int, key: Key[Array, ""]
) -> tuple[Float[Array, "G K d"], Float[Array, "iterations"]]:
    """Lloyd's algorithm in every group: codewords, and the mean squared error of every iteration.

    All but the last `LAST` iterations see a random part of the vectors, a `PARTS`-th of them if these are `ENOUGH` for
    every codeword (our choice): half the work of seeing all, for about as small an error. The error never rises
    while all are seen, but for the empty codewords, which start again from a random vector.
    """
    M, G, _ = y.shape
    size = M // max(1, min(PARTS, M // (ENOUGH * K)))
    start_key, *keys = jax.random.split(key, 1 + iterations)

    def draw(key: Key[Array, ""]) -> Array:
        """K random vectors for every group [G,K,d]. One drawn twice leaves a codeword empty, to be drawn again."""
        rows = jax.random.randint(key, (G, K), 0, M)
        return jax.vmap(lambda group, row: group[row], in_axes=(1, 0))(y, rows)

    def step(before: Array, key: Key[Array, ""], seen: Array) -> tuple[Array, Array]:
        z, count, total = assign(seen, before)
        C = jnp.where(count[..., None] > 0, total / jnp.maximum(count, 1.0)[..., None], draw(key))
        return C, jnp.mean((seen - lookup(before, z)) ** 2)

    def of_part(before: Array, key: Key[Array, ""]) -> tuple[Array, Array]:
        rows_key, key = jax.random.split(key)
        return step(before, key, y[jax.random.permutation(rows_key, M)[:size]])

    def of_all(before: Array, key: Key[Array, ""]) -> tuple[Array, Array]:
        return step(before, key, y)

    first = max(0, iterations - LAST) if size < M else 0
    C, errors = draw(start_key), []
    for one, some in ((of_part, keys[:first]), (of_all, keys[first:])):
        if some:
            C, error = jax.lax.scan(one, C, jnp.stack(some))
            errors.append(error)
    return C, jnp.concatenate(errors)
