"""How tokens are split over devices, and what is said when they cannot be."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from astra_jax.errors import AstraError
from astra_jax.mesh.sharding import DATA, SEQ, Shards, make_mesh, parse_devices


@given(st.integers(1, 12), st.integers(0, 60))
def test_an_even_split_covers_all_tokens_once_and_in_order(N, more):
    shards = Shards.split(N + more, N)
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


def test_several_class_tokens_are_all_as_one_is():
    shards = Shards((2, 1), "distributed", class_count=3)
    tokens = shards.tokens()
    assert tokens.valid.tolist() == [[True] * 5, [True] * 4 + [False]]
    assert tokens.sent.tolist() == [[False] * 3 + [True] * 2] * 2
    assert tokens.position.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 5, 5]]
    assert (shards.class_slots, shards.home_slots, shards.sent_slots) == (3, 3, 2)
    assert shards.weights("class").tolist() == [[0.5, 0, 0, 0, 0]] * 2
    assert shards.weights("second class").tolist() == [[0, 0.5, 0, 0, 0]] * 2
    np.testing.assert_allclose(shards.weights("input"), np.array([[0, 0, 0, 1, 1], [0, 0, 0, 1, 0]]) / 3)
    single = dataclasses.replace(shards, class_token="single")
    assert single == shards.without_replicas()
    assert single.tokens().valid.tolist() == [[True] * 5, [False] * 3 + [True, False]]
    assert single.tokens().sent.all() and single.sent_slots == 5
    assert single.weights("second class").tolist() == [[0, 1, 0, 0, 0], [0] * 5]
    ragged = dataclasses.replace(Shards.ragged(jnp.asarray([3]), 3, 2, "distributed"), class_count=3)
    for ours, theirs in zip(ragged.tokens(), Shards((1, 2), "distributed", class_count=3).tokens(), strict=True):
        np.testing.assert_array_equal(np.broadcast_to(ours, (1, 2, 5))[0], theirs)


MOST = 20  # tokens of the longest sequence in a ragged batch


@partial(jax.jit, static_argnums=(1, 2))
def ragged(lengths, N, class_token=None):
    """All that a split says; one program for batches of all lengths."""
    shards = Shards.ragged(lengths, MOST, N, class_token)
    weights = {pooling: shards.weights(pooling) for pooling in (["class"] if class_token else ["mean", "last"])}
    return shards.lengths, shards.index(), shards.tokens(), weights


def batches(shortest):
    return st.lists(st.integers(shortest, MOST), min_size=4, max_size=4)


@given(batches(1), st.sampled_from([1, 3, 8]))
def test_a_ragged_split_covers_every_sequence_once_and_in_order(batch, N):
    lengths, index, tokens, _ = jax.tree.map(np.asarray, ragged(jnp.asarray(batch), N))
    assert index.shape == (len(batch), N, -(-MOST // N))
    np.testing.assert_array_equal(tokens.valid.sum(-1), lengths)
    for b, T in enumerate(batch):
        assert index[b][tokens.valid[b]].tolist() == list(range(T))
        assert tokens.position[b][tokens.valid[b]].tolist() == list(range(T))
        assert lengths[b].max() - lengths[b].min() <= 1
        assert sorted(lengths[b]) == lengths[b].tolist()  # the longer ones last
        assert (lengths[b] == 0).sum() == max(0, N - T)  # too few tokens leave the first ones empty
        assert T - 1 in index[b, -1]
        assert T < N or Shards.split(T, N).lengths == tuple(lengths[b])  # each as if it were alone


@given(batches(1), st.lists(st.floats(0.5, 2), min_size=3, max_size=3))
def test_in_proportion_to_speeds_every_sequence_is_split_as_if_it_were_alone(batch, speeds):
    even = Shards.ragged(jnp.asarray(batch), MOST, 3, "single", causal=True)
    shards = even.in_proportion(speeds)
    assert (shards.class_token, shards.causal) == ("single", True)
    longest = max(max(Shards.split(T, 3).in_proportion(speeds).lengths) for T in range(12, MOST + 1))
    assert longest == shards.S
    for T, lengths in zip(batch, np.asarray(shards.lengths), strict=True):
        assert lengths.sum() == T
        assert T < 12 or Shards.split(T, 3).in_proportion(speeds).lengths == tuple(lengths)
    np.testing.assert_array_equal(even.in_proportion((2.0,) * 3).lengths, even.lengths)


def test_in_proportion_by_hand():
    assert Shards.split(16, 4, "distributed").in_proportion((1.0, 1.0, 0.5, 0.5)) == Shards((5, 5, 3, 3), "distributed")
    with pytest.raises(AstraError, match="of 16 tokens device 0, with speed 0.001, would get none: leave it out"):
        Shards.split(16, 4).in_proportion((0.001, 1.0, 1.0, 1.0))
    with pytest.raises(AstraError, match="2 speeds were given for 4 devices"):
        Shards.split(16, 4).in_proportion((1.0, 1.0))


@partial(jax.jit, static_argnums=(2, 3))
def there_and_back(lengths, x, N, class_token):
    shards = Shards.ragged(lengths, MOST, N, class_token)
    return shards.gather(shards.scatter(x), MOST)


@given(batches(1), st.sampled_from([1, 3, 8]))
def test_gather_brings_back_what_scatter_took_apart(batch, N):
    x = np.arange(len(batch) * MOST * 2.0).reshape(len(batch), MOST, 2)
    real = np.arange(MOST) < np.asarray(batch)[:, None]
    for class_token in (None, "distributed", "single"):  # whose slots are the model's to add, between the two
        back = there_and_back(jnp.asarray(batch), x, N, class_token)
        np.testing.assert_array_equal(np.asarray(back)[real], x[real])


@pytest.mark.parametrize("class_token", [None, "distributed", "single"])
@pytest.mark.parametrize("lengths", [(4,), (2, 2), (3, 1, 2)])
def test_gather_undoes_scatter_for_a_split_that_all_share(lengths, class_token):
    shards = Shards(lengths, class_token)
    x = jnp.arange(2.0 * shards.T).reshape(2, shards.T)
    np.testing.assert_array_equal(shards.gather(shards.scatter(x), shards.T), x)


@given(batches(1), st.sampled_from([1, 3, 8]))
def test_the_mean_reads_all_tokens_and_last_the_last_one(batch, N):
    _, index, tokens, weights = jax.tree.map(np.asarray, ragged(jnp.asarray(batch), N))
    expected = tokens.valid / np.asarray(batch)[:, None, None]
    np.testing.assert_allclose(weights["mean"], expected, rtol=1e-6)
    np.testing.assert_array_equal(weights["last"].sum((1, 2)), 1)
    for b, T in enumerate(batch):
        assert index[b][weights["last"][b] == 1] == [T - 1]
        assert tokens.valid[b][weights["last"][b] == 1]


@given(batches(0), st.sampled_from([1, 3, 8]))
def test_a_class_token_is_read_where_it_is_in_use(batch, N):
    """Its sequence may have no other token. Then one replica counts, on the last device."""
    distributed, single = (ragged(jnp.asarray(batch), N, kind)[3]["class"] for kind in ("distributed", "single"))
    for b, T in enumerate(batch):
        replicas = max(1, min(N, T))
        expected = np.zeros((N, 1 + -(-MOST // N)))
        expected[N - replicas :, 0] = 1 / replicas
        np.testing.assert_allclose(distributed[b], expected, rtol=1e-6)
        np.testing.assert_array_equal(single[b], np.eye(*expected.shape) * (np.arange(N) == 0)[:, None])


def test_empty_shards_have_no_class_token_that_counts():
    """Two tokens on three devices: the first has none; and no tokens at all, where the last device has the replica."""
    batch = jnp.asarray([2, 0, 3, 20])
    distributed, single = (ragged(batch, 3, kind)[2] for kind in ("distributed", "single"))
    assert distributed.valid[:, :, 0].tolist() == [[False, True, True], [False, False, True], [True] * 3, [True] * 3]
    assert not distributed.sent[:, 0].any()
    assert single.valid[:, :, 0].tolist() == [[True, False, False]] * 4
    assert single.sent.all()


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
        Shards.split(3, 4)
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
    with pytest.raises(AstraError, match="9999 devices were asked for"):
        make_mesh(9999)
    assert make_mesh(8).size == 8  # the error leaves no trace


def test_one_accelerator(monkeypatch):
    """Programs are run on it alone, but are compiled for as many CPU devices as are asked for."""
    cpu = jax.devices("cpu")
    monkeypatch.setattr(jax, "devices", lambda platform=None: cpu if platform else [SimpleNamespace(platform="gpu")])
    mesh = make_mesh(4, to_run=False)
    assert mesh.shape[SEQ] == 4 and [device.platform for device in mesh.devices.flat] == ["cpu"] * 4
    with pytest.raises(AstraError, match=r"JAX has 1 \(gpu\): use fewer, or set JAX_PLATFORMS=cpu, .* --virtual"):
        make_mesh(4)
