"""Virtual shards, the reference of every sharded path, against the equations and against one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from astra_jax.attention import MixedPrecisionAttention
from astra_jax.config import AstraConfig
from astra_jax.errors import AstraError
from astra_jax.sharding import Shards
from astra_jax.strategies import Astra, Noise, OneOfN, Single, Virtual, need_codec

B, D, H, J, E = 2, 8, 4, 2, 3
LENGTHS = (3, 1, 2)


@nnx.jit(static_argnums=(2, 3))
def run(model, inputs, strategy, shards):
    return model(shards.scatter(model.to_tokens(inputs)), strategy)


def linear(layer, x):
    return x @ np.asarray(layer.kernel, np.float64) + np.asarray(layer.bias, np.float64)


def quantize(C, y):
    """The nearest codewords of one vector, group by group."""
    groups = np.split(y, C.shape[0])
    return np.concatenate([c[((c - g) ** 2).sum(1).argmin()] for c, g in zip(C, groups, strict=True)])


def slow_attention(module, shards, class_token, received):
    """DESIGN section 3, query by query and key by key, in float64.

    Args:
      shards: one list per device of vectors [D], its class token first.
      received: which codes arrived, one list per device.

    Returns: one list per device of outputs [D].
    """
    C = np.asarray(module.codec.codebook, np.float64)

    def seen_by(n, m, i, y):
        """K and V of token i of shard m as a query of shard n gets them; None where it is not seen."""
        k, v = linear(module.k, y), linear(module.v, y)
        if m == n:
            return k, v
        at_home = i == 0 and class_token == "distributed"
        if at_home or not received[m][i]:
            return None
        if module.site == "kv":
            return np.split(quantize(C, np.concatenate([k, v])), 2)
        y_hat = quantize(C, y)
        return linear(module.k, y_hat), linear(module.v, y_hat)

    def one_query(n, y):
        pairs = [seen_by(n, m, i, key) for m, tokens in enumerate(shards) for i, key in enumerate(tokens)]
        keys, values = (np.stack(part).reshape(-1, J, E) for part in zip(*filter(None, pairs), strict=True))
        heads = []
        for h, q in enumerate(linear(module.q, y).reshape(H, E)):
            j = h // (H // J)
            weights = np.exp(keys[:, j] @ q / np.sqrt(E))
            heads.append(weights @ values[:, j] / weights.sum())
        return linear(module.o, np.concatenate(heads))

    return [[one_query(n, y) for y in tokens] for n, tokens in enumerate(shards)]


@pytest.mark.parametrize("losses", [False, True])
@pytest.mark.parametrize("class_token", ["distributed", "single"])
@pytest.mark.parametrize("site", ["hidden", "kv"])
def test_virtual_attention_computes_the_equations(site, class_token, losses):
    astra = AstraConfig(groups=2, codewords=4, site=site, class_token=class_token)
    module = MixedPrecisionAttention(D, H, J, E, qkv_bias=True, astra=astra, dtype=jnp.float32, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for bias in (module.q.bias, module.k.bias, module.v.bias, module.codec.codebook):
        bias[...] = jnp.asarray(rng.normal(size=bias.shape), jnp.float32)
    split = Shards(LENGTHS, class_token)
    slots = rng.normal(size=(B, len(LENGTHS), 1 + max(LENGTHS), D)).astype(np.float32)
    received = rng.random(slots.shape[:3]) < 0.5 if losses else np.ones(slots.shape[:3], bool)

    strategy = Virtual(split, received=jnp.asarray(received.reshape(B, -1)) if losses else None)
    out, carry, report = module(jnp.asarray(slots.reshape(B, -1, D)), strategy, (), 0)
    assert (carry, report) == ((), None)
    out = out.reshape(slots.shape)
    for b in range(B):
        # Slots of real tokens: the class token where it is in use, then as many as the shard is long.
        real = [
            [0] * (class_token == "distributed" or n == 0) + [1 + i for i in range(length)]
            for n, length in enumerate(LENGTHS)
        ]
        tokens = [list(slots[b, n, places].astype(np.float64)) for n, places in enumerate(real)]
        arrived = [list(received[b, n, places]) for n, places in enumerate(real)]
        for n, expected in enumerate(slow_attention(module, tokens, class_token, arrived)):
            np.testing.assert_allclose(out[b, n, real[n]], expected, atol=2e-6)


@pytest.mark.parametrize("class_token", ["distributed", "single"])
def test_one_virtual_shard_is_a_single_device(tiny_vit, rank_coded, class_token):
    model, images = tiny_vit(AstraConfig(groups=4, codewords=16, class_token=class_token)), rank_coded(2)
    one = model.shards(1)
    alone, _ = run(model, images, Single(one), one)
    np.testing.assert_allclose(run(model, images, Virtual(one), one)[0], alone, atol=1e-6)


@pytest.mark.parametrize(("site", "groups"), [("hidden", 1), ("hidden", 4), ("kv", 2)])
def test_with_a_perfect_codebook_virtual_shards_change_nothing(tiny_vit, rank_coded, site, groups):
    """Codewords are the very vectors that are quantized, found by capturing them on one device."""
    model = tiny_vit(AstraConfig(groups=groups, codewords=32, site=site, class_token="single"))
    images = rank_coded(1)
    alone, vectors = run(model, images, Single(model.shards(1), capture=True), model.shards(1))
    L, _, T, width = vectors.shape  # 1 + 25 vectors for 32 codewords: the last ones repeat
    codewords = jnp.pad(vectors[:, 0], [(0, 0), (0, 32 - T), (0, 0)], mode="edge")
    model.codec.codebook[...] = codewords.reshape(L, 32, groups, width // groups).swapaxes(1, 2)
    shards = model.shards(4)
    np.testing.assert_allclose(run(model, images, Virtual(shards), shards)[0], alone, atol=2e-5)
    model.codec.codebook[...] += 0.1
    assert np.abs(run(model, images, Virtual(shards), shards)[0] - alone).max() > 1e-3


def test_training_reports_what_every_block_saw(tiny_vit, rank_coded):
    model = tiny_vit(AstraConfig(groups=4, codewords=16))
    shards = model.shards(4)

    @nnx.jit
    def run_noisy(model, key):
        return model(shards.scatter(model.to_tokens(rank_coded(2))), Virtual(shards, noise=Noise(key, 1.0)))

    first, second = (run_noisy(model, jax.random.key(seed)) for seed in range(2))
    assert not np.array_equal(first[0], second[0])
    assert first[1].count.shape == (2, 4, 16)
    np.testing.assert_array_equal(first[1].count.sum(-1), 2 * 25)  # neither class tokens nor padding
    model.codec.residual_mean[...] *= 0
    model.codec.residual_var[...] *= 0
    quiet = run(model, rank_coded(2), Virtual(shards), shards)[0]
    np.testing.assert_allclose(run_noisy(model, jax.random.key(0))[0], quiet, atol=1e-5)


@pytest.mark.parametrize(("class_token", "slots"), [("distributed", 7), ("single", 8)])
def test_wire_bits(tiny_vit, class_token, slots):
    """25 tokens on 4 devices are 7 slots, and one more where the class token is sent."""
    model = tiny_vit(AstraConfig(groups=4, codewords=8, class_token=class_token))
    shards = model.shards(4)
    expected = -(-slots * 4 * 3 // 8) * 8
    assert Virtual(shards).wire_bits(model.codec) == Astra(shards).wire_bits(model.codec) == expected
    assert Single(model.shards(1)).wire_bits(model.codec) == 0


def test_one_of_n_runs_without_the_others(tiny_vit, rank_coded):
    model = tiny_vit(AstraConfig(groups=4, codewords=8))
    shards = model.shards(4)
    patches = model.to_tokens(rank_coded(2))[:, : shards.S]
    logits, _ = nnx.jit(lambda model, patches: model(patches, OneOfN(shards)))(model, patches)
    assert logits.shape == (2, 5)
    assert np.isfinite(logits).all()


def test_without_codebooks_there_is_one_device(tiny_vit, rank_coded):
    model = tiny_vit()
    shards = model.shards(2)
    with pytest.raises(
        AstraError, match="has no codebooks, so it runs on one device only: run `astra calibrate` first"
    ):
        model(shards.scatter(model.to_tokens(rank_coded(1))), Virtual(shards))
    with pytest.raises(AstraError, match="no codebooks"):
        need_codec(None)
