"""A model compiled for a mesh: its weights placed on the devices, and its forward pass under `jax.shard_map`."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from astra_jax.mesh.sharding import DATA, SEQ, put
from astra_jax.models.blocks import unstacked
from astra_jax.models.key_value_tables import fold
from astra_jax.strategies.base import Sharded, Single, SplitTokens
from astra_jax.strategies.coded import Astra, AstraPlain, OnHosts
from astra_jax.strategies.rivals import (
    BlockParallel,
    BlockSequenceParallel,
    SequenceParallel,
    TensorParallel,
    part_size,
)

# What several devices can run, by the name of a command line. `of` makes one for a model.
STRATEGIES: dict[str, type[Sharded]] = {
    "single": Single,
    "astra": Astra,
    "astra-plain": AstraPlain,
    "sp": SequenceParallel,
    "tp": TensorParallel,
    "bp-ag": BlockParallel,
    "bp-sp": BlockSequenceParallel,
}

# (model, N, inputs) -> strategy, such as `Astra.of`.
Make = Callable[..., Sharded]


@dataclasses.dataclass(frozen=True)
class Program:
    """A model that is compiled for a mesh: a function of its inputs.

    Attributes:
      run: the jitted function of weights and inputs.
      state: the weights, placed on the mesh.
      in_order: what brings the output of `run` for these inputs into the order of the sequence.
    """

    run: Any
    state: Any
    in_order: Any

    def __call__(self, inputs: Any) -> Array:
        return self.in_order(self.run(self.state, inputs), inputs)

    def lower(self, inputs: Any) -> Any:
        """The lowered program; `.compile().as_text()` of it shows every collective."""
        return self.run.lower(self.state, inputs)


def make_for(mesh: Mesh, make: Make) -> Make:
    """`make`, or where the tokens' axis of the mesh has one device only what makes a `Single`: unless that device is
    one of several hosts'."""
    return make if mesh.shape[SEQ] > 1 or (isinstance(make, OnHosts) and make.N > 1) else Single.of


def weight_specs(strategy: Sharded, state: Any) -> Any:
    """The partition specs of a model's weights: `strategy.weight_axes` over the axis `SEQ`."""
    axes = strategy.weight_axes(state)
    return jax.tree.map(lambda a, axis: P(*[None] * (a.ndim + axis), SEQ) if axis else P(), state, axes)


def shardings(model: Any, mesh: Mesh, make: Make = Astra.of) -> Any:
    """Where the weights of a model go on a mesh, as a state of shardings: to every device all, or what the strategy
    leaves to it. The model may be abstract.

    Raises:
      AstraError: the strategy cannot split this model over these devices.
    """
    N, state = mesh.shape[SEQ], nnx.state(model)
    strategy = make_for(mesh, make)(model, N)
    jax.tree.map(lambda a, axis: axis and part_size(a, axis, N), state, strategy.weight_axes(state))
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), weight_specs(strategy, state))


def place(model: Any, mesh: Mesh, make: Make = Astra.of) -> tuple[Any, Any]:
    """A model's graph, and its weights placed on a mesh by `shardings`. Of an abstract model, shapes stay shapes.

    Among the weights are tables of keys and values (key_value_tables.py), if the strategy `folds` and they pay.
    """
    if make_for(mesh, make)(model, mesh.shape[SEQ]).folds:
        model = fold(model, mesh.devices.flat[0].platform)
    where = shardings(model, mesh, make)
    graphdef, state = nnx.split(model)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state)):
        return graphdef, jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, where)
    state = jax.tree.map(put, state, where)
    return graphdef, unstacked(state) if make_for(mesh, make)(model, mesh.shape[SEQ]).unstacks else state


def on_mesh(work: Any, mesh: Mesh, strategy: Sharded, out_specs: Any) -> Any:
    """`work(state, tokens, strategy)` on every device of a mesh, as a function of state and all tokens [B,T,...].

    To be called within `jax.jit`, because the lengths of the strategy's shards may be traced.
    """
    N, shards = mesh.shape[SEQ], strategy.shards
    if isinstance(strategy, SplitTokens) and strategy.transport.loses:  # the program is this host's alone
        return lambda state, tokens: work(state, strategy.mine(shards.scatter(tokens)), strategy)
    ragged = not isinstance(shards.lengths, tuple)

    def one_device(state: Any, tokens: Array, lengths: Any) -> Any:
        here = dataclasses.replace(shards, lengths=lengths) if ragged else shards
        return work(state, tokens, dataclasses.replace(strategy, shards=here))

    def run(state: Any, tokens: Array) -> Any:
        slots = shards.scatter(tokens)
        specs = (weight_specs(strategy, state), P(DATA, SEQ if strategy.splits_tokens else None), P(DATA))
        # With one shard there is nothing to prove about replication over SEQ, and no collective that would.
        sharded = jax.shard_map(one_device, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=N > 1)
        if not ragged:
            return sharded(state, slots, None)
        # Every device finds the slots by itself: else XLA may split this, too, and send a few bytes of it.
        slots = jax.lax.with_sharding_constraint(slots, NamedSharding(mesh, P(DATA)))
        return sharded(state, slots, shards.lengths)

    return run


def parallelize(model: Any, mesh: Mesh, make: Make = Astra.of, placed: Any = None) -> Program:
    """Jit-compiles `model` for a (data, seq) mesh of N = `mesh.shape["seq"]` devices over the tokens.

    Args:
      model: a model of `astra_jax.models`; its weights are placed on the devices.
      mesh: from `make_mesh`.
      make: what makes the strategy, such as `TensorParallel.of`; by default ASTRA. With N = 1 it is `Single`.
      placed: the weights, where `place` has placed them already.

    Returns:
      A function from the model's input (for ViT: images [B, height, width, channels]; for text: `Text`) to its output:
      one row per sequence, or, from a language model, one per token. Any batch size goes; it is padded to a multiple
      of the mesh's data axis.

    Raises:
      AstraError: the strategy cannot split this model over N devices: there are more devices than tokens, say, or
        ASTRA lacks codebooks.
    """
    make = make_for(mesh, make)
    graphdef, state = placed or place(model, mesh, make)
    N, batches = mesh.shape[SEQ], mesh.shape[DATA]

    def work(state: Any, tokens: Array, strategy: Any) -> Array:
        return nnx.merge(graphdef, state)(tokens, strategy)[0]

    @jax.jit
    def run(state: Any, inputs: Any) -> Array:
        B = jax.tree.leaves(inputs)[0].shape[0]
        padded = jax.tree.map(lambda a: jnp.pad(a, [(0, -B % batches)] + [(0, 0)] * (a.ndim - 1), "edge"), inputs)
        strategy = make(model, N, padded)
        by_token = model.per_token and strategy.splits_tokens
        sharded = on_mesh(work, mesh, strategy, P(DATA, SEQ) if by_token else P(DATA))
        return sharded(state, model.to_tokens(padded))[:B]

    # A program of its own: what it moves is the answer, and no part of the network. Every host gets all of it.
    @partial(jax.jit, out_shardings=NamedSharding(mesh, P()) if mesh.is_multi_process else None)
    def in_order(out: Array, inputs: Any) -> Array:
        if not model.per_token:
            return out
        return make(model, N, inputs).shards.gather(out, model.to_tokens(inputs).shape[1])

    return Program(run, state, in_order)
