"""How codes travel between the N shards, and which of these are here. The exchange itself is in `strategies/coded.py`.

`Mesh` has one shard on each device, under `jax.shard_map`; `Datagrams` one on each host, whose program is its own;
`Virtual` has all of them on one device, and is the reference that every other way is tested against.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt16

from astra_jax.codecs.base import Groups, Quantizer
from astra_jax.mesh.collectives import Alone, Peers
from astra_jax.mesh.sharding import SEQ, Shards, Table
from astra_jax.models.mask import Block, Hop


class Delivery(NamedTuple):
    """What arrived of one block's codes, in the order of the shards that sent them.

    Attributes:
      codes: of every shard.
      groups: how many leading groups arrived, of every token or of each, where shards differ in what they got also for
        every receiver [N,N,B,S]; 0 for a token that is lost. None for all of all.
    """

    codes: UInt16[Array, "N B S G"]
    groups: Groups | None = None

    @property
    def by_token(self) -> bool:
        """Whether tokens differ in how many groups of them arrived, so that some may be lost."""
        return self.groups is not None and jnp.ndim(self.groups) > 0


class Posted(NamedTuple):
    """Codes that are on their way.

    Attributes:
      local: the inputs of local work, that waits with it until they have left.
      receive: what arrived, which is waited for once the results of local work are there.
    """

    local: Callable[[Any], Any]
    receive: Callable[[Any], Delivery]

    @classmethod
    def at_once(cls, delivery: Delivery) -> "Posted":
        """What is there, or whose waiting is a compiler's business."""
        return cls(lambda inputs: inputs, lambda done: delivery)


@runtime_checkable
class Transport(Protocol):
    """What an exchange asks of a way in which codes travel. M of the N shards are here: one, or all."""

    on_devices: ClassVar[bool]  # whether every shard has a device of its own
    loses: ClassVar[bool]  # whether a device may go on without what another one says

    def here(self, table: Shaped[Table, "*B N S"]) -> Shaped[Table, "*B slots"]:
        """What a table of all slots says of those that are here."""

    def own(self, x: Shaped[Array, "*N N B S W"]) -> Shaped[Array, "M B S W"]:
        """What the shards that are here know of their own tokens."""

    def senders(self, x: Shaped[Array, "N *shape"]) -> Shaped[Array, "senders *shape"]:
        """Of what is known of every shard, what attention sees."""

    def gather(self, x: Shaped[Array, "M *shape"]) -> Shaped[Array, "N *shape"]:
        """What every shard has."""

    def post(
        self, codec: Quantizer, z: UInt16[Array, "M B S G"], block: Block, heard: Bool[np.ndarray, "L N N"]
    ) -> Posted:
        """Sends the codes of the shards that are here, to receive those of all.

        Args:
          heard: of every block which receiver has to hear which sender [L, receiver, sender].
        """

    def hear(
        self,
        x: Shaped[Array, "M B S F"],
        pack: Callable[[Array], Array] | None = None,
        unpack: Callable[[Array, int], Array] | None = None,
        hops: Sequence[Hop] | None = None,
    ) -> Shaped[Array, "N B S F"]:
        """What every shard has, or 0 where no hop brings it.

        Args:
          pack, unpack: what is sent of [B,S,F], and what S slots of it are again; None for as it is.
          hops: who sends what to whom; None where all send everything to all.
        """

    def apart(self, x: Shaped[Array, "N B S F"], alike: bool) -> Shaped[Array, "N B S F"]:
        """What was heard as something in which devices may differ; `alike` where they do not."""

    def total(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The sum over all devices of what each has."""

    def nothing(self, shape: tuple[int, ...]) -> Float[Array, "*shape"]:
        """Zeros that every device has alike."""


@dataclasses.dataclass(frozen=True)
class Mesh:
    """One shard on each device along a mesh axis, under `jax.shard_map`: codes are gathered bit-packed.

    Attributes:
      peers: the devices; `Alone` for one whose peers are missing, to time and to count.
    """

    peers: Peers | Alone = Peers(SEQ)

    on_devices: ClassVar[bool] = True
    loses: ClassVar[bool] = False

    def here(self, table: Shaped[Table, "*B N S"]) -> Shaped[Array, "*B S"]:
        return jnp.take(jnp.asarray(table), self.peers.index(), axis=-2)

    def own(self, x: Shaped[Array, "N B S W"]) -> Shaped[Array, "1 B S W"]:
        return jnp.take(x, self.peers.index(), axis=0)[None]

    def senders(self, x: Shaped[Array, "N *shape"]) -> Shaped[Array, "others *shape"]:
        return jnp.take(jnp.asarray(x), self.peers.others(), axis=0)

    def gather(self, x: Shaped[Array, "1 *shape"]) -> Shaped[Array, "N *shape"]:
        return self.peers.gather(x[0])

    def post(
        self, codec: Quantizer, z: UInt16[Array, "1 B S G"], block: Block, heard: Bool[np.ndarray, "L N N"]
    ) -> Posted:
        return Posted.at_once(Delivery(self.hear(z, codec.pack, codec.unpack)))

    def hear(
        self,
        x: Shaped[Array, "1 B S F"],
        pack: Callable[[Array], Array] | None = None,
        unpack: Callable[[Array, int], Array] | None = None,
        hops: Sequence[Hop] | None = None,
    ) -> Shaped[Array, "N B S F"]:
        pack, unpack = pack or (lambda x: x), unpack or (lambda x, _: x)
        if hops is None:
            return unpack(self.peers.gather(pack(x[0])), x.shape[2])
        N, (B, *_) = self.peers.N, x[0].shape
        heard, me, rows = 0 * jnp.broadcast_to(x, (N, *x[0].shape)), self.peers.index(), jnp.arange(B)[:, None]
        for by, slots in hops:
            every = jnp.broadcast_to(jnp.asarray(slots), (B, *slots.shape[-2:]))
            mine, sender = jnp.take(every, me, axis=1), me - by
            said = unpack(self.peers.shift(pack(x[0][rows, mine]), by), slots.shape[-1])
            where = jnp.where(sender < 0, N, sender)  # nobody: dropped
            heard = heard.at[where, rows, jnp.take(every, sender, axis=1, mode="clip")].set(said, mode="drop")
        return heard

    def apart(self, x: Shaped[Array, "N B S F"], alike: bool) -> Shaped[Array, "N B S F"]:
        return self.peers.apart(x) if alike else x

    def total(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return self.peers.total(x)

    def nothing(self, shape: tuple[int, ...]) -> Float[Array, "*shape"]:
        return self.peers.alike(jnp.zeros(shape, jnp.float32))


@dataclasses.dataclass(frozen=True)
class Virtual:
    """All N shards on one device; nothing is sent.

    Attributes:
      groups: m, how many groups of codes are used; None for all.
      arrived: which codes arrive [L, receiver N, sender N, B, S]; None for all. What a shard sends itself does.
    """

    groups: Int[Array, ""] | None = None
    arrived: Bool[Array, "L N N B S"] | None = None

    on_devices: ClassVar[bool] = False
    loses: ClassVar[bool] = False

    @classmethod
    def of(
        cls,
        shards: Shards,
        arrived: Bool[Array, "L B N slots"] | None = None,
        groups: Int[Array, ""] | None = None,
    ) -> "Virtual":
        """With losses as `eval.network.packet_loss.arrived` draws them: of every slot [N * S] at every receiver."""
        if arrived is None:
            return cls(groups)
        L, B, N, _ = arrived.shape
        there = jnp.asarray(arrived).reshape(L, B, N, N, -1)[..., shards.home_slots :]
        there = there | np.eye(N, dtype=bool)[:, :, None]
        return cls(groups, jnp.moveaxis(there, 1, 3))

    def here(self, table: Shaped[Table, "*B N S"]) -> Shaped[Table, "*B slots"]:
        return table.reshape(*table.shape[:-2], -1)

    def own(self, x: Shaped[Array, "*N N B S W"]) -> Shaped[Array, "N B S W"]:
        every = np.arange(x.shape[0])
        return x if x.ndim == 4 else x[every, every]

    def senders(self, x: Shaped[Array, "N *shape"]) -> Shaped[Array, "N *shape"]:
        return x

    def gather(self, x: Shaped[Array, "N *shape"]) -> Shaped[Array, "N *shape"]:
        return x

    def hear(
        self,
        x: Shaped[Array, "N B S F"],
        pack: Callable[[Array], Array] | None = None,
        unpack: Callable[[Array, int], Array] | None = None,
        hops: Sequence[Hop] | None = None,
    ) -> Shaped[Array, "N B S F"]:
        return x

    def post(
        self, codec: Quantizer, z: UInt16[Array, "N B S G"], block: Block, heard: Bool[np.ndarray, "L N N"]
    ) -> Posted:
        if self.arrived is None:
            return Posted.at_once(Delivery(z, self.groups))
        groups = codec.groups if self.groups is None else self.groups
        return Posted.at_once(Delivery(z, jnp.where(self.arrived[block.number], groups, 0)))

    def apart(self, x: Shaped[Array, "N B S F"], alike: bool) -> Shaped[Array, "N B S F"]:
        return x

    def total(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return x

    def nothing(self, shape: tuple[int, ...]) -> Float[Array, "*shape"]:
        """Also for every receiver, where these differ in what they get."""
        return jnp.zeros(shape if self.arrived is None else (shape[0], *shape), jnp.float32)
