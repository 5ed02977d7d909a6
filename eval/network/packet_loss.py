"""Packet loss on the links between devices: which codes arrive.

Every directed link, from one device to another, loses packets on its own. The packets of a link follow each other block
by block, in each the tokens in order. A packet is lost as a whole, with the codes of all its tokens; the receiver
masks those tokens out of the attention of that block, or goes by what it expected of them (`Astra.lost`),
and nothing is sent again. What a lost code is replaced by is not public in the paper: both are our choice. What is sent
once, as token ids before the first block and the state that a head reads after the last, is not lost.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from astra_jax.codecs import bitpacking
from astra_jax.codecs.config import CODED, Kind
from astra_jax.errors import AstraError
from astra_jax.mesh.sharding import Shards


@dataclasses.dataclass(frozen=True)
class PacketLoss:
    """How a link loses packets: a chain of two states, lost and arrived (Gilbert's model).

    Attributes:
      rate: share of the packets that are lost, from 0 to 1; of 1 every device sees its own tokens alone.
      burst: mean number of packets in a row that are lost; None where every packet is lost on its own (Bernoulli).
      packet: payload of a packet in bytes.

    Raises:
      AstraError: a value is out of range, or the bursts are too short for the rate.
    """

    rate: float
    burst: float | None = None
    packet: int = 1400

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise AstraError(f"the packet loss is {self.rate:g}; it is a share of the packets, from 0 to 1: try 0.05")
        if self.burst is None:
            return
        if not 1 <= self.burst < math.inf:
            raise AstraError(f"burst is {self.burst:g}; it is a mean number of packets, at least 1: try 8")
        if self.rate == 1:
            raise AstraError("the packet loss is 1: where all are lost there are no bursts: leave the burst out")
        if self.rate > self.burst / (self.burst + 1):
            raise AstraError(
                f"bursts of {self.burst:g} packets cannot make up a loss of {self.rate:g}: "
                f"let them have {self.rate / (1 - self.rate):.3g} packets or more"
            )

    @property
    def stay(self) -> float:
        """Probability that a packet is lost after one that was lost: `1 - 1 / burst`."""
        return self.rate if self.burst is None else 1 - 1 / self.burst

    @property
    def enter(self) -> float:
        """Probability that a packet is lost after one that arrived: `rate / (1 - rate) * (1 - stay)`.

        With it the share of lost packets is `rate` at any time. Where every packet is on its own that is `rate` itself.
        """
        return self.rate if self.burst is None else self.rate / (1 - self.rate) * (1 - self.stay)


def lost(
    packet_loss: PacketLoss, P: int, links: tuple[int, ...], rng: np.random.Generator
) -> Bool[np.ndarray, "P *links"]:
    """Which of P packets in a row are lost, on links that do not know of each other; the first is as any other."""
    draws = rng.random((P, *links))
    found = np.empty(draws.shape, bool)
    found[:1] = draws[:1] < packet_loss.rate  # P may be 0
    for p in range(1, P):
        found[p] = draws[p] < np.where(found[p - 1], packet_loss.stay, packet_loss.enter)
    return found


def arrived(
    packet_loss: PacketLoss,
    shards: Shards,
    token_bits: int,
    L: int,
    B: int,
    rng: np.random.Generator,
    kinds: Sequence[Kind] = (),
) -> Bool[np.ndarray, "L B N slots"]:
    """Which codes reach whom in one forward pass of B sequences, as `strategies.coded.Astra.virtual` takes it.

    Every sequence is a pass of its own: its messages share no packet with those of others.

    Args:
      packet_loss: how links lose packets.
      shards: the split. All devices send the same number of slots, padding included, as they do on a mesh.
      token_bits: bits of one token in one block, G * log2(K).
      L: blocks.
      kinds: of these blocks (`AstraConfig.kinds`), by default all coded: only coded ones have packets.

    Returns:
      For every block, sequence, receiving device and slot of any device whether the slot's code is there. What a device
      has itself and what is never sent count as there.

    Raises:
      AstraError: a packet is too small for a token.
    """
    N, sent, home = shards.N, shards.sent_slots, shards.home_slots
    tokens = bitpacking.tokens_per_packet(token_bits, packet_loss.packet)
    P = bitpacking.packets(sent, tokens)
    coded = np.asarray([kind == "coded" for kind in kinds or CODED * L])
    there = ~lost(packet_loss, int(coded.sum()) * P, (B, N, N), rng).reshape(-1, P, B, N, N) | np.eye(N, dtype=bool)
    slots = np.ones((L, B, N, N, home + sent), bool)  # the last but one axis is the sender
    slots[coded, ..., home:] = np.moveaxis(there, 1, -1)[..., np.arange(sent) // tokens]
    return slots.reshape(L, B, N, -1)
