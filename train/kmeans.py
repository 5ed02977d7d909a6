"""k-means: where codebooks start from."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from astra_jax.codecs.product import lookup, nearest

AT_ONCE = 1024  # vectors whose scores with all codewords are held at once: more leave a CPU's cache
PARTS, ENOUGH, LAST = 4, 8, 3  # see `kmeans`


class Clusters(NamedTuple):
    """What `kmeans` finds.

    Attributes:
      codewords: the means.
      estimate: of every vector the codeword that is nearest; unsettled the mean of its cluster in the last iteration,
        than which another may be a little nearer by now.
      count: how many vectors each codeword is nearest to; unsettled the mean of.
      errors: the mean squared error before every iteration.
    """

    codewords: Float[Array, "G K d"]
    estimate: Float[Array, "M G d"]
    count: Float[Array, "G K"]  # type: ignore[assignment]  # hides tuple.count
    errors: Float[Array, "iterations"]


def assign(y: Float[Array, "M G d"], C: Float[Array, "G K d"]) -> tuple[Int[Array, "M G"], Array, Array]:
    """The codes of all vectors, how many chose each codeword [G,K], and their sums [G,K,d]."""
    M, n = len(y), min(AT_ONCE, len(y))
    chunks = jnp.pad(y, ((0, -M % n), (0, 0), (0, 0))).reshape(-1, n, *y.shape[1:])
    z = jax.lax.map(lambda chunk: nearest(chunk, C), chunks).reshape(-1, y.shape[1])[:M]
    scatter = jax.vmap(lambda values, codes: jax.ops.segment_sum(values, codes, C.shape[1]), in_axes=(1, 1))
    return z, scatter(jnp.ones(z.shape), z), scatter(y, z)


def kmeans(
    y: Float[Array, "M G d"],
    K: int,
    iterations: int,
    key: Key[Array, ""],
    shrink: Float[Array, "G d"] | None = None,
    settle: bool = True,
) -> Clusters:
    """Lloyd's algorithm in every group.

    All iterations but the last `LAST`-th of them see a random part of the vectors, a `PARTS`-th if these are `ENOUGH`
    for every codeword (our choice): half the work of seeing all, for about as small an error. The error never rises
    while all are seen, but for the empty codewords, which start again from a random vector.

    Args:
      shrink: what random vectors are multiplied with to be codewords; by default they are as they are.
      settle: in the end look once more for every vector's nearest codeword, which takes as long as an iteration that
        sees all. The codewords are the same without.
    """
    M, G, d = y.shape
    shrink = jnp.ones((G, d)) if shrink is None else shrink
    size = M // max(1, min(PARTS, M // (ENOUGH * K)))
    first = iterations - -(-iterations // LAST) if size < M else 0
    return _lloyd(y, *_rows(key, M, G, K, iterations, first, size), shrink, settle)


@partial(jax.jit, static_argnums=range(1, 7))
def _rows(
    key: Key[Array, ""], M: int, G: int, K: int, iterations: int, first: int, size: int
) -> tuple[Int[Array, "I G K"], Int[Array, "F size"]]:
    """Random numbers of vectors, a program of their own because it takes as long to compile as `_lloyd`, which every
    width has one of: for all codewords at the start and those that are empty after an iteration, where one drawn twice
    leaves a codeword empty, to be drawn again; and the parts that the first iterations see.
    """
    start_key, *keys = jax.random.split(key, 1 + iterations)
    part_keys, first_keys = jax.vmap(jax.random.split, out_axes=1)(jnp.stack(keys))
    fresh = jnp.stack([start_key, *first_keys[:first], *keys[first:]])
    starts = jax.lax.map(lambda key: jax.random.randint(key, (G, K), 0, M), fresh)
    return starts, jax.lax.map(lambda key: jax.random.permutation(key, M)[:size], part_keys[:first])


@partial(jax.jit, static_argnames="settle")
def _lloyd(
    y: Float[Array, "M G d"],
    starts: Int[Array, "I G K"],
    parts: Int[Array, "F size"],
    shrink: Float[Array, "G d"],
    settle: bool,
) -> Clusters:
    def drawn(rows: Int[Array, "G K"]) -> Float[Array, "G K d"]:
        return jax.vmap(lambda group, row, by: group[row] * by, in_axes=(1, 0, 0))(y, rows, shrink)

    def step(C: Array, fresh: Array, seen: Array) -> tuple[Array, Array, Array, Array]:
        z, count, total = assign(seen, C)
        error = jnp.mean((seen - lookup(C, z)) ** 2)
        C = jnp.where(count[..., None] > 0, total / jnp.maximum(count, 1.0)[..., None], drawn(fresh))
        return C, z, count, error

    def see_part(C: Array, rows: tuple[Array, Array]) -> tuple[Array, Array]:
        C, _, _, error = step(C, rows[0], y[rows[1]])
        return C, error

    def see_all(found: tuple[Array, Array, Array], fresh: Array) -> tuple[tuple[Array, Array, Array], Array]:
        C, z, count, error = step(found[0], fresh, y)
        return (C, z, count), error

    start, of_parts, of_all = jnp.split(starts, (1, 1 + len(parts)))
    C, errors = jax.lax.scan(see_part, drawn(start[0]), (of_parts, parts))
    none = jnp.zeros(y.shape[:2], jnp.int32), jnp.zeros(C.shape[:2])
    (C, z, count), last = jax.lax.scan(see_all, (C, *none), of_all)
    if settle:
        z, count, _ = assign(y, C)
    return Clusters(C, lookup(C, z), count, jnp.concatenate([errors, last]))
