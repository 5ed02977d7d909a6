"""The wire format of codes: log2(K) bits each, packed without gaps into bytes.

A message holds the codes of one shard of one sequence, token by token, group by group, each code least significant
bit first. Only the last byte of a message is padded. Our choice: the paper counts bits and leaves the layout open.

Where receivers only count how often each of K codewords was sent, the codes of a shard may arrive in any order, and a
bit string of S + K - 1 bits says them all (`pack_multiset`).

On a link that loses packets a message travels as packets of whole tokens, which arrive or are lost as a whole.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int, UInt8, UInt16

from astra_jax.errors import AstraError


def packed_bytes(codes: int, bits: int) -> int:
    """Bytes that `codes` codes of `bits` bits take on the wire."""
    return -(-codes * bits // 8)


def pack(codes: UInt16[Array, "*batch M"], bits: int) -> UInt8[Array, "*batch bytes"]:
    """Packs `M` codes of `bits` bits each (every code < 2**bits) into `packed_bytes(M, bits)` bytes."""
    one_bit_each = (codes[..., None] >> jnp.arange(bits, dtype=jnp.uint16)) & jnp.uint16(1)
    flat = one_bit_each.reshape(*codes.shape[:-1], codes.shape[-1] * bits)
    return jnp.packbits(flat.astype(jnp.uint8), axis=-1, bitorder="little")


def unpack(packed: UInt8[Array, "*batch bytes"], count: int, bits: int) -> UInt16[Array, "*batch M"]:
    """The inverse of `pack`: the first `count` codes of `bits` bits."""
    flat = jnp.unpackbits(packed, axis=-1, count=count * bits, bitorder="little")
    one_bit_each = flat.reshape(*packed.shape[:-1], count, bits).astype(jnp.uint16)
    return jnp.sum(one_bit_each << jnp.arange(bits, dtype=jnp.uint16), axis=-1, dtype=jnp.uint16)


def multiset_bytes(S: int, K: int) -> int:
    """Bytes that S codes out of K take on the wire where their order need not be known: S + K - 1 bits.

    That is less than S * log2(K) where a shard has enough tokens, of K = 1024 from 114 on: per token 5 bits instead of
    10 at S = 256, and 2 at S = 1024. The least that can be had, log2 of the number of multisets, is 3.6 at S = 256 and
    2 at S = 1024.
    """
    return -(-(S + K - 1) // 8)


def pack_multiset(codes: UInt16[Array, "*batch S"], K: int) -> UInt8[Array, "*batch bytes"]:
    """Packs S codes (every code < K) into `multiset_bytes(S, K)` bytes, of which receivers get the codes sorted.

    Stars and bars: a one for every code, in their order, and behind those of a codeword a zero, so that code z with i
    codes before it is the bit at place z + i. The last codeword needs no zero.
    """
    S = codes.shape[-1]
    places = jnp.sort(codes, axis=-1).astype(jnp.int32) + jnp.arange(S)

    def marked(places: Int[Array, "S"]) -> UInt8[Array, "bits"]:
        bits = jnp.zeros(S + K - 1, jnp.uint8)
        return bits.at[places].set(1, indices_are_sorted=True, unique_indices=True)

    return jnp.packbits(jnp.vectorize(marked, signature="(s)->(b)")(places), axis=-1, bitorder="little")


def unpack_multiset(packed: UInt8[Array, "*batch bytes"], S: int, K: int) -> UInt16[Array, "*batch S"]:
    """The inverse of `pack_multiset` but for the order: the S codes out of K, sorted."""
    bits = jnp.unpackbits(packed, axis=-1, count=S + K - 1, bitorder="little")

    def ones(bits: UInt8[Array, "bits"]) -> Int[Array, "S"]:
        return jnp.nonzero(bits, size=S)[0]

    return (jnp.vectorize(ones, signature="(b)->(s)")(bits) - jnp.arange(S)).astype(jnp.uint16)


def tokens_per_packet(token_bits: int, packet_bytes: int) -> int:
    """Whole tokens that a packet holds: `8 * packet_bytes // token_bits` (our choice: no token spans two packets).

    Args:
      token_bits: bits of one token in one block, G * log2(K).
      packet_bytes: the payload of a packet.

    Raises:
      AstraError: not even one token fits.
    """
    tokens = 8 * packet_bytes // token_bits
    if tokens < 1:
        raise AstraError(
            f"a packet holds {packet_bytes} bytes, but the codes of one token take {-(-token_bits // 8)}: "
            "use larger packets, or fewer groups"
        )
    return tokens


def packets(slots: int, tokens: int) -> int:
    """P: packets of a message of `slots` tokens, `tokens` of them in each but the last."""
    return -(-slots // tokens)
