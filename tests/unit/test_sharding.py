"""How tokens are split over devices, and what is said when they cannot be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from astra_jax.errors import AstraError
from astra_jax.sharding import DATA, SEQ, Shards, make_mesh, parse_devices


@given(st.integers(1, 12), st.integers(0, 60))
def test_an_even_split_covers_all_tokens_once_and_in_order(N, more):
    shards = Shards.even(N + more, N)
    tokens = shards.tokens()
    assert shards.N == N
    assert N + more == shards.T
    assert max(shards.lengths) == shards.S
    assert max(shards.lengths) - min(shards.lengths) <= 1
    assert shards.index()[tokens.valid].tolist() == list(range(N + more))
    assert tokens.position[tokens.valid].tolist() == list(range(N + more))


def test_uneven_shards_are_padded_with_invalid_slots():
    shards = Shards((3, 1, 2))
    tokens = shards.tokens()
    assert shards.index().tolist() == [[0, 1, 2], [3, 3, 3], [4, 5, 5]]
    assert tokens.valid.tolist() == [[True] * 3, [True, False, False], [True, True, False]]
    assert tokens.shard.tolist() == [[0] * 3, [1] * 3, [2] * 3]
    assert tokens.sent.all()
    assert (shards.class_slots, shards.home_slots, shards.sent_slots) == (0, 0, 3)


def test_a_distributed_class_token_heads_every_shard_and_stays_at_home():
    shards = Shards((2, 1), "distributed")
    tokens = shards.tokens()
    assert tokens.valid.tolist() == [[True, True, True], [True, True, False]]
    assert tokens.sent.tolist() == [[False, True, True]] * 2
    assert tokens.position.tolist() == [[0, 1, 2], [0, 3, 3]]
    assert (shards.class_slots, shards.home_slots, shards.sent_slots) == (1, 1, 2)
    assert shards.weights("class").tolist() == [[0.5, 0, 0], [0.5, 0, 0]]


def test_a_single_class_token_is_in_use_on_shard_0_and_sent():
    shards = Shards((2, 1), "single")
    tokens = shards.tokens()
    assert tokens.valid.tolist() == [[True, True, True], [False, True, False]]
    assert tokens.sent.all()
    assert (shards.class_slots, shards.home_slots, shards.sent_slots) == (1, 0, 3)
    assert shards.weights("class").tolist() == [[1, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("lengths", [(2, 2), (3, 1, 2)])
def test_scatter_puts_tokens_into_their_slots(lengths):
    shards = Shards(lengths)
    x = jnp.arange(sum(lengths) * 2.0).reshape(1, -1, 2)
    slots = shards.scatter(x)
    np.testing.assert_array_equal(slots[0], x[0, shards.index().reshape(-1)])
    with pytest.raises(AstraError, match=rf"the input has {shards.T - 1} tokens; the split .* is for {shards.T}"):
        shards.scatter(x[:, 1:])


def test_more_devices_than_tokens():
    with pytest.raises(AstraError, match="3 tokens cannot be split over 4 devices: use at most 3 devices"):
        Shards.even(3, 4)
    with pytest.raises(AstraError, match="cannot be split over 0 devices"):
        Shards(())


@pytest.mark.parametrize(("text", "devices"), [("4", (1, 4)), ("2x4", (2, 4)), (" 1x1 ", (1, 1)), ("08", (1, 8))])
def test_parse_devices(text, devices):
    assert parse_devices(text) == devices


@pytest.mark.parametrize("text", ["", "0", "x4", "2x0", "0x4", "2x", "-1", "four", "1x2x3", "2.0"])
def test_devices_that_are_not_understood(text):
    with pytest.raises(AstraError) as raised:
        parse_devices(text)
    assert f"devices is {text!r}" in str(raised.value)
    assert "try 4 or 2x4" in str(raised.value)


def test_make_mesh():
    mesh = make_mesh(3, 2)
    assert dict(mesh.shape) == {DATA: 2, SEQ: 3}
    assert mesh.devices.ravel().tolist() == jax.devices()[:6]


def test_a_mesh_of_too_many_devices():
    with pytest.raises(AstraError) as raised:
        make_mesh(8, 2)
    assert "2 x 8 devices were asked for, but JAX has 8 (cpu): use fewer" in str(raised.value)
    assert 'jax.config.update("jax_num_cpu_devices", 16)' in str(raised.value)
    assert make_mesh(8).size == 8  # the error leaves no trace
