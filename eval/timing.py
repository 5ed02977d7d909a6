"""Seconds that one device computes, measured here."""

import time
from collections.abc import Callable
from typing import Any

import jax
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


def compute_seconds(model: Any, N: int, inputs: Any) -> float:
    """Seconds in which one device of N does its share of a forward pass, exchange excluded; all of it for N = 1.

    Args:
      model: a model of `astra_jax.models`. Of a language model it is prefill: all states, and the logits of the last
        token. The device is the last one, which for a decoder has the most to do.
      inputs: what the model takes: images, or a `Text`.
    """
    graphdef, state = nnx.split(model)
    shards = model.shards(N, inputs)
    tokens = shards.scatter(model.to_tokens(inputs))[:, -shards.S :]

    @jax.jit
    def forward(state: Any, inputs: Any, tokens: Array) -> Array:
        model = nnx.merge(graphdef, state)
        shards = model.shards(N, inputs)
        strategy = OneOfN(shards) if N > 1 else Single(shards)
        if not model.per_token:
            return model(tokens, strategy)[0]
        return model.logits(model.states(tokens, strategy)[0][:, -1:])

    return median_seconds(lambda: forward(state, inputs, tokens))
