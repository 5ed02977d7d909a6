"""How one model is run: what is split, where remote keys and values come from, and what crosses the link.

A strategy is a small object that a model is called with; models never mention a mesh axis. `Strategy` says what a model
asks of one; `Virtual` and `Astra` exchange codes, and what they are compared with is in `rivals.py`.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from astra_jax.codecs import bitpacking
from astra_jax.codecs.predictor import Known, SideInfo, around, is_exact
from astra_jax.codecs.quantizer import Quantizer
from astra_jax.errors import AstraError
from astra_jax.mesh.collectives import Alone, Peers
from astra_jax.mesh.sharding import SEQ, Pooling, Shards, Table, Tokens
from astra_jax.models.attention import Source
from astra_jax.models.blocks import length, run_stack


class Remote(NamedTuple):
    """Remote tokens as attention gets them.

    Attributes:
      message: codes [B,R,G], or vectors [B,R,D]: an estimate of what the codes stand for, or the exact ones.
      position: their places in the sequence, for rotary embeddings.
      mask: which query sees which remote token, broadcastable to [B,S,R]; None where all see all.
    """

    message: Shaped[Array, "B R _"]
    position: Int[Table, "*B R"]
    mask: Bool[Array, "*#B #S R"] | None


class Message(NamedTuple):
    """What one device gives to one collective, for one sequence.

    Attributes:
      kind: the collective, as HLO names it.
      bits: of an all-gather what the device contributes, of the others its whole operand.
      times: how often that is in one forward pass.
      in_blocks: False for what is sent once, before the first block or after the last.
    """

    kind: Literal["all-gather", "all-reduce", "all-to-all", "collective-permute"]
    bits: int
    times: int
    in_blocks: bool = True


def visible(keys: Tokens, queries: Tokens, causal: bool) -> Bool[Array, "*B queries R"]:
    """Which remote tokens a query can attend to: real ones that are sent.

    Shards are contiguous, so that for a decoder a remote shard lies wholly before a query, or wholly after it.
    """
    mask = (jnp.asarray(keys.valid) & jnp.asarray(keys.sent))[..., None, :]
    if causal:
        mask = mask & jnp.asarray(keys.shard[..., None, :] < queries.shard[..., :, None])
    return mask


def need_codec(codec: Quantizer | None) -> Quantizer:
    """The codec, or an AstraError that says how to get one."""
    if codec is None:
        raise AstraError("this checkpoint has no codebooks, so it runs on one device only: run `astra calibrate` first")
    return codec


class Noise(NamedTuple):
    """Noise-Augmented Quantization: `strength` is lambda (the paper's best is 1), `key` drives the noise.

    `groups` is how many of the codec's groups are used; None for all.
    """

    key: Key[Array, ""]
    strength: float
    groups: Int[Array, ""] | None = None


class Strategy:
    """What a model asks of a strategy, answered as where nothing is remote and every weight is whole.

    tokens()                     attributes of every slot, class tokens included
    positions()                  place of every slot in the sequence, class tokens not included
    prepend_class(cls, x)        puts the class token at the head of every shard that is here
    start(codec, side_info)      what `exchange` is given in the first block as its carry
    exchange(codec, y, carry, block) -> (Remote | None, carry, report)
    cached(block)                further sources of a block: keys and values of earlier calls
    local_mask()                 which local tokens a local query sees; None where all see all
    reduce(x)                    a layer's output from what the rows of its kernel that are here make of it
    run_blocks(block, carry, xs, coded_blocks) the stack of blocks, of which the first so many send codes
    pool(x, pooling)             the state that a head reads
    """

    coded: ClassVar[bool] = True  # whether `exchange` takes what the codec quantizes, or else the hidden state
    keep: bool = False  # report every block's keys, values and remote codes (`attention.Kept`), for a cache

    def start(self, codec: Quantizer | None, side_info: SideInfo | None) -> Any:
        return ()

    def cached(self, block: Any) -> list[Source]:
        return []

    def reduce(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return x

    def run_blocks(self, block: Callable[..., Any], carry: Any, xs: Any, coded_blocks: int) -> Any:
        """`run_stack` of `block(strategy, carry, xs)`, where xs = (weights, number) are of all L blocks."""
        return run_stack([(partial(block, self), length(xs))], carry, xs)


@dataclasses.dataclass(frozen=True)
class Sharded(Strategy):
    """A strategy that knows the split: the slots that are here, and who sees whom among them.

    Attributes:
      shards: the split.
      keep: see `Strategy`.
      silent: that a block sends no codes, and goes by what is predicted.
    """

    shards: Shards
    keep: bool = dataclasses.field(default=False, kw_only=True)
    silent: bool = dataclasses.field(default=False, kw_only=True)

    splits_tokens: ClassVar[bool] = False  # whether a device holds its own shard alone, or all tokens
    folds: ClassVar[bool] = False  # whether attention gets codes, for which `models.key_value_tables` has tables
    unstacks: ClassVar[bool] = True  # whether weights of the blocks may come as an array for each (`Unstacked`)

    @classmethod
    def of(cls, model: Any, N: int, inputs: Any = None) -> "Sharded":
        """The strategy for a model on N devices, for sequences as long as these inputs (by default the longest).

        Raises:
          AstraError: the model cannot be split in this way over N devices.
        """
        return cls(model.shards(N, inputs))

    def messages(self, model: Any) -> list[Message]:
        """What one device gives to collectives in one forward pass of one sequence."""
        return []

    def wire_bits(self, model: Any) -> int:
        """Bits that one device gives to the collectives of all blocks together, for one sequence."""
        return sum(message.bits * message.times for message in self.messages(model) if message.in_blocks)

    def weight_axes(self, state: Any) -> Any:
        """Which axis of every weight is split over the devices, counted from the last; 0 for those that all have."""
        return jax.tree.map(lambda _: 0, state)

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

    def prepend_class(self, cls: Shaped[Array, "*B D"], x: Shaped[Array, "B slots D"]) -> Shaped[Array, "B more D"]:
        B, _, D = x.shape
        shards = x.reshape(B, -1, self.shards.S, D)
        heads = jnp.broadcast_to(jnp.reshape(cls, (-1, 1, 1, D)), (B, shards.shape[1], 1, D))
        return jnp.concatenate([heads, shards], axis=2).reshape(B, -1, D)

    def exchange(self, codec: Quantizer | None, y: Array, carry: Any, block: Any) -> tuple[Any, Any, Any]:
        return None, carry, None

    def run_blocks(self, block: Callable[..., Any], carry: Any, xs: Any, coded_blocks: int) -> Any:
        """The first block apart, where it is given what is `Known` and no estimate; and those that send no codes."""
        speaking, quiet = partial(block, self), partial(block, dataclasses.replace(self, silent=True))
        first = int(isinstance(carry[1], Known))
        silent = length(xs) - coded_blocks if self.coded else 0
        return run_stack([(speaking, first), (speaking, length(xs) - first - silent), (quiet, silent)], carry, xs)

    def local_mask(self) -> Bool[Array, "*B queries keys"] | None:
        if self.shards.all_see_all:
            return None
        tokens = self.tokens()
        mask = tokens.valid[..., None, :]
        if self.shards.causal:
            mask = mask & (tokens.position[..., None, :] <= tokens.position[..., :, None])
        return jnp.asarray(mask)

    def pool(self, x: Float[Array, "B S D"], pooling: Pooling) -> Float[Array, "B D"]:
        weights = jnp.asarray(self._mine(self.shards.weights(pooling)), x.dtype)
        return self._total(jnp.einsum("bsd,bs->bd", x, jnp.broadcast_to(weights, x.shape[:2])))


@dataclasses.dataclass(frozen=True)
class Single(Sharded):
    """The whole sequence on one device; nothing is exchanged. The reference that everything is compared with.

    Attributes:
      shards: one shard.
      capture: report every block's input of the projections, for calibration.
    """

    capture: bool = False

    coded = False

    @classmethod
    def of(cls, model: Any, N: int = 1, inputs: Any = None) -> "Single":
        return cls(model.shards(1, inputs))

    def exchange(self, codec: Quantizer | None, y: Array, carry: Any, block: Any) -> tuple[None, Any, Any]:
        return None, carry, y if self.capture else None


def _at_receivers(
    said: Float[Array, "B slots W"], there: Bool[Array, "B N slots"] | None
) -> Float[Array, "B *N slots W"]:
    """What codes add to what is expected: with `there`, which receivers have them, for each of these, and else 0."""
    return said if there is None else jnp.where(there[..., None], said[:, None], 0)


@dataclasses.dataclass(frozen=True)
class Virtual(Sharded):
    """ASTRA's mathematics on one device, from a shard index per token: N virtual shards.

    The reference that every sharded path is tested against, and what training and one-device evaluation use for any
    N. Every query meets every token twice, once as a local and once as a remote one, and masks pick the right one.

    Attributes:
      shards: the split.
      noise: given in training: remote tokens are noisy estimates with straight-through gradients, and every block
        reports an `Observation`.
      arrived: which codes arrived: of every slot, in every block, at every receiving shard; None for all. In a block
        of which everything is known beforehand, or that is silent, nothing is sent, so nothing is lost.
      lost: what becomes of a token in a block in which its code did not arrive (our choice: the paper does not say what
        stands in for it). `masked` takes it out of that block's softmax. `predicted` puts there what the receiver
        expected of it; without a predictor it is masked all the same.

    With a predictor and `arrived` every shard has its own estimates of all tokens. A token's codes are about what its
    own shard expects, which does not hear of losses; others add them to what they expect. Attention gets N copies of
    every token, as each shard has it, of which a query sees one: that takes N times as long.
    """

    noise: Noise | None = None
    arrived: Bool[Array, "L B N slots"] | None = None
    lost: Literal["masked", "predicted"] = "predicted"

    def start(self, codec: Quantizer | None, side_info: SideInfo | None) -> Any:
        if codec is None or codec.predictor is None:
            return ()
        if side_info is None:
            return Known(None)
        vectors = side_info.vectors_of(side_info.ids, self.tokens().position).astype(jnp.float32)
        if self.arrived is None:
            return Known(vectors)
        B, slots, W = vectors.shape
        return Known(jnp.broadcast_to(vectors[:, None], (B, self.shards.N, slots, W)))

    def exchange(self, codec: Quantizer | None, y: Array, carry: Any, block: Any) -> tuple[Remote, Any, Any]:
        codec, tokens = need_codec(codec), self.tokens()
        predicts, exact = codec.predictor is not None, is_exact(carry)
        unsent = exact or self.silent
        expected = codec.predict(carry, self._around)  # [B,N,slots,W] where every shard has estimates of its own
        p = jax.lax.stop_gradient(expected)
        exactly, y = y, y - self._own(p)
        z = codec.encode(y)
        mask = visible(tokens, tokens, self.shards.causal) & jnp.asarray(tokens.shard[:, None] != tokens.shard)
        there = None
        if self.arrived is not None:
            there = self.arrived[block] | (np.arange(self.shards.N)[:, None] == tokens.shard) | unsent
            if self.lost == "masked" or not predicts:
                mask = mask & there[:, tokens.shard]
        if predicts:
            decoded = codec.decode(z, self.noise and self.noise.groups)
            carry = p if unsent else jax.lax.stop_gradient(p + _at_receivers(decoded, there))
        if self.noise is None:
            return self._remote(carry if predicts else z, mask), carry, None
        noise_key, revive_key = jax.random.split(jax.random.fold_in(self.noise.key, block))
        noisy = y if exact else codec.straight_through(y, z, noise_key, self.noise.strength, self.noise.groups)
        noisy = jnp.zeros_like(noisy) if self.silent else noisy
        sent = jnp.asarray(tokens.valid & tokens.sent)
        seen = codec.observe(y, z, revive_key, sent)
        if predicts:
            unexpected = jnp.sum((jax.lax.stop_gradient(exactly) - self._own(expected)) ** 2, axis=-1)
            seen = seen._replace(surprise=jnp.mean(unexpected, where=jnp.broadcast_to(sent, unexpected.shape)))
        return self._remote(p + _at_receivers(noisy, there) if predicts else noisy, mask), carry, seen

    def _own(self, p: Any) -> Any:
        """What each token's own shard expects of it."""
        shard = self.tokens().shard
        return p[:, shard, np.arange(len(shard))] if jnp.ndim(p) == 4 else p

    def _around(self, estimate: Float[Array, "B *N slots W"]) -> Float[Array, "B *N slots W"]:
        """What is around every token in its shard."""
        tokens = self.shards.tokens()
        there = jnp.asarray(tokens.valid & tokens.sent)  # [*B,N,S]
        if there.ndim == 3 and estimate.ndim == 4:
            there = there[:, None]  # at every receiver
        shards = estimate.reshape(*estimate.shape[:-2], *there.shape[-2:], -1)
        return around(shards, there, self.shards.causal).reshape(estimate.shape)

    def _remote(self, message: Shaped[Array, "B *N slots W"], mask: Bool[Array, "*#B slots slots"]) -> Remote:
        """All tokens as remote ones; where every shard has them in its own way, N times, of which a query sees one."""
        tokens = self.tokens()
        if message.ndim == 3:
            return Remote(message, tokens.position, mask)
        N = self.shards.N
        own = jnp.asarray(tokens.shard[:, None] == np.arange(N))[..., None]  # [queries,N,1]
        copies = (mask[..., None, :] & own).reshape(*mask.shape[:-1], -1)
        B, _, _, W = message.shape
        return Remote(message.reshape(B, -1, W), jnp.tile(tokens.position, N), copies)

    def local_mask(self) -> Bool[Array, "*B queries keys"]:
        shard, mask = self.tokens().shard, super().local_mask()
        here = jnp.asarray(shard[:, None] == shard[None, :])
        return here if mask is None else mask & here


@dataclasses.dataclass(frozen=True)
class SplitTokens(Sharded):
    """One shard of the tokens on each device of a mesh, under `jax.shard_map` over the axis `SEQ`.

    Attributes:
      shards: the split.
      peers: the devices.
    """

    peers: Peers | Alone = dataclasses.field(default=Peers(SEQ), kw_only=True)

    splits_tokens = True

    def _mine(self, table: Shaped[Table, "*B N S"]) -> Shaped[Array, "*B S"]:
        return jnp.take(jnp.asarray(table), self.peers.index(), axis=-2)

    def _total(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return self.peers.total(x)

    def remote_tokens(self) -> Tokens:
        """The attributes of the tokens that the other devices send, in the order in which they arrive."""
        others, home = self.peers.others(), self.shards.home_slots
        tables = (jnp.take(jnp.asarray(a[..., home:]), others, axis=-2) for a in self.shards.tokens())
        return Tokens(*(table.reshape(*table.shape[:-2], -1) for table in tables))

    def _remote(self, arrived: Shaped[Array, "others B sent _"]) -> Remote:
        """What arrived from every other device, as attention gets it."""
        message = arrived.swapaxes(0, 1).reshape(arrived.shape[1], -1, arrived.shape[-1])
        keys, mine = self.remote_tokens(), self.tokens()
        if self.shards.all_see_all:
            return Remote(message, keys.position, None)
        # All that are here see the same, so one query says it for all of them.
        return Remote(message, keys.position, visible(keys, Tokens(*(a[..., :1] for a in mine)), self.shards.causal))

    def _pooled(self, model: Any) -> list[Message]:
        """The state that a head reads: its sum over the devices, once."""
        return [] if model.per_token else [Message("all-reduce", hidden_bits(model), 1, in_blocks=False)]


def _id_dtype(vocabulary: int) -> Any:
    """What token ids are sent as."""
    return jnp.dtype(jnp.uint16 if vocabulary <= 2**16 else jnp.uint32)


def hidden_bits(model: Any) -> int:
    """Bits of one token's hidden state."""
    return 8 * model.config.hidden_size * model.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Astra(SplitTokens):
    """ASTRA (paper section 3): the devices gather codes, bit-packed, in every block.

    Attributes:
      shards, peers: see `SplitTokens`.
    """

    folds = True

    @classmethod
    def of(cls, model: Any, N: int, inputs: Any = None) -> "Astra":
        need_codec(model.codec)
        return cls(model.shards(N, inputs))

    def messages(self, model: Any) -> list[Message]:
        codec, blocks, first = need_codec(model.codec), model.astra.sending(model.config.num_hidden_layers), []
        if model.astra.side_info != "none":
            ids = self.shards.sent_slots * 8 * _id_dtype(model.config.vocab_size).itemsize
            first = [Message("all-gather", ids, 1, in_blocks=False)]
        if not blocks:
            return [*first, *self._pooled(model)]
        return [*first, Message("all-gather", codec.wire_bits(self.shards.sent_slots), blocks), *self._pooled(model)]

    def exchange(self, codec: Quantizer | None, y: Array, carry: Any, block: Any) -> tuple[Remote, Any, None]:
        codec, sent = need_codec(codec), y[:, self.shards.home_slots :]
        if codec.predictor is None:
            return self._remote(self._gather(codec, codec.encode(sent), self.peers.gather_others)), carry, None
        # The estimates of all devices' tokens [N,B,sent,W], also its own, are computed alike on every device, so that
        # all have the same ones to the last bit.
        estimate = codec.predict(carry, self._around)
        if not (is_exact(carry) or self.silent):
            mine = jnp.take(estimate, self.peers.index(), axis=0) if estimate.ndim > 1 else estimate
            estimate = estimate + codec.decode(self._gather(codec, codec.encode(sent - mine), self.peers.gather))
        return self._remote(jnp.take(estimate, self.peers.others(), axis=0)), estimate, None

    def _around(self, estimate: Float[Array, "N B sent W"]) -> Float[Array, "N B sent W"]:
        """What is around every token in its shard."""
        tokens, home = self.shards.tokens(), self.shards.home_slots
        there = jnp.asarray(tokens.valid & tokens.sent)[..., home:]
        there = jnp.broadcast_to(there, (estimate.shape[1], *there.shape[-2:])).swapaxes(0, 1)
        return around(estimate, there, self.shards.causal)

    def _gather(self, codec: Quantizer, z: Any, gather: Any) -> Shaped[Array, "devices B sent G"]:
        """Codes [B,sent,G] of this device -> those of all that are gathered from."""
        B, sent, G = z.shape
        packed = gather(bitpacking.pack(z.reshape(B, -1), codec.bits))  # [devices,B,bytes]
        return bitpacking.unpack(packed, sent * G, codec.bits).reshape(-1, B, sent, G)

    def start(self, codec: Quantizer | None, side_info: SideInfo | None) -> Any:
        if codec is None or codec.predictor is None:
            return ()
        if side_info is None:
            return Known(None)
        home = self.shards.home_slots
        ids = self.peers.gather(side_info.ids[:, home:].astype(_id_dtype(side_info.vocabulary)))  # [N,B,S], S as sent
        N, B, S = ids.shape
        position = jnp.moveaxis(jnp.broadcast_to(self.shards.tokens().position[..., home:], (B, N, S)), 1, 0)
        vectors = side_info.vectors_of(ids.reshape(N * B, S).astype(jnp.int32), position.reshape(N * B, S))
        return Known(vectors.astype(jnp.float32).reshape(N, B, S, -1))
