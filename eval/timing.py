"""What one device computes, alone: seconds measured here, and operations counted."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array

from astra_jax.collectives import Alone
from astra_jax.strategies import Single, part


def wall_seconds(
    call: Callable[[], Any], repeats: int = 11, together: Callable[[], None] = lambda: None
) -> list[float]:
    """The times of `call` in seconds, after two calls to warm up.

    Args:
      together: called before each, to let several hosts begin at the same time.
    """
    for _ in range(2):
        jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        together()
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return seconds


def median_seconds(call: Callable[[], Any], repeats: int = 11) -> float:
    """The median time of `call` in seconds, after two calls to warm up."""
    return float(np.median(wall_seconds(call, repeats)))


def forward(model: Any, graphdef: Any) -> Callable[[Any, Array, Any], Array]:
    """A forward pass as latency means it, `work(state, tokens, strategy)`: the logits, of a language model those of the
    last slot alone (the prompt's end, where that is on this device)."""

    def work(state: Any, tokens: Array, strategy: Any) -> Array:
        merged = nnx.merge(graphdef, state)
        if not model.per_token:
            return merged(tokens, strategy)[0]
        return merged.logits(merged.states(tokens, strategy)[0][:, -1:])

    return work


class Share(NamedTuple):
    """One device's share of a forward pass: `run(*arguments)` computes it. The arguments may be shapes."""

    run: Callable[..., Array]
    arguments: tuple[Any, ...]


def share(model: Any, N: int, inputs: Any, make: Any) -> Share:
    """What the last of N devices computes in a forward pass, the exchange excluded; all of it for N = 1.

    Args:
      model: a model of `astra_jax.models`; may be abstract.
      inputs: what the model takes: images, or a `Text`.
      make: what makes the strategy (`astra_jax.parallel.Make`).

    Raises:
      AstraError: the strategy cannot split the model over N devices.
    """
    graphdef, state = nnx.split(model)
    work = forward(model, graphdef)

    def strategy_for(inputs: Any) -> Any:
        if N == 1:
            return Single.of(model, 1, inputs)
        return dataclasses.replace(make(model, N, inputs), peers=Alone(N))

    def cut(state: Any, inputs: Any) -> tuple[Any, Array]:
        strategy = strategy_for(inputs)
        tokens = strategy.shards.scatter(model.to_tokens(inputs))
        mine = jax.tree.map(lambda a, axis: part(a, axis, N - 1, N), state, strategy.weight_axes(state))
        return mine, tokens[:, -strategy.shards.S :] if strategy.splits_tokens else tokens

    def run(state: Any, inputs: Any, tokens: Array) -> Array:
        return work(state, tokens, strategy_for(inputs))

    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((state, inputs))):
        mine, tokens = jax.eval_shape(cut, state, inputs)
    else:
        mine, tokens = cut(state, inputs)
    return Share(run, (mine, inputs, tokens))


def compute_seconds(model: Any, N: int, inputs: Any, make: Any, repeats: int = 11) -> float:
    """The median of the seconds in which one device of N does its share of a forward pass, exchange excluded.

    See `share` for the arguments. The device is the last one, which for a decoder has the most to do.
    """
    mine = share(model, N, inputs, make)
    run = jax.jit(mine.run)
    return median_seconds(lambda: run(*mine.arguments), repeats)
