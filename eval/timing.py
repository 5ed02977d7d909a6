"""Seconds that one device computes, measured here."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from astra_jax.strategies import OneOfN, Single


def median_seconds(call: Callable[[], Any], repeats: int = 11) -> float:
    """The median time of `call` in seconds, after two calls to warm up."""
    for _ in range(2):
        jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def compute_seconds(model: Any, N: int, batch: int = 1) -> float:
    """Seconds in which one device of N does its share of a forward pass, exchange excluded; all of it for N = 1."""
    graphdef, state = nnx.split(model)
    shards = model.shards(N)
    strategy = OneOfN(shards) if N > 1 else Single(shards)

    @jax.jit
    def forward(state: Any, tokens: Array) -> Array:
        return nnx.merge(graphdef, state)(tokens, strategy)[0]

    tokens = jnp.zeros((batch, shards.S, model.embed.in_features))
    return median_seconds(lambda: forward(state, tokens))
