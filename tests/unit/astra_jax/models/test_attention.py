"""Attention over several sources is the softmax over all of them together."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from astra_jax.models.attention import attend, merge
from astra_jax.models.interface import Bias, Source

B, S, R, H, J, E = 2, 3, 6, 4, 2, 5


def draw(seed=0, heads=H, kv_heads=J, scale=1.0):
    """Random query, keys and values."""
    rng = np.random.default_rng(seed)
    shapes = ((B, S, heads, E), (B, R, kv_heads, E), (B, R, kv_heads, E))
    return [jnp.asarray(scale * rng.normal(size=shape), jnp.float32) for shape in shapes]


def softmax_attention(query, key, value, mask):
    """The textbook formula, query by query, in float64. A query that sees nothing gets 0."""
    query, key, value = (np.asarray(a, np.float64) for a in (query, key, value))
    out = np.zeros(query.shape)
    for b, s, h in np.ndindex(query.shape[:3]):
        j = h // (query.shape[2] // key.shape[2])
        seen = np.flatnonzero(mask[b, s])
        if seen.size:
            scores = key[b, seen, j] @ query[b, s, h] / np.sqrt(query.shape[3])
            weights = np.exp(scores - scores.max())
            out[b, s, h] = weights @ value[b, seen, j] / weights.sum()
    return out


@jax.jit
def attention(query, sources):
    return merge([attend(query, source) for source in sources])


def split(key, value, mask, cuts):
    """The sources between consecutive cuts of the keys."""
    edges = [0, *cuts, key.shape[1]]
    return [Source(key[:, a:b], value[:, a:b], mask[..., a:b]) for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("cuts", [[], [1], [5], [2, 3], [1, 2, 3, 4, 5]])
def test_any_cut_of_the_keys_gives_the_plain_softmax_in_any_order(cuts):
    query, key, value = draw()
    mask = np.random.default_rng(1).random((B, S, R)) < 0.6
    sources = split(key, value, jnp.asarray(mask), cuts)
    expected = softmax_attention(query, key, value, mask)
    np.testing.assert_allclose(attention(query, sources), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(attention(query, sources[::-1]), expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=100)
@given(
    seed=st.integers(0, 9),
    where=st.lists(st.integers(0, 3), min_size=B * S * R, max_size=B * S * R),
)
def test_any_partition_by_masks_gives_the_plain_softmax(seed, where):
    """Every query finds every key in source 0, 1 or 2, or (3) nowhere, as virtual shards do it."""
    query, key, value = draw(seed)
    where = np.reshape(where, (B, S, R))
    sources = [Source(key, value, jnp.asarray(where == i)) for i in range(3)]
    expected = softmax_attention(query, key, value, where < 3)
    np.testing.assert_allclose(attention(query, sources), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1), (6, 3)])
def test_grouped_query_heads(heads, kv_heads):
    query, key, value = draw(heads=heads, kv_heads=kv_heads)
    everything = jnp.ones((1, R), bool)  # broadcasts over batch and queries
    merged = attention(query, split(key, value, everything, [2]))
    expected = softmax_attention(query, key, value, np.ones((B, S, R), bool))
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, R), (S, R), (1, S, R), (B, 1, R), (B, S, R)], ids=str)
def test_a_mask_holds_for_all_that_it_does_not_tell_apart(shape):
    query, key, value = draw()
    mask = np.random.default_rng(1).random(shape) < 0.6
    expected = softmax_attention(query, key, value, np.broadcast_to(mask, (B, S, R)))
    attended = attention(query, split(key, value, jnp.asarray(mask), [2]))
    np.testing.assert_allclose(attended, expected, rtol=1e-5, atol=1e-6)


def test_large_scores_are_stable():
    """Scores of about 1e6, whose exponentials overflow by far."""
    query, key, value = draw(scale=1e3)
    seen = jnp.ones((1, R), bool)
    merged = attention(query, split(key, value, seen, [1, 4]))
    expected = softmax_attention(query, key, value, np.ones((B, S, R), bool))
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-3)


def test_a_masked_source_contributes_nothing_not_even_nan_gradients():
    query, key, value = draw()
    seen, unseen = jnp.ones((1, R), bool), jnp.zeros((1, R), bool)

    def loss(query, key, value, lost_key, lost_value):
        sources = [Source(lost_key, lost_value, unseen), Source(key, value, seen)]
        return jnp.sum(attention(query, sources) ** 2)

    def loss_without(query, key, value):
        return jnp.sum(attention(query, [Source(key, value, seen)]) ** 2)

    *kept, lost_key, lost_value = jax.grad(loss, argnums=(0, 1, 2, 3, 4))(query, key, value, 1e3 * key, 1e3 * value)
    for with_lost, without in zip(kept, jax.grad(loss_without, argnums=(0, 1, 2))(query, key, value), strict=True):
        np.testing.assert_allclose(with_lost, without, rtol=1e-6, atol=1e-6)
    assert not np.any(lost_key)
    assert not np.any(lost_value)


def test_a_query_that_sees_nothing_gets_zero():
    query, key, value = draw()
    unseen = Source(key, value, jnp.zeros((1, R), bool))

    def attended(query):
        return attention(query, [unseen, unseen])

    assert not np.any(attended(query))
    assert not np.any(jax.grad(lambda q: attended(q).sum())(query))


def test_low_precision_inputs_are_accumulated_in_float32():
    query, key, value = (a.astype(jnp.bfloat16) for a in draw())
    partial = attend(query, Source(key, value, jnp.ones((1, R), bool)))
    assert {a.dtype for a in partial} == {jnp.dtype("float32")}
    expected = softmax_attention(query, key, value, np.ones((B, S, R), bool))
    np.testing.assert_allclose(merge([partial]), expected, atol=2e-2)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 3)])
@pytest.mark.parametrize("shape", [(S, R), (B, S, R)], ids=str)
def test_many_scores_are_computed_head_by_head(monkeypatch, heads, kv_heads, shape):
    """To the same numbers and gradients, also with what is added to scores by places."""
    rng = np.random.default_rng(1)
    inputs = [*draw(heads=heads, kv_heads=kv_heads), jnp.asarray(rng.normal(size=(5, heads)), jnp.float32)]
    mask, bucket = jnp.asarray(rng.random(shape) < 0.6), jnp.asarray(rng.integers(0, 5, shape))

    def loss(query, key, value, table):
        return (merge([attend(query, Source(key, value, mask, bias=Bias(table, bucket)))]) ** 2).sum()

    results = []
    for most in (S * R * B * heads, 0):
        monkeypatch.setattr("astra_jax.models.attention.SCORES", most)
        # A new function every time, or jax.jit would remember the program.
        results.append(jax.jit(jax.value_and_grad(lambda *args: loss(*args), argnums=(0, 1, 2, 3)))(*inputs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *results)


def test_a_backward_pass_keeps_no_scores(monkeypatch):
    """But for those of the head that it is at: the program has no room for all."""
    heads, length, width = 16, 256, 4
    monkeypatch.setattr("astra_jax.models.attention.SCORES", 0)
    inputs = [jax.ShapeDtypeStruct((1, length, heads, width), jnp.float32)] * 3

    def loss(query, key, value):
        return (merge([attend(query, Source(key, value, None))]) ** 2).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*inputs).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * heads * length**2
