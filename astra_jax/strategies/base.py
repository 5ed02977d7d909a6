"""How one model is run: what is split, where remote keys and values come from, and what crosses the link.

A strategy is a small object that a model is called with; `astra_jax.models.interface.Strategy` says what a model asks
of one. ASTRA is in `coded.py`, what it is compared with in `rivals.py`.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from astra_jax.codecs.base import Quantizer
from astra_jax.codecs.config import CODED, Kind
from astra_jax.mesh.collectives import Alone
from astra_jax.mesh.sharding import Reading, Shards, Table, Tokens
from astra_jax.models import mask
from astra_jax.models.attention import Partial, attend, merge
from astra_jax.models.blocks import run_stack
from astra_jax.models.interface import Content, Exchanged, Remote, Report, Source, Step, TokenIds, Underway
from astra_jax.models.mask import Block, Windows
from astra_jax.strategies.transport import Mesh, Transport


class Message(NamedTuple):
    """What one device gives to one collective, for one sequence.

    Attributes:
      kind: the collective, as HLO names it.
      bits: of an all-gather what the device contributes, of the others its whole operand.
      times: how often that is in one forward pass.
      in_blocks: False for what is sent once, before the first block or after the last.
      sometimes: whether the program has it for some of its blocks, and something else for others.
    """

    kind: Literal["all-gather", "all-reduce", "all-to-all", "collective-permute"]
    bits: int
    times: int
    in_blocks: bool = True
    sometimes: bool = False


class Way(NamedTuple):
    """How blocks exchange: those with one of these windows; see `mask.hops`."""

    windows: tuple[int | None, ...]
    hops: tuple[mask.Hop, ...] | None


class Over(NamedTuple):
    """An exchange that is over as soon as it has begun: nothing is to be waited for, or a compiler sees to it."""

    exchanged: Exchanged

    def local(self, inputs: Any) -> Any:
        return inputs

    def finish(self, done: Any) -> Exchanged:
        return self.exchanged


class Whole:
    """The answers of a strategy where nothing is remote and every weight is whole."""

    coded: ClassVar[bool] = False
    keep: bool = False

    def start(self, codec: Quantizer | None, x: Float[Array, "B S D"], known: TokenIds | None) -> Any:
        return ()

    def begin(self, codec: Quantizer | None, y: Float[Array, "B S W"], estimate: Any, block: Block) -> Underway:
        return Over(self.exchange(codec, y, estimate, block))

    def exchange(self, codec: Quantizer | None, y: Float[Array, "B S W"], estimate: Any, block: Block) -> Exchanged:
        """What one block's attention sees of other devices' tokens, waited for."""
        return Exchanged(None, estimate, Report())

    def cached(self, block: Block) -> list[Source]:
        return []

    def tokens(self) -> Tokens:
        """Attributes of every slot that is here."""
        raise NotImplementedError

    def gathered(self, x: Float[Array, "*shape"]) -> Float[Array, "parts *shape"]:
        """What every device has that holds a part of the tokens."""
        return x[None]

    def attend(
        self, query: Float[Array, "B Q H E"], key: Float[Array, "B S J E"], value: Float[Array, "B S J E"]
    ) -> Float[Array, "B Q H E"]:
        """Exact: devices send the statistics of their tokens' softmax, E + 2 numbers of every query and head."""
        seen = jnp.asarray(self.tokens().valid)[..., None, :]
        mine = jnp.concatenate(attend(query, Source(key, value, seen)), axis=-1)
        E = query.shape[-1]
        return merge([Partial(p[..., :E], p[..., E : E + 1], p[..., E + 1 :]) for p in self.gathered(mine)])

    def reduce(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return x

    def run_blocks(self, step: Step, kinds: Sequence[Kind], carry: Any, xs: Any) -> Any:
        """Blocks of a kind that follow each other are one loop, where kinds make a difference."""
        kinds = kinds if self.coded else CODED * len(kinds)
        runs = [(kind, len(list(run))) for kind, run in itertools.groupby(kinds)]
        return run_stack([(partial(step, self, kind), count) for kind, count in runs], carry, xs)


@dataclasses.dataclass(frozen=True)
class Sharded(Whole):
    """A strategy that knows the split: the slots that are here, all on one device, and who sees whom among them.

    Attributes:
      shards: the split.
      keep: report every block's keys, values and what it received, for a cache.
    """

    shards: Shards
    keep: bool = dataclasses.field(default=False, kw_only=True)

    splits_tokens: ClassVar[bool] = False  # whether a device holds its own shard alone, or all tokens
    unstacks: ClassVar[bool] = True  # whether weights of the blocks may come as an array for each (`Unstacked`)
    folds: ClassVar[bool] = False  # whether attention gets codes, for which `models/key_value_tables.py` has tables

    @classmethod
    def of(cls, model: Any, N: int, inputs: Any = None) -> "Sharded":
        """The strategy for a model on N devices, for sequences as long as these inputs (by default the longest).

        Raises:
          AstraError: the model cannot be split in this way over N devices.
        """
        return cls(model.shards(N, inputs))

    def alone(self, N: int) -> "Sharded":
        """The same where the last of N devices computes its share without the others: to time and to count."""
        return self

    def messages(self, model: Any) -> list[Message]:
        """What one device gives to collectives in one forward pass of one sequence."""
        return []

    def wire_bits(self, model: Any) -> int:
        """Bits that one device gives to the collectives of all blocks together, for one sequence."""
        return sum(m.bits * m.times for m in self.messages(model) if m.in_blocks)

    def weight_axes(self, state: Any) -> Any:
        """Which axis of every weight is split over the devices, counted from the last; 0 for those that all have."""
        return jax.tree.map(lambda _: 0, state)

    @property
    def count(self) -> int:
        """M, how many shards are here."""
        return self.shards.N

    def here(self, table: Shaped[Table, "*B N S"]) -> Shaped[Table, "*B slots"]:
        """What a table of all slots says of those that are here: all of them, on one device."""
        return table.reshape(*table.shape[:-2], -1)

    def total(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The sum over all devices of what each has."""
        return x

    def tokens(self) -> Tokens:
        return Tokens(*(self.here(a) for a in self.shards.tokens()))

    def positions(self) -> Int[Table, "*B S"]:
        return self.here(self.shards.index())

    def prepend_class(self, cls: Shaped[Array, "*B k D"], x: Shaped[Array, "B slots D"]) -> Shaped[Array, "B more D"]:
        B, _, D = x.shape
        shards = x.reshape(B, self.count, -1, D)
        heads = jnp.broadcast_to(cls[..., None, :, :], (B, shards.shape[1], cls.shape[-2], D))
        return jnp.concatenate([heads, shards], axis=2).reshape(B, -1, D)

    def local_mask(self, block: Block) -> Bool[Array, "*B queries keys"] | None:
        return mask.local(self.shards, self.tokens(), block)

    def weights(self, x: Float[Array, "B S D"], reading: Reading) -> Float[Array, "B S"]:
        """What the slots that are here weigh in a state that a head reads."""
        return jnp.broadcast_to(jnp.asarray(self.here(self.shards.weights(reading)), x.dtype), x.shape[:2])

    def pool(self, x: Float[Array, "B S D"], *readings: Reading) -> Float[Array, "B states"]:
        states = [jnp.einsum("bsd,bs->bd", x, self.weights(x, reading)) for reading in readings]
        return self.total(jnp.concatenate(states, axis=-1))


@dataclasses.dataclass(frozen=True)
class Single(Sharded):
    """The whole sequence on one device; nothing is exchanged. The reference that everything is compared with.

    Attributes:
      shards: one shard.
      capture: report every block's input of the projections, for calibration.
    """

    capture: bool = False

    @classmethod
    def of(cls, model: Any, N: int = 1, inputs: Any = None) -> "Single":
        return cls(model.shards(1, inputs))

    def exchange(self, codec: Quantizer | None, y: Float[Array, "B S W"], estimate: Any, block: Block) -> Exchanged:
        return Exchanged(None, estimate, Report(captured=y if self.capture else None))


@dataclasses.dataclass(frozen=True)
class SplitTokens(Sharded):
    """The tokens are split: every shard sees its own, and something of the others.

    Attributes:
      shards: the split.
      transport: how that travels.
    """

    transport: Transport = Mesh()

    def alone(self, N: int) -> "Sharded":
        return dataclasses.replace(self, transport=Mesh(Alone(N)))

    @property
    def splits_tokens(self) -> bool:  # type: ignore[override]
        return self.transport.on_devices

    @property
    def count(self) -> int:
        return 1 if self.transport.on_devices else self.shards.N

    def here(self, table: Shaped[Table, "*B N S"]) -> Shaped[Table, "*B slots"]:
        return self.transport.here(table)

    def total(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return self.transport.total(x)

    def pool(self, x: Float[Array, "B S D"], *readings: Reading) -> Float[Array, "B states"]:
        if not self.transport.loses:
            return super().pool(x, *readings)
        # What a device that is gone would have added is missing from the weights, too.
        weights = [self.weights(x, reading) for reading in readings]
        states = jnp.stack([jnp.einsum("bsd,bs->bd", x, one) for one in weights], axis=1)
        total = self.total(jnp.concatenate([states, jnp.stack(weights, axis=1).sum(-1, keepdims=True)], axis=-1))
        return (total[..., :-1] / jnp.maximum(total[..., -1:], jnp.finfo(x.dtype).tiny)).reshape(x.shape[0], -1)

    def gathered(self, x: Float[Array, "*shape"]) -> Float[Array, "parts *shape"]:
        return self.transport.gather(x[None])

    def local_mask(self, block: Block) -> Bool[Array, "*B queries keys"] | None:
        found = super().local_mask(block)
        if self.transport.on_devices:
            return found
        shard = self.tokens().shard
        here = jnp.asarray(shard[:, None] == shard[None, :])
        return here if found is None else found & here

    def ways(self, windows: Windows | None, everything: bool) -> list[Way]:
        """The different ways in which the blocks of a stack with these windows exchange; one where `everything` goes
        to all."""
        if windows is None or everything:
            return [Way((), None)]
        found = {window: mask.hops(self.shards, window) for window in dict.fromkeys(windows)}
        whole = tuple(window for window, hops in found.items() if hops is None)
        some = [Way((window,), hops) for window, hops in found.items() if hops is not None]
        return [*some, Way(whole, None)] if whole else some

    def hear(
        self,
        x: Shaped[Array, "M B S F"],
        block: Block,
        pack: Callable[[Array], Array] | None = None,
        unpack: Callable[[Array, int], Array] | None = None,
        everything: bool = False,
    ) -> Shaped[Array, "N B S F"]:
        """What every shard has, or in a block with a window what of it attention can see.

        Args:
          pack, unpack: see `Transport.hear`.
          everything: whether a window makes no difference.
        """
        send, ways = partial(self.transport.hear, x, pack, unpack), self.ways(block.windows, everything)
        if len(ways) == 1 or not self.transport.on_devices:
            return send(hops=ways[0].hops)

        def one(way: Way) -> Shaped[Array, "N B S F"]:
            return self.transport.apart(send(hops=way.hops), way.hops is None)

        of = {window: n for n, way in enumerate(ways) for window in way.windows}
        which = jnp.asarray([of[window] for window in block.windows or ()])[block.number]
        return jax.lax.switch(which, [partial(one, way) for way in ways])

    def hearing(
        self, model: Any, bits: Callable[[int], int], counts: Sequence[bool], everything: bool = False
    ) -> list[Message]:
        """What `hear` sends.

        Args:
          bits: of so many slots.
          counts: of every block whether it exchanges anything.
        """
        windows, found = model.blocks.attention.windows, []
        ways = self.ways(windows, everything)
        for way in ways:
            mine = [len(ways) == 1 or window in way.windows for window in windows or [None] * len(counts)]
            times = sum(map(all, zip(counts, mine, strict=True)))
            one = partial(Message, times=times, sometimes=len(ways) > 1)
            if times and way.hops is None:
                found.append(one("all-gather", bits(self.shards.sent_slots)))
            elif times and way.hops:
                found += [one("collective-permute", bits(hop.slots.shape[-1])) for hop in way.hops]
        return found

    def mine(self, slots: Shaped[Array, "B slots *feature"]) -> Shaped[Array, "B S *feature"]:
        """Of the slots of all shards those that are here, for a program that nothing else splits."""
        each = jnp.moveaxis(slots.reshape(slots.shape[0], self.shards.N, -1, *slots.shape[2:]), (1, 2), (-2, -1))
        return jnp.moveaxis(self.here(each), -1, 1)

    def sent(self, x: Shaped[Array, "B slots *feature"]) -> Shaped[Array, "M B S *feature"]:
        """Of the slots that are here those that are sent, shard by shard."""
        shards = x.reshape(x.shape[0], self.count, -1, *x.shape[2:])
        return jnp.moveaxis(shards[:, :, self.shards.home_slots :], 1, 0)

    def sent_tokens(self) -> Tokens:
        """The attributes of what every shard sends: tables [*B,N,S]."""
        return Tokens(*(table[..., self.shards.home_slots :] for table in self.shards.tokens()))

    def remote_tokens(self) -> Tokens:
        """The attributes of the tokens that attention gets of other shards, in the order in which it does."""

        def one(table: Shaped[Table, "*B N S"]) -> Shaped[Array, "*B R"]:
            senders = self.transport.senders(jnp.moveaxis(jnp.asarray(table), -2, 0))
            return jnp.moveaxis(senders, 0, -2).reshape(*table.shape[:-2], -1)

        return Tokens(*(one(table) for table in self.sent_tokens()))

    def remote(self, content: Content, block: Block, there: Bool[Array, "*N N B S"] | None = None) -> Remote:
        """What every shard sent, as attention gets it.

        Args:
          content: arrays [N,B,S,...], or [N,N,B,S,_] where every receiver has something else of each.
          there: which tokens can be made use of, here or by each receiver; None for all.
        """
        keys, queries, copies = self.remote_tokens(), self.tokens(), content[0].ndim == 5
        position = keys.position
        if there is None and self.transport.on_devices and mask.all_see_all(self.shards, block):
            return Remote(self._in_rows(content), position, None)
        if self.transport.on_devices and mask.one_query_says_all(block):
            queries = Tokens(*(a[..., :1] for a in queries))
        seen = mask.remote(self.shards, queries, keys, block)
        if there is not None and there.ndim == 3:
            seen = seen & _in_rows(self.transport.senders(there))[:, None]
        elif there is not None:
            of_query = jnp.transpose(there[queries.shard], (2, 0, 1, 3))  # [B,queries,N,S]
            seen = seen & of_query.reshape(*of_query.shape[:2], -1)
        if copies:  # of every token, of which a query sees that of its own shard
            own = jnp.asarray(queries.shard[:, None] == jnp.arange(self.shards.N))[..., None]
            seen = (seen[..., None, :] & own).reshape(*seen.shape[:-1], -1)
            position = jnp.tile(position, self.shards.N)
            content = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), content)
        return Remote(self._in_rows(content), position, seen)

    def _in_rows(self, content: Content) -> Content:
        """[N,B,S,...] -> [B,R,...]: of the tokens of all shards what attention sees, side by side."""
        return jax.tree.map(lambda a: _in_rows(self.transport.senders(a)), content)

    def _pooled(self, model: Any) -> list[Message]:
        """The states that a head reads: their sum over the devices, or what `attend` sends, once."""
        if model.per_token:
            return []
        if "attention" in model.reads:
            D, H = model.config.hidden_size, model.config.num_attention_heads
            return [Message("all-gather", 32 * (D + 2 * H), 1, in_blocks=False)]
        return [Message("all-reduce", len(model.reads) * hidden_bits(model), 1, in_blocks=False)]


def _in_rows(x: Shaped[Array, "N B S *feature"]) -> Shaped[Array, "B R *feature"]:
    """[N,B,S,...] -> [B,N*S,...]: the tokens of all shards side by side."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def hidden_bits(model: Any) -> int:
    """Bits of one token's hidden state."""
    return 8 * model.config.hidden_size * model.dtype.itemsize
