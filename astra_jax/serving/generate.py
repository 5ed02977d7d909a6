"""Generation on a mesh: prefill on all devices, then decoding on those that hold the end of the prompts.

The longer shards are last, so that the end of every prompt is in the last shard. After prefill its device already has
what decoding needs (paper section 3): keys and values of its own tokens in full precision, and the codes of all others,
which it received block by block. So nothing crosses the link after the first token. The cache keeps remote tokens as
codes; every step decodes them anew.

Texts that are decoded together are the rows of one state, which is donated from step to step. A row is written into it
whole (`enter`), and what another row has is never looked at, so that a text is the same in whatever company.
"""

import dataclasses
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from astra_jax.errors import AstraError
from astra_jax.inputs.token_batches import Text, most_tokens
from astra_jax.mesh.sharding import DATA, SEQ
from astra_jax.models.interface import Kept
from astra_jax.serving.cache import Cache, Decode
from astra_jax.serving.compile import Make, make_for, on_mesh, place
from astra_jax.serving.sampling import Draws, draw
from astra_jax.strategies.base import Single
from astra_jax.strategies.coded import Astra, OnHosts


class Rows(NamedTuple):
    """The texts that are decoded together, on the devices of the last shard.

    Attributes:
      cache: of their prompts, and of all tokens since but the last.
      ids: the last token of each.
      draws: how the next one is drawn.
    """

    cache: Cache
    ids: Int[Array, "B"]
    draws: Draws


def ends_of(mesh: Mesh) -> Mesh:
    """The devices of the last shard, one per data row, where all prompts end.

    Raises:
      AstraError: they are on several hosts, of which none could go on with all prompts.
    """
    ends, (data, hosts) = mesh.devices[:, -1], (mesh.shape[DATA], len({d.process_index for d in mesh.devices.flat}))
    if len({device.process_index for device in ends}) > 1:
        raise AstraError(
            f"--devices {data}x{mesh.shape[SEQ]}: texts end on several of the {hosts} hosts, and one has to go on with "
            f"all of them: use --devices {hosts}, or at least {data}x{hosts}"
        )
    return Mesh(ends, (DATA,))


def prefill_program(model: Any, graphdef: Any, mesh: Mesh, make: Make = Astra.of) -> Any:
    """Prefill on a mesh, jitted: weights and `Text` -> on every device, what decoding from its shard's end needs.

    That is the logits of the last token [B,1,V], what every block kept (`Kept`), how many tokens are its own [B,1],
    and of the remote tokens position and validity [B,R] (None on one device). The weights may be shapes, to compile
    ahead of time.
    """
    N = mesh.shape[SEQ]
    takes_part = isinstance(make, OnHosts) and make.N > 1 and not make.last

    def take_part(state: Any, ids: Array, strategy: Any) -> Any:
        """A host where no prompt ends: what it says on the way is all that is wanted of it."""
        nnx.merge(graphdef, state).states(ids, strategy)
        return jnp.zeros(())

    def work(state: Any, ids: Array, strategy: Any) -> Any:
        model = nnx.merge(graphdef, state)
        states, reports = model.states(ids, dataclasses.replace(strategy, keep=True))
        own = strategy.tokens().valid.sum(-1)  # [B]
        last = jnp.take_along_axis(states, jnp.maximum(own - 1, 0)[:, None, None], axis=1)
        remote = None
        if not isinstance(strategy, Single):
            tokens = strategy.remote_tokens()
            remote = (tokens.position, tokens.valid)
        return model.logits(last), reports.kept, own[:, None], remote

    by_block, by_row = P(None, DATA, SEQ), P(DATA, SEQ)
    specs: Any = (by_row, Kept(*cast(Any, [by_block] * 3)), by_row, by_row)
    if N == 1:  # nothing is remote
        specs = (by_row, specs[1]._replace(content=None), by_row, None)

    @jax.jit
    def prefill(state: Any, text: Text) -> Any:
        strategy = make_for(mesh, make)(model, N, text)
        run = take_part if takes_part else work
        return on_mesh(run, mesh, strategy, specs)(state, model.to_tokens(text))

    return prefill


class Generator:
    """A decoder that is compiled for a (data, seq) mesh: programs for prefill, for rows that enter, and for a step.

    Args:
      model: a causal language model of `astra_jax.models`.
      mesh: from `make_mesh`. Prefill uses all of it; decoding the devices of the last shard, one per data row.
      make: what makes the strategy of prefill, an `Astra`.
      placed: the weights, where `place` has placed them already.

    Raises:
      AstraError: the model is no causal language model, there are several shards and it has no codebooks, or no host
        has the ends of all prompts.
    """

    def __init__(self, model: Any, mesh: Mesh, make: Make = Astra.of, placed: Any = None):
        if not model.per_token:
            raise AstraError("this checkpoint is no language model: it cannot generate text")
        self.model, self.mesh = model, mesh
        self.graphdef, self.state = placed or place(model, mesh, make)
        # Of several hosts only one has the ends of the prompts: the others take part in prefill and are done.
        self.ends = ends_of(mesh)
        self.here = self.ends.devices[0].process_index == jax.process_index()
        if isinstance(make, OnHosts):
            self.here = make.last
        self.end_state = jax.tree.map(lambda a: self._at_the_end(a, P()), self.state) if self.here else None
        self._prefill = prefill_program(model, self.graphdef, mesh, make)
        self._enter = jax.jit(self._run_enter, static_argnames=("count", "room"), donate_argnames="rows")
        self._decode = jax.jit(self._run_decode, donate_argnames="rows")
        self._grow = jax.jit(Cache.with_room, static_argnums=(1, 2))

    def _at_the_end(self, array: Array, spec: P) -> Array:
        """What the devices of the last shard hold of an array, as an array on them alone: nothing moves."""
        pieces = {shard.device: shard.data for shard in array.addressable_shards}
        local = [pieces[device] for device in self.ends.devices]
        shape = [
            n * len(local) if axis == DATA else n for n, axis in zip(local[0].shape, [*spec, *[None] * 9], strict=False)
        ]
        return jax.make_array_from_single_device_arrays(tuple(shape), NamedSharding(self.ends, spec), local)

    def _by_row(self, array: Any) -> Array:
        """An array [B,...] on the devices of the last shard, its rows split over them."""
        return jax.device_put(array, NamedSharding(self.ends, P(DATA)))

    def prefill(self, text: Text) -> tuple[Float[Array, "B V"], Cache] | None:
        """Runs prompts through the model on all devices.

        Args:
          text: the prompts; B must be a multiple of the mesh's data axis.

        Returns:
          The logits of the next token of every prompt, and a cache without room for more, both on the devices of the
          last shard; None where these are on another host.
        """
        found = self._prefill(self.state, text)
        if not self.here:
            jax.block_until_ready(found)
            return None
        logits, kept, own, remote = found
        kept = jax.tree.map(lambda a: self._at_the_end(a, P(None, DATA)), kept)
        logits, own, remote = jax.tree.map(lambda a: self._at_the_end(a, P(DATA)), (logits, own, remote))
        position, valid = remote if remote is not None else (None, None)
        lengths = self._by_row(np.asarray(text.lengths, np.int32))
        return logits[:, 0], Cache(kept.key, kept.value, own[:, 0], lengths, kept.content, position, valid)

    def enter(
        self,
        rows: Rows | None,
        fresh: tuple[Float[Array, "B V"], Cache],
        draws: Draws,
        slots: Int[np.ndarray, "B"],
        *,
        work: int,
        count: int,
        room: tuple[int, int],
    ) -> Rows:
        """Draws the first token of texts, and writes them in the place of others.

        Args:
          rows: where they enter (it is used up); None for none yet.
          fresh: from `prefill`.
          draws: how their tokens are drawn, and `work` the most that this takes (`Sampling.work`).
          slots: for each which row of its device it becomes; -1 for none, where the text is padding.
          count: rows there are, or shall be.
          room: (M, R), for how many own and remote tokens of each; at least what there is.
        """
        if rows is not None and rows.cache.room != room:
            rows = rows._replace(cache=self._grow(rows.cache, *room))
        draws, slots = jax.tree.map(self._by_row, (draws, slots))
        return cast(Rows, self._enter(rows, fresh, draws, slots, work, count=count, room=room))

    def _run_enter(
        self, rows: Rows | None, fresh: Any, draws: Draws, slots: Any, work: Any, count: int, room: tuple[int, int]
    ) -> Rows:
        by_row: Any = P(DATA)
        cache: Any = fresh[1].by_row(lambda _, axis: P(*[None] * axis, DATA))
        specs = Rows(cache, by_row, Draws(*[by_row] * 5))

        def one_device(rows: Rows | None, logits: Array, cache: Cache, draws: Draws, slots: Array, work: Array) -> Rows:
            drawn = draws._replace(place=jnp.asarray(draws.place) + 1)
            new = Rows(cache.with_room(*room), draw(logits, draws, work), drawn)
            return _inserted(_no_rows(new, count // self.ends.size) if rows is None else rows, new, slots)

        # Nothing is exchanged, so there is nothing to prove about replication.
        entered = jax.shard_map(
            one_device,
            mesh=self.ends,
            in_specs=(None if rows is None else specs, by_row, cache, specs.draws, by_row, P()),
            out_specs=specs,
            check_vma=False,
        )
        return entered(rows, fresh[0], fresh[1], draws, slots, jnp.asarray(work))

    def _run_decode(self, state: Any, rows: Rows, work: Any) -> tuple[Rows, Float[Array, "B V"]]:
        model, draws = nnx.merge(self.graphdef, state), rows.draws
        states, reports = model.states(rows.ids[:, None], Decode(rows.cache))
        logits = model.logits(states)[:, 0]
        drawn = draws._replace(place=draws.place + 1)
        return Rows(rows.cache.append(reports.kept), draw(logits, draws, work), drawn), logits

    def decode(self, rows: Rows, work: int) -> tuple[Rows, Float[Array, "B V"]]:
        """One token more of every row: rows (which are used up) -> rows, and the logits that it was drawn from."""
        return cast(tuple[Rows, Array], self._decode(self.end_state, rows, work))

    def check(self, length: int, new_tokens: int) -> None:
        """Raises AstraError if a prompt and its new tokens together are longer than the model's limit."""
        limit = most_tokens(self.model.config)
        if new_tokens < 1:
            raise AstraError(f"the number of new tokens is {new_tokens}; it must be at least 1")
        if length + new_tokens > limit + 1:  # the last token drawn is not read
            raise AstraError(
                f"a prompt of {length} and {new_tokens} new tokens are more than the model takes, {limit}: "
                "ask for fewer or shorten the prompt"
            )


def _no_rows(like: Rows, count: int) -> Rows:
    """So many rows of zeros, each as a row of `like` is."""

    def zeros(a: Any, axis: int = 0) -> Array:
        return jnp.zeros((*a.shape[:axis], count, *a.shape[axis + 1 :]), a.dtype)

    return Rows(like.cache.by_row(zeros), zeros(like.ids), Draws(*map(zeros, like.draws)))


def _inserted(rows: Rows, new: Rows, slots: Int[Array, "B"]) -> Rows:
    """Rows with new ones in their places; -1 for those that have none. All of a row is written, so that nothing is left
    of who was there before."""

    def one(number: Array, rows: Rows) -> Rows:
        there, at = slots[number] >= 0, jnp.maximum(slots[number], 0)

        def put(whole: Any, new: Any, axis: int = 0) -> Array:
            now = jax.lax.dynamic_slice_in_dim(whole, at, 1, axis)
            then = jax.lax.dynamic_slice_in_dim(new, number, 1, axis)
            return jax.lax.dynamic_update_slice_in_dim(whole, jnp.where(there, then, now), at, axis)

        return Rows(rows.cache.by_row(put, new.cache), put(rows.ids, new.ids), Draws(*map(put, rows.draws, new.draws)))

    return cast(Rows, jax.lax.fori_loop(0, len(slots), one, rows))
