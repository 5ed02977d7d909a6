"""What one device computes, alone: seconds measured here, and operations counted."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from astra_jax.mesh.collectives import Peers
from astra_jax.mesh.sharding import SEQ
from astra_jax.models.blocks import unstacked
from astra_jax.models.key_value_tables import fold
from astra_jax.strategies.base import Single
from astra_jax.strategies.rivals import part

_EXCHANGES = 12  # in a row, as in a model of so many blocks


def wall_seconds(
    calls: Sequence[Callable[[], Any]], repeats: int = 11, together: Callable[[], None] = lambda: None
) -> list[list[float]]:
    """The times of each call in seconds, after two of each to warm up.

    The calls take turns: what slows the machine down for a while slows all of them.

    Args:
      together: called before each, to let several hosts begin at the same time.
    """
    for call in calls:
        for _ in range(2):
            jax.block_until_ready(call())
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, times in zip(calls, seconds, strict=True):
            together()
            start = time.perf_counter()
            jax.block_until_ready(call())
            times.append(time.perf_counter() - start)
    return seconds


def median_seconds(call: Callable[[], Any], repeats: int = 11) -> float:
    """The median time of `call` in seconds, after two calls to warm up."""
    return float(np.median(wall_seconds([call], repeats)))


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
      make: what makes the strategy (`astra_jax.serving.compile.Make`).

    Raises:
      AstraError: the strategy cannot split the model over N devices.
    """

    def strategy_for(inputs: Any) -> Any:
        if N == 1:
            return Single.of(model, 1, inputs)
        return make(model, N, inputs).alone(N)

    if strategy_for(inputs).folds:
        model = fold(model)
    graphdef, state = nnx.split(model)
    work = forward(model, graphdef)

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
        mine = unstacked(mine) if strategy_for(inputs).unstacks else mine
    return Share(run, (mine, inputs, tokens))


def alone(model: Any, N: int, inputs: Any, make: Any) -> Callable[[], Array]:
    """A function that does one device's share of a forward pass, exchange excluded; see `share` for the arguments."""
    mine = share(model, N, inputs, make)
    run = jax.jit(mine.run)
    return lambda: run(*mine.arguments)


def compute_seconds(model: Any, N: int, inputs: Any, make: Any, repeats: int = 11) -> float:
    """The median of the seconds in which one device of N does its share of a forward pass, exchange excluded.

    See `share` for the arguments. The device is the last one, which for a decoder has the most to do.
    """
    return median_seconds(alone(model, N, inputs, make), repeats)


def exchange_latency(mesh: Mesh, repeats: int = 11) -> float:
    """Seconds that an exchange over a mesh takes besides its bits: an all-gather of 4 bytes, one of many in a program.

    Args:
      mesh: of several hosts, all of which call this.
    """

    def chain(x: Array) -> Array:
        return jax.lax.scan(lambda x, _: (Peers(SEQ).gather(x).mean(0), None), x, length=_EXCHANGES)[0]

    run = jax.jit(jax.shard_map(chain, mesh=mesh, in_specs=P(), out_specs=P()))
    return median_seconds(lambda: run(np.zeros((), np.float32)), repeats) / _EXCHANGES
