"""How one model is run: what is split, where remote keys and values come from, and what crosses the link.

A strategy is a small object that a model is called with; models never mention a mesh axis. It offers

    positions()                  place of every slot in the sequence, class tokens not included
    prepend_class(cls, x)        puts the class token at the head of every shard that it holds
    exchange(codec, y, carry, block) -> (Remote | None, carry, report)
    local_mask()                 which local tokens a local query sees
    pool_class(x)                the class state that the head reads
    wire_bits(codec)             bits that one device sends per block
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from astra_jax import collectives, wire
from astra_jax.errors import AstraError
from astra_jax.quantizer import VectorQuantizer
from astra_jax.sharding import DATA, SEQ, Shards, Tokens


class Remote(NamedTuple):
    """Remote tokens as attention gets them.

    Attributes:
      message: codes [B,R,G], or an estimate [B,R,D] of what the codes stand for.
      mask: which query sees which remote token, broadcastable to [B,S,R].
    """

    message: Shaped[Array, "B R _"]
    mask: Bool[Array, "*#B #S R"]


def visible(keys: Tokens, received: Bool[Array, "*B R"] | None = None) -> Bool[Array, "*B 1 R"]:
    """Which remote tokens can be attended to: real ones that are sent and arrived (a lost code is masked out)."""
    mask = jnp.asarray(keys.valid) & jnp.asarray(keys.sent)
    return (mask if received is None else mask & received)[..., None, :]


def need_codec(codec: VectorQuantizer | None) -> VectorQuantizer:
    """The codec, or an AstraError that says how to get one."""
    if codec is None:
        raise AstraError("this checkpoint has no codebooks, so it runs on one device only: run `astra calibrate` first")
    return codec


@dataclasses.dataclass(frozen=True)
class Single:
    """The whole sequence on one device; nothing is exchanged. The reference that everything is compared with.

    Attributes:
      T: tokens in the sequence, class token not counted.
      capture: report every block's quantizer input `y`, for calibration.
    """

    T: int
    capture: bool = False

    def positions(self) -> Int[np.ndarray, "T"]:
        return np.arange(self.T)

    def prepend_class(self, cls: Float[Array, "D"], x: Float[Array, "B T D"]) -> Float[Array, "B S D"]:
        return jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], 1, x.shape[2])), x], axis=1)

    def exchange(self, codec: VectorQuantizer | None, y: Array, carry: Any, block: Any) -> tuple[None, Any, Any]:
        return None, carry, y if self.capture else None

    def local_mask(self) -> Bool[Array, "1 1"]:
        return jnp.ones((1, 1), bool)

    def pool_class(self, x: Float[Array, "B S D"]) -> Float[Array, "B D"]:
        return x[:, 0]

    def wire_bits(self, codec: VectorQuantizer | None) -> int:
        return 0


class Noise(NamedTuple):
    """Noise-Augmented Quantization: `strength` is lambda (the paper's best is 1), `key` drives the noise."""

    key: Key[Array, ""]
    strength: float


@dataclasses.dataclass(frozen=True)
class Virtual:
    """ASTRA's mathematics on one device, from a shard index per token: N virtual shards.

    The reference that every sharded path is tested against, and what training and one-device evaluation use for any
    N. Every query meets every token twice, once as a local and once as a remote one, and masks pick the right one.

    Attributes:
      shards: the split.
      noise: given in training: remote tokens are noisy estimates with straight-through gradients, and every block
        reports an `Observation`.
      received: [B, slots] which codes arrived; None for all. A token that did not arrive is masked out.
    """

    shards: Shards
    noise: Noise | None = None
    received: Bool[Array, "B slots"] | None = None

    def positions(self) -> Int[np.ndarray, "slots"]:
        return self.shards.index().reshape(-1)

    def _tokens(self) -> Tokens:
        return Tokens(*(a.reshape(-1) for a in self.shards.tokens()))

    def prepend_class(self, cls: Float[Array, "D"], x: Float[Array, "B slots D"]) -> Float[Array, "B more D"]:
        B, _, D = x.shape
        shards = x.reshape(B, self.shards.N, self.shards.S, D)
        heads = jnp.broadcast_to(cls, (B, self.shards.N, 1, D))
        return jnp.concatenate([heads, shards], axis=2).reshape(B, -1, D)

    def _same_shard(self) -> Bool[np.ndarray, "slots slots"]:
        shard = self._tokens().shard
        return np.asarray(shard[:, None] == shard[None, :])

    def exchange(self, codec: VectorQuantizer | None, y: Array, carry: Any, block: Any) -> tuple[Remote, Any, Any]:
        codec = need_codec(codec)
        tokens = self._tokens()
        z = codec.encode(y)
        mask = visible(tokens, self.received) & ~self._same_shard()
        if self.noise is None:
            return Remote(z, mask), carry, None
        noise_key, revive_key = jax.random.split(jax.random.fold_in(self.noise.key, block))
        estimate = codec.straight_through(y, z, noise_key, self.noise.strength)
        seen = codec.observe(y, z, revive_key, jnp.asarray(tokens.valid & tokens.sent))
        return Remote(estimate, mask), carry, seen

    def local_mask(self) -> Bool[Array, "slots slots"]:
        return jnp.asarray(self._same_shard() & self._tokens().valid)

    def pool_class(self, x: Float[Array, "B slots D"]) -> Float[Array, "B D"]:
        heads = x.reshape(x.shape[0], self.shards.N, -1, x.shape[-1])[:, :, 0]
        return jnp.einsum("bnd,n->bd", heads, self.shards.class_weights().astype(x.dtype))

    def wire_bits(self, codec: VectorQuantizer | None) -> int:
        return need_codec(codec).wire_bits(self.shards.sent_slots)


@dataclasses.dataclass(frozen=True)
class Astra:
    """ASTRA on a mesh: this device's shard, under `jax.shard_map` over the axis `SEQ` (paper section 3).

    Attributes:
      shards: the split.
    """

    shards: Shards

    def _mine(self, table: Array | np.ndarray) -> Array:
        return jnp.asarray(table)[collectives.shard_index(SEQ)]

    def positions(self) -> Int[Array, "S"]:
        return self._mine(self.shards.index())

    def prepend_class(self, cls: Float[Array, "D"], x: Float[Array, "B S D"]) -> Float[Array, "B more D"]:
        return jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], 1, x.shape[2])), x], axis=1)

    def exchange(self, codec: VectorQuantizer | None, y: Array, carry: Any, block: Any) -> tuple[Remote, Any, None]:
        codec = need_codec(codec)
        B, home, sent = y.shape[0], self.shards.home_slots, self.shards.sent_slots
        z = codec.encode(y[:, home:])
        packed = wire.pack(z.reshape(B, -1), codec.bits)
        arrived = wire.unpack(self._gather(packed), sent * codec.groups, codec.bits)  # [N-1,B,S*G]
        codes = arrived.reshape(-1, B, sent, codec.groups).swapaxes(0, 1).reshape(B, -1, codec.groups)
        others = self._others()
        keys = Tokens(*(jnp.asarray(a[:, home:])[others].reshape(-1) for a in self.shards.tokens()))
        return Remote(codes, visible(keys)), carry, None

    def _gather(self, packed: Array) -> Array:
        return collectives.gather_codes(packed, SEQ)

    def _others(self) -> Array:
        return collectives.others(SEQ)

    def local_mask(self) -> Bool[Array, "1 S"]:
        return self._mine(self.shards.tokens().valid)[None, :]

    def pool_class(self, x: Float[Array, "B S D"]) -> Float[Array, "B D"]:
        weight = self._mine(self.shards.class_weights()).astype(x.dtype)
        return collectives.sum_over_shards(weight * x[:, 0], SEQ)

    def wire_bits(self, codec: VectorQuantizer | None) -> int:
        return need_codec(codec).wire_bits(self.shards.sent_slots)


@dataclasses.dataclass(frozen=True)
class OneOfN(Astra):
    """The work of one device of N without the others: its own codes stand in for theirs. Only for timing."""

    def _mine(self, table: Array | np.ndarray) -> Array:
        return jnp.asarray(table)[0]

    def _gather(self, packed: Array) -> Array:
        return jnp.broadcast_to(packed, (self.shards.N - 1, *packed.shape))

    def _others(self) -> Array:
        return jnp.arange(1, self.shards.N)

    def pool_class(self, x: Float[Array, "B S D"]) -> Float[Array, "B D"]:
        return x[:, 0]


@dataclasses.dataclass(frozen=True)
class Program:
    """A model that is compiled for a mesh: a function of its inputs.

    Attributes:
      run: the jitted function of weights and inputs.
      state: the weights, placed on the mesh.
    """

    run: Any
    state: Any

    def __call__(self, inputs: Array) -> Array:
        return self.run(self.state, inputs)

    def lower(self, inputs: Array) -> Any:
        """The lowered program; `.compile().as_text()` of it shows every collective."""
        return self.run.lower(self.state, inputs)


def parallelize(model: Any, mesh: Mesh) -> Program:
    """Jit-compiles `model` for a (data, seq) mesh: ASTRA over N = `mesh.shape["seq"]` devices, one device for N = 1.

    Args:
      model: a model of `astra_jax.models`; its weights are placed on every device.
      mesh: from `make_mesh`.

    Returns:
      A function from the model's input (for ViT: images [B, height, width, channels]) to its output. Any batch size
      goes; it is padded to a multiple of the mesh's data axis.

    Raises:
      AstraError: there are more devices than tokens, or N > 1 and the model has no codebooks.
    """
    graphdef, state = nnx.split(model)
    N, batches = mesh.shape[SEQ], mesh.shape[DATA]
    astra = Astra(model.shards(N))
    if N > 1:
        need_codec(model.codec)
    state = jax.device_put(state, NamedSharding(mesh, P()))

    def one_shard(state: Any, tokens: Array) -> Array:
        return nnx.merge(graphdef, state)(tokens, astra if N > 1 else Single(astra.shards.T))[0]

    # With one shard there is nothing to prove about replication over SEQ, and no collective that would.
    sharded = jax.shard_map(one_shard, mesh=mesh, in_specs=(P(), P(DATA, SEQ)), out_specs=P(DATA), check_vma=N > 1)

    @jax.jit
    def run(state: Any, inputs: Array) -> Array:
        B = inputs.shape[0]
        padded = jnp.pad(inputs, [(0, -B % batches)] + [(0, 0)] * (inputs.ndim - 1))
        return sharded(state, astra.shards.scatter(model.to_tokens(padded)))[:B]

    return Program(run, state)
