"""The wire format: exact sizes, exact layout, nothing lost."""

import math

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
pack_multiset = jax.jit(bitpacking.pack_multiset, static_argnums=1)
unpack_multiset = jax.jit(bitpacking.unpack_multiset, static_argnums=(1, 2))


@pytest.mark.parametrize("bits", range(1, 17))
@settings(max_examples=4)
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


def check_multiset(codes, K):
    S = codes.shape[-1]
    packed = pack_multiset(jnp.asarray(codes, jnp.uint16), K)
    assert (packed.dtype, packed.shape) == (jnp.uint8, (*codes.shape[:-1], bitpacking.multiset_bytes(S, K)))
    found = unpack_multiset(packed, S, K)
    assert found.dtype == jnp.uint16
    np.testing.assert_array_equal(found, np.sort(codes, axis=-1))


@pytest.mark.parametrize("bits", range(1, 17))
@settings(max_examples=3)
@given(data=st.data())
def test_a_multiset_comes_back_sorted(bits, data):
    """K = 2 ... 65536, any number of codes of which some are equal, the smallest and largest code among them."""
    K = 2**bits
    codes = [*data.draw(st.lists(st.integers(0, K - 1), max_size=20)), 0, K - 1]
    codes += data.draw(st.lists(st.sampled_from(codes), max_size=20))
    check_multiset(np.asarray(data.draw(st.permutations(codes))), K)


@pytest.mark.parametrize("K", [2, 8, 1024])
@pytest.mark.parametrize("S", [1, 2, 300])
def test_multisets_of_one_code_alone(S, K):
    """All codes the smallest, all the largest, and in a batch with others."""
    check_multiset(np.stack([np.zeros(S, int), np.full(S, K - 1), np.arange(S) % K])[:, None], K)


def test_every_multiset_has_bits_of_its_own():
    """All 3^4 sequences of 4 codes out of 3: their bits are equal where, and only where, their multisets are."""
    codes = np.stack(np.meshgrid(*[np.arange(3)] * 4), axis=-1).reshape(-1, 4)
    packed = pack_multiset(jnp.asarray(codes, jnp.uint16), 3).tolist()
    pairs = {(*sorted(row), *bits) for row, bits in zip(codes.tolist(), packed, strict=True)}
    assert len(pairs) == len({tuple(bits) for bits in packed}) == math.comb(6, 4)


def test_the_layout_of_a_multiset():
    """5, 0, 2, 2 of K = 8: a one for 0, two zeros up to 2, two ones, three zeros up to 5, a one, two zeros up to 7."""
    assert bitpacking.pack_multiset(jnp.asarray([5, 0, 2, 2], jnp.uint16), 8).tolist() == [0b00011001, 0b00000001]


@pytest.mark.parametrize(
    ("S", "K", "size"), [(256, 1024, 160), (1024, 1024, 256), (1, 2, 1), (7, 2, 1), (8, 2, 2), (3, 65536, 8193)]
)
def test_a_multiset_takes_a_bit_for_every_code_and_codeword_but_one(S, K, size):
    assert bitpacking.multiset_bytes(S, K) == size


def test_what_a_multiset_takes_beside_sequences_and_the_least_possible():
    """The figures of `multiset_bytes`."""
    for S, least in ((256, 3.6), (1024, 2.0)):
        assert math.log2(math.comb(S + 1023, S)) / S == pytest.approx(least, abs=0.05)
        assert 8 * bitpacking.multiset_bytes(S, 1024) / S == {256: 5, 1024: 2}[S]
    assert 113 + 1023 > 113 * 10 and 114 + 1023 < 114 * 10


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
