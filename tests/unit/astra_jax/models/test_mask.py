"""Masks: local and remote ones together are what one device sees, whatever the split and the window."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
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
    shards, block = Shards(tuple(lengths), causal=causal), Block(0, windows=(window,))
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
    assert Block(1).window is None and Block(1, windows=(None, None)).window is None
    assert Block(jnp.int32(1), windows=(7, 7)).window == 7
    found = [int(Block(jnp.int32(number), windows=(7, None, 3)).window) for number in range(3)]
    assert found[0] == 7 and found[1] > 10**6 and found[2] == 3


@partial(jax.jit, static_argnums=(1, 2, 3, 4))  # step by step takes ten times as long
def hops_and_sight(lengths, N, S, window, causal):
    """The hops of sequences of these lengths, which tokens their queries see of others, and which tokens are there."""
    shards = Shards.ragged(lengths, N * S, N, causal=causal)
    by_row = [jnp.broadcast_to(table, (len(lengths), N, S)).reshape(-1, N * S) for table in shards.tokens()]
    flat = Tokens(*by_row)._replace(shard=by_row[0][0])
    seen = mask.remote(shards, flat, flat, Block(0, windows=(window,)))
    return mask.hops(shards, window), seen, shards.tokens().valid


@settings(max_examples=8)  # a program for each split
@given(N=st.integers(2, 5), S=st.integers(1, 6), window=st.integers(1, 20), causal=st.booleans())
def test_hops_bring_all_that_a_query_can_see(N, S, window, causal):
    """Of sequences of every length, also of fewer tokens than devices; and no more than half of everything is sent."""
    lengths = jnp.arange(1, N * S + 1)
    found, seen, valid = hops_and_sight(lengths, N, S, window, causal)
    if found is None:
        return
    assert 2 * sum(hop.slots.shape[-1] for hop in found) <= (N - 1) * S
    heard = np.zeros((len(lengths), N, N, S), bool)  # by receiver, of sender
    for hop in found:
        by, slots, rows = int(hop.by), np.asarray(hop.slots), np.arange(len(lengths))[:, None]
        for sender in range(max(0, -by), min(N, N - by)):
            heard[rows, sender + by, sender, slots[:, sender]] = True
    seen = np.asarray(seen).reshape(len(lengths), N, S, N, S) & np.asarray(valid)[..., None, None]
    assert not (seen.any(axis=2) & ~heard).any()


def test_what_is_uneven_or_sends_a_class_token_sends_everything():
    text = Shards.ragged(jnp.asarray([64]), 64, 4, causal=True)
    assert mask.hops(text, 4) and mask.hops(text, None) is None
    assert mask.hops(text.in_proportion([1.0, 2.0, 1.0, 1.0]), 4) is None
    assert mask.hops(Shards((16, 16, 16, 16), "single"), 4) is None
    assert mask.hops(Shards((16, 16, 16, 16), "distributed"), 4) is None
    assert mask.hops(Shards((16, 16, 16, 16)), 4)
    assert mask.hops(Shards((16, 17, 16, 17)), 4) is None
