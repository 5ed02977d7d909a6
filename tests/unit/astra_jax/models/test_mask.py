"""Masks: local and remote ones together are what one device sees, whatever the split and the window."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from astra_jax.mesh.sharding import Shards, Tokens
from astra_jax.models import mask
from astra_jax.models.mask import Block


@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 40),
)
def test_every_token_is_seen_once_where_it_is_within_the_window(lengths, causal, window):
    shards, block = Shards(tuple(lengths), causal=causal), Block(0, window=window)
    flat = Tokens(*(np.asarray(table).reshape(-1) for table in shards.tokens()))
    same = flat.shard[:, None] == flat.shard[None, :]
    local = np.asarray(mask.sees(flat, flat, causal, block)) & same
    seen = local.astype(int) + np.asarray(mask.remote(shards, flat, flat, block))
    away = flat.position[:, None] - flat.position[None, :]
    expected = np.broadcast_to(flat.valid, away.shape) & (abs(away) < (window or 100))
    if causal:
        expected = expected & (away >= 0)
    real = flat.valid[:, None] & flat.valid[None, :]
    np.testing.assert_array_equal(seen[real], expected[real])


def test_the_window_of_a_block_is_known_where_all_have_the_same():
    assert mask.window_at(None, 1) is None
    assert mask.window_at((7, 7), jnp.int32(1)) == 7
    found = [int(mask.window_at((7, None, 3), jnp.int32(number))) for number in range(3)]
    assert found[0] == 7 and found[1] > 10**6 and found[2] == 3
