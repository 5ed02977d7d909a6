"""ASTRA (paper section 3): in every block the shards exchange integer codes, and attention sees others through them.

The exchange is written once. How codes travel is the transport's (`strategies/transport.py`), what they mean the
codec's (`astra_jax/codecs`), and what training does to them is injected by it (`train/navq.py`).
"""

import contextlib
import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt16

from astra_jax.codecs.base import Quantizer
from astra_jax.errors import AstraError
from astra_jax.inputs.token_batches import numbers_of_tokens
from astra_jax.mesh.sharding import Shards
from astra_jax.models import mask
from astra_jax.models.interface import Codes, Content, Estimates, Exchanged, Report, TokenIds, Underway
from astra_jax.models.mask import Block
from astra_jax.strategies.base import Message, Over, SplitTokens
from astra_jax.strategies.datagrams import Datagrams, Link
from astra_jax.strategies.transport import Delivery, Posted, Virtual

Lost = Literal["masked", "predicted"]


class Heard(NamedTuple):
    """What attention is told of remote tokens, and what the block reports."""

    content: Content
    report: Report


def need_codec(codec: Quantizer | None) -> Quantizer:
    """The codec, or an AstraError that says how to get one."""
    if codec is None:
        raise AstraError("this checkpoint has no codebooks, so it runs on one device only: run `astra calibrate` first")
    return codec


class Sent(NamedTuple):
    """Codes that have left, and what becomes of those that arrive."""

    posted: Posted
    of: Any

    def local(self, inputs: Any) -> Any:
        return self.posted.local(inputs)

    def finish(self, done: Any) -> Exchanged:
        return self.of(self.posted.receive(done))


@dataclasses.dataclass(frozen=True)
class Astra(SplitTokens):
    """ASTRA's mathematics, on a mesh or on one device.

    Attributes:
      shards, transport: see `SplitTokens`.
      lost: what becomes of a token in a block in which its code did not arrive (our choice: the paper does not say what
        stands in for it). `masked` takes it out of that block's softmax. `predicted` puts there what the receiver
        expected of it; without a predictor it is masked all the same.

    With a predictor and losses every shard has its own estimates of all tokens. A token's codes are about what its own
    shard expects, which does not hear of losses; others add them to what they expect. Attention gets N copies of every
    token, as each shard has it, of which a query sees one: that takes N times as long.
    """

    lost: Lost = "predicted"

    coded = True
    folds = True

    @classmethod
    def of(cls, model: Any, N: int, inputs: Any = None) -> "Astra":
        need_codec(model.codec)
        return cls(model.shards(N, inputs))

    @classmethod
    def virtual(
        cls,
        shards: Shards,
        arrived: Bool[Array, "L B N slots"] | None = None,
        groups: Int[Array, ""] | None = None,
        **options: Any,
    ) -> "Astra":
        """The same on one device with N virtual shards: the reference of every other way, and what training and
        evaluation on one device use for any N. Every query meets every token twice, once as a local and once as a
        remote one, and masks pick the right one.

        Args:
          arrived: which codes arrive: of every slot, in every block, at every receiving shard; None for all.
          groups: how many groups of codes are used; None for all.
          options: other attributes.
        """
        return cls(shards, Virtual.of(shards, arrived, groups), **options)

    def messages(self, model: Any) -> list[Message]:
        codec, kinds, first = need_codec(model.codec), model.astra.kinds(model.config.num_hidden_layers), []
        if "known" in kinds:
            ids = self.shards.sent_slots * 8 * _id_dtype(numbers_of_tokens(model.config)).itemsize
            first = [Message("all-gather", ids, 1, in_blocks=False)]
        counts = [kind == "coded" for kind in kinds]
        codes = self.hearing(model, codec.wire_bits, counts, everything=bool(codec.remembers))
        return [*first, *codes, *self._pooled(model)]

    def start(self, codec: Quantizer | None, x: Float[Array, "B S D"], known: TokenIds | None) -> Any:
        """The estimate [N,B,S,W] before the first block: 0, or what token ids say, which are sent once."""
        if codec is None or not codec.remembers:
            return ()
        N, B, S, W = self.shards.N, x.shape[0], self.shards.sent_slots, codec.remembers
        nothing = self.transport.nothing((N, B, S, W))
        if known is None:
            return nothing
        ids = self.transport.hear(self.sent(known.ids).astype(_id_dtype(known.vocabulary))[..., None])
        ids = ids.reshape(N * B, S)
        position = jnp.moveaxis(jnp.broadcast_to(self.sent_tokens().position, (B, N, S)), 1, 0).reshape(N * B, S)
        vectors = known.vectors_of(ids.astype(jnp.int32), position)
        return nothing + jax.lax.stop_gradient(vectors).astype(jnp.float32).reshape(N, B, S, W)

    def begin(self, codec: Quantizer | None, y: Float[Array, "B S W"], estimate: Any, block: Block) -> Underway:
        """What every shard is expected to have, codes of how it differs, and what these make of it."""
        codec, mine = need_codec(codec), self.sent(y)
        expected = codec.expect(estimate, self.around, block.kind)
        p = jax.lax.stop_gradient(expected)

        def finish(delivery: Delivery | None) -> Exchanged:
            found = codec.update(p, *(delivery or (None, None)))
            content, report = self.heard(codec, mine, expected, delivery, found, block)
            return Exchanged(self.remote(content, block, self._there(codec, delivery)), found, report)

        if block.kind != "coded":
            return Over(finish(None))
        posted = self.deliver(codec, codec.encode(mine - self.own(p)), block)
        return Sent(posted, finish)

    def exchange(self, codec: Quantizer | None, y: Float[Array, "B S W"], estimate: Any, block: Block) -> Exchanged:
        return self.begin(codec, y, estimate, block).finish(())

    def deliver(self, codec: Quantizer, z: UInt16[Array, "M B S G"], block: Block) -> Posted:
        """The codes of all shards, or in a block with a window of those that attention can see.

        With a predictor all devices expect the same of a token, and so all hear of all.
        """
        everything = bool(codec.remembers)
        if self.transport.on_devices and not self.transport.loses:
            return Posted.at_once(Delivery(self.hear(z, block, codec.pack, codec.unpack, everything)))
        return self.transport.post(codec, z, block, mask.heard(self.shards, block.windows, everything))

    def heard(
        self,
        codec: Quantizer,
        mine: Float[Array, "M B S W"],
        expected: Any,
        delivery: Delivery | None,
        estimate: Any,
        block: Block,
    ) -> Heard:
        """What attention gets: with a predictor the estimates, else codes, or where only some came what these say.

        Args:
          mine: what the codec quantizes of the shards that are here.
          expected: p, with gradients.
          delivery: what arrived; None in a block in which nothing is sent.
          estimate: of all tokens after that.
        """
        if codec.remembers:
            return Heard(Estimates(estimate), Report())
        assert delivery is not None  # only estimates make do without
        if self.transport.loses:
            return Heard(Codes(delivery.codes, jnp.asarray(delivery.groups)), Report())
        if delivery.groups is None or delivery.by_token:  # lost tokens are masked, the others whole
            return Heard(Codes(delivery.codes), Report())
        return Heard(Estimates(codec.decode(delivery.codes, delivery.groups)), Report())

    def own(self, p: Any) -> Any:
        """What the shards that are here expect of their own tokens; 0 without a predictor."""
        return self.transport.own(p) if jnp.ndim(p) else p

    def around(self, estimate: Float[Array, "*N N B S W"]) -> Float[Array, "*N N B S W"]:
        """What is around every token in its shard (`codecs.predictor.around`)."""
        tokens = self.sent_tokens()
        there = jnp.asarray(tokens.valid & tokens.sent)
        there = jnp.broadcast_to(there, (estimate.shape[-3], *there.shape[-2:])).swapaxes(0, 1)
        return Quantizer.around(estimate, there, self.shards.causal)

    def _there(self, codec: Quantizer, delivery: Delivery | None) -> Bool[Array, "*N N B S"] | None:
        """Which tokens each receiver, or this device, can make use of; None for all."""
        if delivery is None or not delivery.by_token:
            return None
        if codec.remembers and self.lost == "predicted":
            return None
        return jnp.asarray(delivery.groups) > 0


@dataclasses.dataclass(frozen=True)
class OnHosts:
    """What makes the strategy of one of several hosts, each of which has a program of its own.

    Attributes:
      link: to the other hosts.
      N, index: how many hosts there are, and whose shard is here. The last shard, where prompts end, is the user's.
      shares: of every host, for its share of the tokens; None where all get as many, and so they do where one would get
        none.
    """

    link: Link
    N: int
    index: int
    shares: tuple[float, ...] | None = None

    @property
    def last(self) -> bool:
        """Whether the answer is here."""
        return self.index == self.N - 1

    def __call__(self, model: Any, N: int = 1, inputs: Any = None) -> SplitTokens:
        """For a model and its inputs; N counts devices of this host, of which one is used.

        Raises:
          AstraError: the model has no codebooks, or there are fewer tokens than hosts.
        """
        need_codec(model.codec)
        shards = model.shards(self.N, inputs)
        if self.shares is not None:
            with contextlib.suppress(AstraError):  # the same on all hosts
                shards = shards.in_proportion(self.shares)
        return Astra(shards, Datagrams(self.link, self.N, self.index, shards.unused))


@dataclasses.dataclass(frozen=True)
class AstraPlain(Astra):
    """The same without tables of keys and values (`models/key_value_tables.py`): what these are compared with."""

    folds = False


def _id_dtype(vocabulary: int) -> Any:
    """What token ids are sent as."""
    return jnp.dtype(jnp.uint16 if vocabulary <= 2**16 else jnp.uint32)
