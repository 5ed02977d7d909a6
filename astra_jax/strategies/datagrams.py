"""Codes between hosts that each have a program of their own: sent and waited for from within it, by callbacks.

Nothing here is a collective, and no host's program knows how long another one's takes. A callback hands the codes to a
`Link` right after the norm, all that is local is computed, and a second callback, which depends on that, waits for the
others' codes. What did not arrive in time is no part of the delivery.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jaxtyping import Array, Bool, Float, Shaped, UInt16

from astra_jax.codecs.base import Quantizer
from astra_jax.codecs.packets import PAYLOAD, Packets
from astra_jax.mesh.sharding import Table
from astra_jax.models.mask import Block, Hop
from astra_jax.strategies.transport import Delivery, Posted

IDS, STATES, WHOLE = -1, -2, -3  # what travels besides the codes of blocks, in their place; all of it arrives


@runtime_checkable
class Link(Protocol):
    """What sends packets to other hosts and waits for theirs, called by a program that runs: no JAX within."""

    def post(self, channel: int, packets: np.ndarray, receivers: Sequence[int], least: int) -> None:
        """Sends the rows [P,bytes] of a block's codes, or of something else, to these shards' hosts. Waits for nothing.

        Args:
          channel: number of the block, or `IDS`, `STATES` or `WHOLE`.
          least: how many of the packets have to go; those behind them are of use, but need not.
        """

    def wait(self, channel: int, packets: Sequence[int], senders: Sequence[int]) -> list[dict[int, bytes]]:
        """What arrived of these shards, of each its packets by their numbers.

        Args:
          packets: P of each sender.
        """


@dataclasses.dataclass(frozen=True)
class Datagrams:
    """One shard on each host, and on each host a program of its own: codes leave from within it, and are waited for
    when all that is local has been computed.

    Attributes:
      link: to the other hosts.
      N, index: how many shards there are, and which is here.
      unused: slots at the end of every shard that no program computes (`Shards.unused`).
    """

    link: Link
    N: int
    index: int
    unused: tuple[int, ...]

    on_devices: ClassVar[bool] = True
    loses: ClassVar[bool] = True

    @property
    def others(self) -> list[int]:
        """The shards that are on other hosts."""
        return [n for n in range(self.N) if n != self.index]

    def _slots(self, x: Any, n: int, axis: int) -> Any:
        """Of the slots along an axis those that shard n has."""
        return x[(slice(None),) * axis + (slice(x.shape[axis] - self.unused[n]),)]

    def _whole(self, x: Shaped[Array, "B S *feature"], n: int) -> Shaped[Array, "B slots *feature"]:
        """Padded to as many slots as the longest shard has."""
        return jnp.pad(x, [(0, 0), (0, self.unused[n]), *[(0, 0)] * (x.ndim - 2)])

    def here(self, table: Shaped[Table, "*B N S"]) -> Shaped[Table, "*B slots"]:
        mine = table[..., self.index, :]
        return self._slots(mine, self.index, mine.ndim - 1)

    def own(self, x: Shaped[Array, "N B S W"]) -> Shaped[Array, "1 B slots W"]:
        return self._slots(x[self.index][None], self.index, 2)

    def senders(self, x: Shaped[Table, "N *shape"]) -> Shaped[Array, "others *shape"]:
        return jnp.asarray(x)[np.asarray(self.others)]

    def gather(self, x: Shaped[Array, "1 *shape"]) -> Shaped[Array, "N *shape"]:
        rows = self._exchanged(WHOLE, x[0], [x.shape[1:]] * self.N, self.others)
        return jnp.stack(rows)

    def hear(
        self,
        x: Shaped[Array, "1 B S F"],
        pack: Callable[[Array], Array] | None = None,
        unpack: Callable[[Array, int], Array] | None = None,
        hops: Sequence[Hop] | None = None,
    ) -> Shaped[Array, "N B slots F"]:
        """As it is and to all: token ids, which nothing packs and no window spares."""
        _, B, S, F = x.shape
        longest = S + self.unused[self.index]
        shapes = [(B, longest - unused, F) for unused in self.unused]
        rows = self._exchanged(IDS, x[0], shapes, self.others)
        return jnp.stack([self._whole(row, n) for n, row in enumerate(rows)])

    def post(
        self, codec: Quantizer, z: UInt16[Array, "1 B S G"], block: Block, heard: Bool[np.ndarray, "L N N"]
    ) -> Posted:
        _, B, S, G = z.shape
        slots = [S + self.unused[self.index] - unused for unused in self.unused]
        cuts = [Packets(B * one, G, codec.bits, codec.nested) for one in slots]
        left = io_callback(
            partial(
                _send, self.link, [np.flatnonzero(to[:, self.index]).tolist() for to in heard], cuts[self.index].least
            ),
            jax.ShapeDtypeStruct((), jnp.float32),
            block.number,
            cuts[self.index].pack(z[0].reshape(B * S, G)),
        )

        def local(inputs: Any) -> Any:
            return jax.tree.map(lambda a: a + left.astype(a.dtype), inputs)  # 0, as nobody but us knows

        def receive(done: Any) -> Delivery:
            shapes = [cuts[n].shape for n in self.others]
            P, width = sum(count for count, _ in shapes), max(size for _, size in shapes)
            packets, there = io_callback(
                partial(
                    _receive, self.link, self.others, shapes, [np.flatnonzero(to[self.index]).tolist() for to in heard]
                ),
                (jax.ShapeDtypeStruct((P, width), jnp.uint8), jax.ShapeDtypeStruct((P,), jnp.bool_)),
                block.number,
                left + 0 * sum(jnp.sum(a) for a in jax.tree.leaves(done)),
            )
            codes, groups, begin = list[Any](), list[Any](), 0
            for n, cut in enumerate(cuts):
                if n == self.index:
                    mine, all_of_it = z[0], jnp.full((B, S), G, jnp.int32)
                else:
                    rows, end = slice(begin, begin + cut.shape[0]), begin + cut.shape[0]
                    mine = cut.unpack(packets[rows, : cut.shape[1]]).reshape(B, slots[n], G)
                    all_of_it, begin = cut.arrived(there[rows]).reshape(B, slots[n]), end
                codes.append(self._whole(mine, n))
                groups.append(self._whole(all_of_it, n))
            return Delivery(jnp.stack(codes), jnp.stack(groups))

        return Posted(local, receive)

    def apart(self, x: Shaped[Array, "N B S F"], alike: bool) -> Shaped[Array, "N B S F"]:
        return x

    def total(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The sum, on the host of the last shard; elsewhere what that host has."""
        last = self.N - 1
        if self.index != last:
            return self._sent(STATES, x, [last]) + x
        return jnp.stack(self._exchanged(STATES, x, [x.shape] * self.N, [])).sum(0)

    def nothing(self, shape: tuple[int, ...]) -> Float[Array, "*shape"]:
        return jnp.zeros(shape, jnp.float32)

    def _sent(self, channel: int, x: Shaped[Array, "*shape"], receivers: Sequence[int]) -> Float[Array, ""]:
        """0, once an array has left."""
        return io_callback(
            partial(_send_array, self.link, channel, receivers), jax.ShapeDtypeStruct((), jnp.float32), x
        )

    def _exchanged(
        self, channel: int, x: Shaped[Array, "*shape"], shapes: Sequence[tuple[int, ...]], receivers: Sequence[int]
    ) -> list[Shaped[Array, "..."]]:
        """What every shard has; 0 of one that is gone."""
        theirs = [jax.ShapeDtypeStruct(shapes[n], x.dtype) for n in self.others]
        left = self._sent(channel, x, receivers)
        found = io_callback(partial(_receive_arrays, self.link, channel, self.others, theirs), theirs, left)
        return [*found[: self.index], x, *found[self.index :]]


def _send(link: Link, receivers: Sequence[Sequence[int]], least: int, number: Any, packets: Any) -> np.ndarray:
    at = int(number)
    link.post(at, np.asarray(packets), receivers[min(at, len(receivers) - 1)], least)
    return np.zeros((), np.float32)


def _receive(
    link: Link,
    others: Sequence[int],
    shapes: Sequence[tuple[int, int]],
    senders: Sequence[Sequence[int]],
    number: Any,
    done: Any,
) -> tuple[np.ndarray, np.ndarray]:
    at = int(number)
    said = senders[min(at, len(senders) - 1)]
    packets = np.zeros((sum(count for count, _ in shapes), max(size for _, size in shapes)), np.uint8)
    there = np.zeros(len(packets), bool)
    firsts = dict(zip(others, np.cumsum([0, *(count for count, _ in shapes)]).tolist(), strict=False))
    of = dict(zip(others, shapes, strict=True))
    for n, found in zip(said, link.wait(at, [of[n][0] for n in said], said), strict=True):
        for p, content in found.items():
            if len(content) == of[n][1] and p < of[n][0]:
                packets[firsts[n] + p, : len(content)] = np.frombuffer(content, np.uint8)
                there[firsts[n] + p] = True
    return packets, there


def _rows(array: np.ndarray) -> np.ndarray:
    """An array's bytes as packets."""
    flat = np.frombuffer(array.tobytes(), np.uint8)
    P = -(-len(flat) // PAYLOAD)
    width = -(-len(flat) // max(P, 1))
    return np.pad(flat, (0, P * width - len(flat))).reshape(P, width)


def _send_array(link: Link, channel: int, receivers: Sequence[int], x: Any) -> np.ndarray:
    if receivers:
        rows = _rows(np.asarray(x))
        link.post(channel, rows, receivers, len(rows))
    return np.zeros((), np.float32)


def _receive_arrays(
    link: Link, channel: int, others: Sequence[int], shapes: Sequence[Any], left: Any
) -> list[np.ndarray]:
    counts = [len(_rows(np.zeros(s.shape, s.dtype))) for s in shapes]
    found = list[np.ndarray]()
    for shape, count, packets in zip(shapes, counts, link.wait(channel, counts, others), strict=True):
        array = np.zeros(shape.shape, shape.dtype)
        if len(packets) == count:
            array = np.frombuffer(b"".join(packets[p] for p in range(count))[: array.nbytes], shape.dtype)
        found.append(array.reshape(shape.shape))
    return found
