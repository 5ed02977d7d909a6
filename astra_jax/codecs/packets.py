"""How one device's codes are cut into packets, of which each says something by itself: whatever arrives is of use.

Nothing in a packet spans two of them. Codes whose first groups are a code by themselves travel group by group, so that
packets that come in order bring ever more of every token; other codes travel token by token (our choice: the paper
counts bits).
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt8, UInt16

from astra_jax.codecs import bitpacking

PAYLOAD = 1200  # bytes of a packet at most: with headers it fits into every network's (IPv6 promises 1,280)


@dataclasses.dataclass(frozen=True)
class Packets:
    """The packets of M tokens: some tokens and some groups in each, all of them alike.

    Attributes:
      tokens: M.
      groups: G.
      bits: of a code.
      nested: whether the first groups are a code by themselves.
    """

    tokens: int
    groups: int
    bits: int
    nested: bool

    @property
    def each(self) -> tuple[int, int]:
        """(tokens, groups) of one packet."""
        room = 8 * PAYLOAD // self.bits  # codes
        if self.nested:
            parts = -(-self.tokens // room)
            tokens = -(-self.tokens // parts)
            return tokens, min(self.groups, max(1, room // tokens))
        groups = min(self.groups, room)
        parts = -(-self.tokens // max(1, room // groups))
        return -(-self.tokens // parts), groups

    @property
    def grid(self) -> tuple[int, int]:
        """(parts of the groups, parts of the tokens); packets travel in this order."""
        tokens, groups = self.each
        return -(-self.groups // groups), -(-self.tokens // tokens)

    @property
    def shape(self) -> tuple[int, int]:
        """(P, bytes)."""
        tokens, groups = self.each
        return self.grid[0] * self.grid[1], bitpacking.packed_bytes(tokens * groups, self.bits)

    @property
    def least(self) -> int:
        """How many of the first packets are needed for a code of every token."""
        return self.grid[1] if self.nested else self.shape[0]

    def pack(self, z: UInt16[Array, "M G"]) -> UInt8[Array, "P bytes"]:
        """Codes as packets."""
        (tokens, groups), (of_groups, of_tokens) = self.each, self.grid
        more = [(0, of_tokens * tokens - self.tokens), (0, of_groups * groups - self.groups)]
        parts = jnp.pad(z, more).reshape(of_tokens, tokens, of_groups, groups)
        return bitpacking.pack(parts.transpose(2, 0, 1, 3).reshape(self.shape[0], -1), self.bits)

    def unpack(self, packets: UInt8[Array, "P bytes"]) -> UInt16[Array, "M G"]:
        """The inverse of `pack`."""
        (tokens, groups), (of_groups, of_tokens) = self.each, self.grid
        codes = bitpacking.unpack(packets, tokens * groups, self.bits)
        parts = codes.reshape(of_groups, of_tokens, tokens, groups).transpose(1, 2, 0, 3)
        return parts.reshape(of_tokens * tokens, -1)[: self.tokens, : self.groups]

    def arrived(self, there: Bool[Array, "P"]) -> Int[Array, "M"]:
        """How many groups of every token can be made use of, where these packets arrived: those before the first that
        is missing; of codes that are nothing in part, all or none."""
        (tokens, groups), parts = self.each, there.reshape(self.grid).astype(jnp.int32)
        whole = jnp.minimum(groups * jnp.cumprod(parts, axis=0).sum(0), self.groups)
        found = whole if self.nested else jnp.where(whole == self.groups, whole, 0)
        return jnp.repeat(found, tokens)[: self.tokens]
