"""How one model is run: what is split, where remote keys and values come from, and what crosses the link.

A strategy is a small object that a model is called with; models never mention a mesh axis. All offer

    positions()                  place of every slot in the sequence, class tokens not included
    prepend_class(cls, x)        puts the class token at the head of every shard that is here
    exchange(codec, y, carry, block) -> (Remote | None, carry, report)
    cached(block)                further sources of a block: keys and values of earlier calls
    local_mask()                 which local tokens a local query sees
    pool(x, pooling)             the state that a head reads
    wire_bits(codec)             bits that one device sends per block
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from astra_jax import collectives, wire
from astra_jax.attention import Source
from astra_jax.errors import AstraError
from astra_jax.quantizer import VectorQuantizer
from astra_jax.sharding import DATA, SEQ, Pooling, Shards, Table, Tokens


class Remote(NamedTuple):
    """Remote tokens as attention gets them.

    Attributes:
      message: codes [B,R,G], or an estimate [B,R,D] of what the codes stand for.
      position: their places in the sequence, for rotary embeddings.
      mask: which query sees which remote token, broadcastable to [B,S,R].
    """

    message: Shaped[Array, "B R _"]
    position: Int[Table, "*B R"]
    mask: Bool[Array, "*#B #S R"]


def visible(
    keys: Tokens, queries: Tokens, causal: bool, received: Bool[Array, "*B R"] | None = None
) -> Bool[Array, "*B queries R"]:
    """Which remote tokens a query can attend to: real ones that are sent and arrived (a lost code is masked out).

    Shards are contiguous, so that for a decoder a remote shard lies wholly before a query, or wholly after it.
    """
    mask = jnp.asarray(keys.valid) & jnp.asarray(keys.sent)
    mask = (mask if received is None else mask & received)[..., None, :]
    if causal:
        mask = mask & jnp.asarray(keys.shard[..., None, :] < queries.shard[..., :, None])
    return mask


def need_codec(codec: VectorQuantizer | None) -> VectorQuantizer:
    """The codec, or an AstraError that says how to get one."""
    if codec is None:
        raise AstraError("this checkpoint has no codebooks, so it runs on one device only: run `astra calibrate` first")
    return codec


class Noise(NamedTuple):
    """Noise-Augmented Quantization: `strength` is lambda (the paper's best is 1), `key` drives the noise."""

    key: Key[Array, ""]
    strength: float


@dataclasses.dataclass(frozen=True)
class _Strategy:
    """What all strategies share: the slots that are here, and who sees whom among them.

    Attributes:
      shards: the split.
      keep: report every block's keys, values and remote codes (`attention.Kept`), for a cache.
    """

    shards: Shards
    keep: bool = dataclasses.field(default=False, kw_only=True)

    def _mine(self, table: Shaped[Table, "*B N S"]) -> Shaped[Table, "*B slots"]:
        """What a table of all slots says of those that are here: all of them, on one device."""
        return table.reshape(*table.shape[:-2], -1)

    def _total(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The sum over all devices of what each has."""
        return x

    def tokens(self) -> Tokens:
        """The attributes of the slots that are here."""
        return Tokens(*(self._mine(a) for a in self.shards.tokens()))

    def positions(self) -> Int[Table, "*B S"]:
        return self._mine(self.shards.index())

    def prepend_class(self, cls: Float[Array, "*B D"], x: Float[Array, "B slots D"]) -> Float[Array, "B more D"]:
        B, _, D = x.shape
        shards = x.reshape(B, -1, self.shards.S, D)
        heads = jnp.broadcast_to(jnp.reshape(cls, (-1, 1, 1, D)), (B, shards.shape[1], 1, D))
        return jnp.concatenate([heads, shards], axis=2).reshape(B, -1, D)

    def cached(self, block: Any) -> list[Source]:
        return []

    def local_mask(self) -> Bool[Array, "*B queries keys"]:
        tokens = self.tokens()
        mask = tokens.valid[..., None, :]
        if self.shards.causal:
            mask = mask & (tokens.position[..., None, :] <= tokens.position[..., :, None])
        return jnp.asarray(mask)

    def pool(self, x: Float[Array, "B S D"], pooling: Pooling) -> Float[Array, "B D"]:
        weights = jnp.asarray(self._mine(self.shards.weights(pooling)), x.dtype)
        return self._total(jnp.einsum("bsd,bs->bd", x, jnp.broadcast_to(weights, x.shape[:2])))


@dataclasses.dataclass(frozen=True)
class Single(_Strategy):
    """The whole sequence on one device; nothing is exchanged. The reference that everything is compared with.

    Attributes:
      shards: one shard.
      capture: report every block's quantizer input `y`, for calibration.
    """

    capture: bool = False

    def exchange(self, codec: VectorQuantizer | None, y: Array, carry: Any, block: Any) -> tuple[None, Any, Any]:
        return None, carry, y if self.capture else None

    def wire_bits(self, codec: VectorQuantizer | None) -> int:
        return 0


@dataclasses.dataclass(frozen=True)
class Virtual(_Strategy):
    """ASTRA's mathematics on one device, from a shard index per token: N virtual shards.

    The reference that every sharded path is tested against, and what training and one-device evaluation use for any
    N. Every query meets every token twice, once as a local and once as a remote one, and masks pick the right one.

    Attributes:
      shards: the split.
      noise: given in training: remote tokens are noisy estimates with straight-through gradients, and every block
        reports an `Observation`.
      received: [B, slots] which codes arrived; None for all. A token that did not arrive is masked out.
    """

    noise: Noise | None = None
    received: Bool[Array, "B slots"] | None = None

    def exchange(self, codec: VectorQuantizer | None, y: Array, carry: Any, block: Any) -> tuple[Remote, Any, Any]:
        codec = need_codec(codec)
        tokens = self.tokens()
        z = codec.encode(y)
        elsewhere = jnp.asarray(tokens.shard[:, None] != tokens.shard[None, :])
        mask = visible(tokens, tokens, self.shards.causal, self.received) & elsewhere
        if self.noise is None:
            return Remote(z, tokens.position, mask), carry, None
        noise_key, revive_key = jax.random.split(jax.random.fold_in(self.noise.key, block))
        estimate = codec.straight_through(y, z, noise_key, self.noise.strength)
        seen = codec.observe(y, z, revive_key, jnp.asarray(tokens.valid & tokens.sent))
        return Remote(estimate, tokens.position, mask), carry, seen

    def local_mask(self) -> Bool[Array, "*B queries keys"]:
        shard = self.tokens().shard
        return super().local_mask() & jnp.asarray(shard[:, None] == shard[None, :])

    def wire_bits(self, codec: VectorQuantizer | None) -> int:
        return need_codec(codec).wire_bits(self.shards.sent_slots)


@dataclasses.dataclass(frozen=True)
class Astra(_Strategy):
    """ASTRA on a mesh: this device's shard, under `jax.shard_map` over the axis `SEQ` (paper section 3).

    Attributes:
      shards: the split.
    """

    def _index(self) -> Any:
        return collectives.shard_index(SEQ)

    def _mine(self, table: Shaped[Table, "*B N S"]) -> Shaped[Array, "*B S"]:
        return jnp.take(jnp.asarray(table), self._index(), axis=-2)

    def _total(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return collectives.sum_over_shards(x, SEQ)

    def exchange(self, codec: VectorQuantizer | None, y: Array, carry: Any, block: Any) -> tuple[Remote, Any, None]:
        codec = need_codec(codec)
        B, home, sent = y.shape[0], self.shards.home_slots, self.shards.sent_slots
        z = codec.encode(y[:, home:])
        packed = wire.pack(z.reshape(B, -1), codec.bits)
        arrived = wire.unpack(self._gather(packed), sent * codec.groups, codec.bits)  # [N-1,B,S*G]
        codes = arrived.reshape(-1, B, sent, codec.groups).swapaxes(0, 1).reshape(B, -1, codec.groups)
        keys = self.remote_tokens()
        return Remote(codes, keys.position, visible(keys, self.tokens(), self.shards.causal)), carry, None

    def remote_tokens(self) -> Tokens:
        """The attributes of the tokens that the other devices send, in the order in which they arrive."""
        others, home = self._others(), self.shards.home_slots
        tables = (jnp.take(jnp.asarray(a[..., home:]), others, axis=-2) for a in self.shards.tokens())
        return Tokens(*(table.reshape(*table.shape[:-2], -1) for table in tables))

    def _gather(self, packed: Array) -> Array:
        return collectives.gather_codes(packed, SEQ)

    def _others(self) -> Array:
        return collectives.others(SEQ)

    def wire_bits(self, codec: VectorQuantizer | None) -> int:
        return need_codec(codec).wire_bits(self.shards.sent_slots)


@dataclasses.dataclass(frozen=True)
class OneOfN(Astra):
    """The work of one device of N without the others: its own codes stand in for theirs. Only for timing.

    It is the last device, which for a decoder is the one that sees all others.
    """

    def _index(self) -> Any:
        return self.shards.N - 1

    def _total(self, x: Array) -> Array:
        return x

    def _gather(self, packed: Array) -> Array:
        return jnp.broadcast_to(packed, (self.shards.N - 1, *packed.shape))

    def _others(self) -> Array:
        return jnp.arange(self.shards.N - 1)


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


def place(model: Any, mesh: Mesh) -> tuple[Any, Any]:
    """A model's graph, and its weights placed on every device of a mesh (shapes stay shapes, for an abstract model).

    Raises:
      AstraError: N > 1 and the model has no codebooks.
    """
    if mesh.shape[SEQ] > 1:
        need_codec(model.codec)
    graphdef, state = nnx.split(model)
    everywhere = NamedSharding(mesh, P())
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state)):
        return graphdef, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), state)
    return graphdef, jax.device_put(state, everywhere)


def on_mesh(work: Any, mesh: Mesh, shards: Shards, out_specs: Any) -> Any:
    """`work(state, tokens, strategy)` on every device of a mesh, as a function of state and all tokens [B,T,...].

    The strategy is ASTRA over N = `mesh.shape["seq"]` devices, one device for N = 1. To be called within `jax.jit`,
    because the lengths of `shards` may be traced.
    """
    N = mesh.shape[SEQ]
    ragged = not isinstance(shards.lengths, tuple)

    def one_shard(state: Any, tokens: Array, lengths: Any) -> Any:
        here = dataclasses.replace(shards, lengths=lengths) if ragged else shards
        return work(state, tokens, Astra(here) if N > 1 else Single(here))

    # With one shard there is nothing to prove about replication over SEQ, and no collective that would.
    specs = (P(), P(DATA, SEQ), P(DATA))
    sharded = jax.shard_map(one_shard, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=N > 1)

    def run(state: Any, tokens: Array) -> Any:
        slots = shards.scatter(tokens)
        if not ragged:
            return sharded(state, slots, None)
        # Every device finds the slots by itself: else XLA may split this, too, and send a few bytes of it.
        slots = jax.lax.with_sharding_constraint(slots, NamedSharding(mesh, P(DATA)))
        return sharded(state, slots, shards.lengths)

    return run


def parallelize(model: Any, mesh: Mesh) -> Program:
    """Jit-compiles `model` for a (data, seq) mesh: ASTRA over N = `mesh.shape["seq"]` devices, one device for N = 1.

    Args:
      model: a model of `astra_jax.models`; its weights are placed on every device.
      mesh: from `make_mesh`.

    Returns:
      A function from the model's input (for ViT: images [B, height, width, channels]; for text: `Text`) to its output:
      one row per sequence, or, from a language model, one per token. Any batch size goes; it is padded to a multiple
      of the mesh's data axis.

    Raises:
      AstraError: there are more devices than tokens, or N > 1 and the model has no codebooks.
    """
    graphdef, state = place(model, mesh)
    N, batches = mesh.shape[SEQ], mesh.shape[DATA]
    model.shards(N)

    def work(state: Any, tokens: Array, strategy: Any) -> Array:
        return nnx.merge(graphdef, state)(tokens, strategy)[0]

    @jax.jit
    def run(state: Any, inputs: Any) -> Array:
        B = jax.tree.leaves(inputs)[0].shape[0]
        padded = jax.tree.map(lambda a: jnp.pad(a, [(0, -B % batches)] + [(0, 0)] * (a.ndim - 1), "edge"), inputs)
        tokens, shards = model.to_tokens(padded), model.shards(N, padded)
        sharded = on_mesh(work, mesh, shards, P(DATA, SEQ) if model.per_token else P(DATA))
        return sharded(state, tokens)[:B]

    @jax.jit  # a program of its own: what it moves is the answer, and no part of the network
    def in_order(out: Array, inputs: Any) -> Array:
        return model.shards(N, inputs).gather(out, model.to_tokens(inputs).shape[1]) if model.per_token else out

    return Program(run, state, in_order)
