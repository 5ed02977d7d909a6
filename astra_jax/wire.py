"""The wire format of codes: log2(K) bits each, packed without gaps into bytes.

A message holds the codes of one shard of one sequence, token by token, group by group, each code least significant
bit first. Only the last byte of a message is padded. Our choice: the paper counts bits and leaves the layout open.
"""

import jax.numpy as jnp
from jaxtyping import Array, UInt8, UInt16


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
