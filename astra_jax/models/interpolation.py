"""Bicubic interpolation of a table of places to another number of patches, as torch computes it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@functools.lru_cache(16)
def weights(given: int, wanted: int, antialias: bool) -> Float[np.ndarray, "wanted given"]:
    """What every one of `given` points weighs in each of `wanted` ones, which are spread over the same length.

    Args:
      antialias: widen the kernel where there are fewer points than before. Torch then has another kernel, too, and
        leaves out what is beyond the ends; else it repeats the last point.
    """
    ratio = given / wanted
    centers = (np.arange(wanted)[:, None] + 0.5) * ratio - 0.5
    if antialias:
        found = _kernel((np.arange(given) - centers) / max(ratio, 1.0), -0.5)
        return (found / found.sum(-1, keepdims=True)).astype(np.float32)
    near = np.floor(centers).astype(int) + np.arange(-1, 3)
    found = np.zeros((wanted, given))
    np.add.at(found, (np.arange(wanted)[:, None], near.clip(0, given - 1)), _kernel(near - centers, -0.75))
    return found.astype(np.float32)


def _kernel(x: Float[np.ndarray, "*shape"], a: float) -> Float[np.ndarray, "*shape"]:
    """Keys' cubic convolution kernel."""
    x = np.abs(x)
    inner, outer = ((a + 2) * x - (a + 3)) * x**2 + 1, a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, inner, np.where(x < 2, outer, 0.0))


def resized(table: Float[Array, "given_squared D"], wanted: int, antialias: bool) -> Float[Array, "wanted_squared D"]:
    """A table of `given x given` places, row by row, as one of `wanted x wanted`."""
    given, D = round(table.shape[0] ** 0.5), table.shape[-1]
    if given == wanted:
        return table
    w = weights(given, wanted, antialias)
    grid = table.astype(jnp.float32).reshape(given, given, D)
    found = jnp.einsum("yi,xj,ijd->yxd", w, w, grid, precision=jax.lax.Precision.HIGHEST)
    return found.reshape(wanted * wanted, D).astype(table.dtype)
