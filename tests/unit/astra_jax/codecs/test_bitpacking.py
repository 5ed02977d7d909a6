"""The wire format: exact sizes, exact layout, nothing lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from astra_jax.codecs import bitpacking
from astra_jax.errors import AstraError

pack = jax.jit(bitpacking.pack, static_argnums=1)
unpack = jax.jit(bitpacking.unpack, static_argnums=(1, 2))


@pytest.mark.parametrize("bits", range(1, 17))
@settings(max_examples=2)  # two programs for each
@given(data=st.data())
def test_round_trip(bits, data):
    """K = 2 ... 65536, any number of codes, the smallest and largest code among them."""
    codes = [*data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=30)), 0, 2**bits - 1]
    packed = pack(jnp.asarray(codes, jnp.uint16), bits)
    assert packed.dtype == jnp.uint8
    assert packed.size == bitpacking.packed_bytes(len(codes), bits)
    np.testing.assert_array_equal(unpack(packed, len(codes), bits), np.asarray(codes, np.uint16))


@pytest.mark.parametrize(
    ("codes", "bits", "size"),
    [(0, 10, 0), (1, 10, 2), (4, 10, 5), (49 * 32, 10, 1960), (50, 1, 7), (8, 1, 1), (3, 16, 6)],
)
def test_ten_bits_are_ten_bits(codes, bits, size):
    assert bitpacking.packed_bytes(codes, bits) == size


@pytest.mark.parametrize(
    ("codes", "bits", "expected"),
    [
        # 101, 010, 111, 001, each least significant bit first: 101 010 11|1 100 and four bits of padding.
        ([5, 2, 7, 1], 3, [0b11010101, 0b00000011]),
        ([1023, 0, 1], 10, [0xFF, 0x03, 0x10, 0x00]),
        ([0x1234, 0xABCD], 16, [0x34, 0x12, 0xCD, 0xAB]),
    ],
)
def test_the_layout(codes, bits, expected):
    assert bitpacking.pack(jnp.asarray(codes, jnp.uint16), bits).tolist() == expected


@pytest.mark.parametrize("bits", [3, 7, 10, 13])
def test_only_the_last_byte_is_padded(bits):
    """With all bits of all codes set, every byte is full but the last, whose spare high bits are zero."""
    packed = bitpacking.pack(jnp.full((2, 11), 2**bits - 1, jnp.uint16), bits)
    spare = -11 * bits % 8
    assert packed.tolist() == [[0xFF] * (packed.shape[1] - 1) + [0xFF >> spare]] * 2


@pytest.mark.parametrize(
    ("bits", "size", "tokens"),
    # 10 bits a token: 1120 in 1400 bytes; 320 bits: 35; a token of 41 bits needs 6 bytes.
    [(10, 1400, 1120), (320, 1400, 35), (41, 6, 1), (41, 10, 1), (41, 11, 2), (8, 1, 1)],
)
def test_a_packet_holds_whole_tokens(bits, size, tokens):
    assert bitpacking.tokens_per_packet(bits, size) == tokens
    assert bitpacking.packed_bytes(tokens, bits) <= size < bitpacking.packed_bytes(tokens + 1, bits)


@pytest.mark.parametrize("size", [5, 0, -1])
def test_a_packet_too_small_for_a_token_is_named(size):
    with pytest.raises(AstraError, match=f"^a packet holds {size} bytes, but the codes of one token take 6: "):
        bitpacking.tokens_per_packet(41, size)


@pytest.mark.parametrize(("slots", "tokens", "expected"), [(256, 35, 8), (35, 35, 1), (36, 35, 2), (1, 1120, 1)])
def test_packets_of_a_message(slots, tokens, expected):
    assert bitpacking.packets(slots, tokens) == expected
