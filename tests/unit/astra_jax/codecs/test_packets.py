"""Codes in packets: there and back, no packet too large, and what some of them say."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from astra_jax.codecs.packets import PAYLOAD, Packets

SIZES = st.tuples(st.integers(1, 3000), st.integers(1, 40), st.sampled_from([1, 4, 10, 16]))


def codes(cut, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 2**cut.bits, (cut.tokens, cut.groups)), jnp.uint16)


@given(SIZES, st.booleans())
def test_no_packet_is_too_large_and_few_are_small(size, nested):
    cut = Packets(*size, nested)
    P, width = cut.shape
    tokens, groups, bits = size
    assert width <= PAYLOAD and -(-tokens * groups * bits // (8 * PAYLOAD)) <= P
    assert P * width <= 2 * (tokens * groups * bits / 8) + P, "at most half of it is padding"


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "size", [(1, 1, 10), (256, 1, 10), (256, 32, 10), (961, 3, 10), (65, 4, 16), (3000, 7, 4)], ids=str
)
def test_there_and_back(size, nested):
    cut = Packets(*size, nested)
    z = codes(cut)
    packets = cut.pack(z)
    assert packets.shape == cut.shape
    np.testing.assert_array_equal(cut.unpack(packets), z)
    np.testing.assert_array_equal(cut.arrived(jnp.ones(cut.shape[0], bool)), np.full(cut.tokens, cut.groups))
    np.testing.assert_array_equal(cut.arrived(jnp.zeros(cut.shape[0], bool)), np.zeros(cut.tokens))


@pytest.mark.parametrize("nested", [False, True])
def test_what_is_missing(nested):
    """Of nested codes the groups before the first that is missing count, of others all or none; of no token more."""
    cut, draws = Packets(1500, 9, 10, nested), np.random.default_rng(1)
    P, (of_groups, of_tokens), (tokens, groups) = cut.shape[0], cut.grid, cut.each
    for _ in range(20):
        there = draws.random(P) < 0.7
        found = np.asarray(cut.arrived(jnp.asarray(there)))
        for token in (0, tokens - 1, tokens % 1500, 1499):
            mine = there.reshape(of_groups, of_tokens)[:, token // tokens]
            first = of_groups if mine.all() else int(np.argmin(mine))
            expected = min(first * groups, 9) if nested else 9 * mine.all()
            assert found[token] == expected


def test_a_packet_of_nested_codes_has_what_comes_first():
    """The first packet alone has the first groups of all tokens, or of as many as fit."""
    cut = Packets(256, 32, 10, True)
    assert cut.each == (256, 3) and cut.shape[0] == 11
    assert Packets(256, 32, 10, False).each == (29, 32)
    z = codes(cut)
    only = jnp.asarray(cut.pack(z)).at[1:].set(0)
    np.testing.assert_array_equal(cut.unpack(only)[:, :3], z[:, :3])
