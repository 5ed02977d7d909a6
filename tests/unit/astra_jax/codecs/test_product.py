"""The grouped quantizer against numpy: nearest codewords, statistics, EMA, usage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from astra_jax.codecs import product
from astra_jax.codecs.base import Observation, usage
from astra_jax.codecs.config import VQConfig
from astra_jax.codecs.product import VectorQuantizer

B, S, D = 2, 5, 8
KEY = jax.random.key(0)

nearest, dense_nearest = jax.jit(product.nearest), jax.jit(product._dense_nearest)
encode, decode = nnx.jit(VectorQuantizer.encode), nnx.jit(VectorQuantizer.decode)
observe, follow = nnx.jit(VectorQuantizer.observe), nnx.jit(VectorQuantizer.follow, static_argnums=(2, 3))
straight_through = nnx.jit(VectorQuantizer.straight_through, static_argnums=4)
noise = nnx.jit(VectorQuantizer.noise, static_argnums=2)


def make(G=4, K=16, width=D, seed=0):
    """A quantizer with random codewords and residual statistics."""
    vq = VectorQuantizer(VQConfig(groups=G, codewords=K), width)
    rng = np.random.default_rng(seed)
    vq.codebook[...] = jnp.asarray(rng.normal(size=vq.codebook.shape), jnp.float32)
    vq.residual_mean[...] = jnp.asarray(rng.normal(size=width), jnp.float32)
    vq.residual_var[...] = jnp.asarray(rng.random(width), jnp.float32)
    return vq


def vectors(seed=1):
    return np.random.default_rng(seed).normal(size=(B, S, D)).astype(np.float32)


def brute_force(y, C):
    """argmin_k ||y_g - C[g,k]|| in float64; numpy's argmin is the lowest index of equals."""
    G, _, d = C.shape
    y = np.asarray(y, np.float64).reshape(-1, G, 1, d)
    return np.argmin(((y - np.asarray(C, np.float64)) ** 2).sum(-1), axis=-1)


@pytest.mark.parametrize("G", [1, 2, 4, 8])
def test_encode_takes_the_nearest_codeword(G):
    vq, y = make(G), vectors()
    z = encode(vq, y)
    assert z.dtype == jnp.uint16
    np.testing.assert_array_equal(z.reshape(-1, G), brute_force(y, vq.codebook[...]))


@given(st.lists(st.integers(-2, 2), min_size=12, max_size=12), st.integers(0, 99))
def test_the_lowest_index_of_equals(values, seed):
    """Small whole numbers are exact in float32 and full of ties."""
    y = jnp.asarray(values, jnp.float32).reshape(3, 2, 2)
    C = jnp.asarray(np.random.default_rng(seed).integers(-2, 3, (2, 16, 2)), jnp.float32)
    np.testing.assert_array_equal(nearest(y, C), brute_force(y, C))


@pytest.mark.parametrize(
    ("M", "G", "K", "d"),
    [
        (7, 3, 8, 4),  # one small tile
        (1, 1, 2, 1),
        (2**13, 2, 512, 2),  # 4 tiles of 128 codewords
        (2**14 + 1, 1, 128, 3),  # tiles are never smaller than 64 codewords
    ],
)
@pytest.mark.parametrize("whole_numbers", [True, False])
def test_tiles_do_not_change_the_nearest_codeword(M, G, K, d, whole_numbers):
    rng = np.random.default_rng(M)
    y, C = (rng.integers(-3, 4, s) if whole_numbers else rng.normal(size=s) for s in ((M, G, d), (G, K, d)))
    y, C = jnp.asarray(y, jnp.float32), jnp.asarray(C, jnp.float32)
    np.testing.assert_array_equal(nearest(y, C), dense_nearest(y, C))


@pytest.mark.parametrize("G", [1, 4])
def test_codewords_are_their_own_codes(G):
    """decode(encode(c)) = c for vectors made of codewords."""
    vq = make(G)
    z = jnp.asarray(np.random.default_rng(3).integers(0, 16, (B, S, G)), jnp.uint16)
    y = decode(vq, z)
    for b, s, g in np.ndindex(B, S, G):
        np.testing.assert_array_equal(np.reshape(y, (B, S, G, -1))[b, s, g], np.asarray(vq.codebook)[g, z[b, s, g]])
    np.testing.assert_array_equal(encode(vq, y), z)


def test_straight_through():
    """The value is y^ + lambda xi, the gradient that of y."""
    vq, y = make(), vectors()
    z, weight = encode(vq, y), vectors(2)
    expected = decode(vq, z) + 0.5 * noise(vq, KEY, y.shape)

    @nnx.jit
    def run(vq, y):
        pull = jax.vjp(lambda y: vq.straight_through(y, z, KEY, 0.5), y)
        return pull[0], pull[1](jnp.asarray(weight))[0]

    found, gradient = run(vq, y)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(gradient, weight)


def test_noise_has_the_moments_of_the_residual():
    vq = make()
    xi = np.asarray(noise(vq, KEY, (20_000, D)))
    std = np.sqrt(vq.residual_var[...])
    np.testing.assert_array_less(np.abs(xi.mean(0) - vq.residual_mean[...]), 4 * std / np.sqrt(20_000))
    np.testing.assert_allclose(xi.std(0), std, rtol=0.03)
    assert not np.array_equal(xi[0], xi[1])


@pytest.mark.parametrize("mask", [[1, 1, 1, 1, 1], [0, 1, 1, 0, 1]])
def test_observe(mask):
    vq, y = make(G=2, K=4), vectors()
    mask = np.asarray(mask, bool)
    z = encode(vq, y)
    seen = observe(vq, y, z, KEY, jnp.asarray(mask))
    kept, codes = np.asarray(y)[:, mask].reshape(-1, 2, 4), np.asarray(z)[:, mask].reshape(-1, 2)
    for g, k in np.ndindex(2, 4):
        chose = codes[:, g] == k
        assert seen.count[g, k] == chose.sum()
        np.testing.assert_allclose(seen.total[g, k], kept[chose, g].sum(0), atol=1e-5)
    residual = (np.asarray(y) - np.asarray(decode(vq, z)))[:, mask].reshape(-1, D)
    np.testing.assert_allclose(seen.residual_mean, residual.mean(0), atol=1e-6)
    np.testing.assert_allclose(seen.residual_var, residual.var(0), rtol=1e-5)
    np.testing.assert_allclose(seen.commitment, (residual**2).sum(1).mean(), rtol=1e-5)
    np.testing.assert_allclose(seen.error, (residual**2).sum() / (kept**2).sum(), rtol=1e-5)
    for g, k in np.ndindex(2, 4):
        assert (kept[:, g] == np.asarray(seen.candidates)[g, k]).all(-1).any()


def test_the_commitment_pulls_vectors_to_their_codewords():
    vq, y = make(), vectors()
    mask = np.asarray([True, False, True, True, False])
    z = encode(vq, y)
    gradient = nnx.jit(lambda vq, y: jax.grad(lambda y: vq.observe(y, z, KEY, jnp.asarray(mask)).commitment)(y))(vq, y)
    expected = 2 * (y - np.asarray(decode(vq, z))) * mask[:, None] / (B * 3)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_statistics_are_float32_whatever_the_input():
    vq, y = make(), jnp.asarray(vectors(), jnp.bfloat16)
    z = encode(vq, y)
    np.testing.assert_array_equal(z.reshape(-1, 4), brute_force(y.astype(jnp.float32), vq.codebook[...]))
    assert straight_through(vq, y, z, KEY, 1.0).dtype == jnp.bfloat16
    seen = observe(vq, y, z, KEY, jnp.ones(S, bool))
    follow(vq, seen, 0.9, 0.0)
    assert {a.dtype for a in (*seen, *jax.tree.leaves(nnx.state(vq)))} == {jnp.dtype("float32")}


def observation(rng, *L, G=2, K=4, d=3):
    draw = {
        "count": rng.integers(1, 9, (*L, G, K)),
        "total": rng.normal(size=(*L, G, K, d)),
        "residual_mean": rng.normal(size=(*L, G * d)),
        "residual_var": rng.random((*L, G * d)),
        "candidates": rng.normal(size=(*L, G, K, d)),
        "commitment": rng.random(L),
        "error": rng.random(L),
        "surprise": rng.random(L),
    }
    return Observation(**{name: jnp.asarray(value, jnp.float32) for name, value in draw.items()})


def test_follow_is_an_average_of_shares_per_token():
    vq, rng, decay = make(G=2, K=4, width=6), np.random.default_rng(0), 0.8
    count, total = np.zeros((2, 4)), np.zeros((2, 4, 3))
    mean, var = np.asarray(vq.residual_mean[...]), np.asarray(vq.residual_var[...])
    for _ in range(3):
        seen = observation(rng)
        follow(vq, seen, decay, 0.0)
        tokens = np.asarray(seen.count).sum(-1, keepdims=True)
        count = decay * count + (1 - decay) * np.asarray(seen.count) / tokens
        total = decay * total + (1 - decay) * np.asarray(seen.total) / tokens[..., None]
        mean = decay * mean + (1 - decay) * np.asarray(seen.residual_mean)
        var = decay * var + (1 - decay) * np.asarray(seen.residual_var)
    np.testing.assert_allclose(vq.codebook[...], total / count[..., None], rtol=1e-5)
    np.testing.assert_allclose(vq.residual_mean[...], mean, rtol=1e-5)
    np.testing.assert_allclose(vq.residual_var[...], var, rtol=1e-5)


def test_a_dead_codeword_is_revived_with_a_vector_of_the_batch():
    vq, seen = make(G=1, K=4, width=3), observation(np.random.default_rng(0), G=1)
    seen = seen._replace(count=jnp.asarray([[40.0, 0.0, 40.0, 1.0]]))
    follow(vq, seen, 0.0, 0.1)
    np.testing.assert_allclose(vq.codebook[0, [1, 3]], seen.candidates[0, [1, 3]], rtol=1e-6)
    np.testing.assert_allclose(vq.codebook[0, [0, 2]], seen.total[0, [0, 2]] / 40, rtol=1e-6)
    mean = seen.count.mean() / seen.count.sum()
    np.testing.assert_allclose(vq.count[0, [1, 3]], mean)  # it has a share, so it is not dead at once again


def test_stacked_blocks_follow_like_single_ones():
    seen = observation(np.random.default_rng(0), 3)
    alone = [make(G=2, K=4, width=6, seed=seed) for seed in range(3)]
    stacked = make(G=2, K=4, width=6)
    nnx.update(stacked, jax.tree.map(lambda *a: jnp.asarray(np.stack(a)), *(nnx.state(vq) for vq in alone)))
    assert stacked.groups == 2
    follow(stacked, seen, 0.5, 0.9)
    for number, vq in enumerate(alone):
        follow(vq, jax.tree.map(lambda a, number=number: np.asarray(a)[number], seen), 0.5, 0.9)
        for together, single in zip(jax.tree.leaves(nnx.state(stacked)), jax.tree.leaves(nnx.state(vq)), strict=True):
            np.testing.assert_allclose(together[number], single, rtol=1e-6)


def test_usage():
    everything, one = jnp.full(16, 3.0), jnp.zeros(16).at[5].set(48.0)
    used, perplexity, bits = usage(jnp.stack([everything, one]))
    np.testing.assert_allclose(used, [1, 1 / 16])
    np.testing.assert_allclose(perplexity, [16, 1], rtol=1e-6)
    np.testing.assert_allclose(bits, [4, 0], atol=1e-6)


@pytest.mark.parametrize(("G", "K", "tokens", "bits"), [(32, 1024, 49, 15_680), (1, 1024, 49, 496), (4, 2, 7, 32)])
def test_wire_bits(G, K, tokens, bits):
    """S * G * log2(K), up to the next whole byte."""
    assert make(G, K, width=32).wire_bits(tokens) == bits
