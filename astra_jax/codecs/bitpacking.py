"""The wire format of codes: log2(K) bits each, packed without gaps into bytes.

A message holds the codes of one shard of one sequence, token by token, group by group, each code least significant
bit first. Only the last byte of a message is padded. Our choice: the paper counts bits and leaves the layout open.

On a link that loses packets a message travels as packets of whole tokens, which arrive or are lost as a whole.
"""

import jax.numpy as jnp
from jaxtyping import Array, UInt8, UInt16

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
