"""Relative positions as MPNet and T5 have them: what a score gets by how far its key is from its query."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from astra_jax.mesh.sharding import Table
from astra_jax.models.interface import Bias

BUCKETS, EXACT, FARTHEST = 32, 8, 128  # of both directions; distances of their own; whence all are alike


def _by_distance() -> Int[np.ndarray, "distances"]:
    """The bucket of every distance up to `FARTHEST`: its own below `EXACT`, from there on by its logarithm."""
    n = np.arange(FARTHEST + 1, dtype=np.float32)
    each = BUCKETS // 2 - EXACT
    logarithm = np.log(np.maximum(n, 1) / EXACT) / np.float32(math.log(FARTHEST / EXACT))
    return np.where(n < EXACT, n, np.minimum(EXACT + each * logarithm, BUCKETS // 2 - 1)).astype(np.int32)


BY_DISTANCE = _by_distance()


def bucket(away: Int[Table, "*places"]) -> Int[Array, "*places"]:
    """Of keys that are so many places before their query, or behind it where that is negative."""
    return jnp.asarray(BY_DISTANCE)[jnp.minimum(abs(away), FARTHEST)] + BUCKETS // 2 * (away < 0)


class RelativePositions(NamedTuple):
    """A table that all blocks share: what scores of every head get in every bucket."""

    table: Float[Array, "buckets H"]

    def bias(self, queries: Int[Table, "*B S"], keys: Int[Table, "*B R"]) -> Bias:
        """For queries and keys at these places in the sequence."""
        return Bias(self.table, bucket(jnp.asarray(queries)[..., :, None] - jnp.asarray(keys)[..., None, :]))
