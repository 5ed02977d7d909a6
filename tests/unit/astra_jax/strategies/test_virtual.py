"""Virtual shards, the reference of every sharded path, against the equations and against one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from astra_jax.codecs.config import VQConfig
from astra_jax.errors import AstraError
from astra_jax.inputs.token_batches import Text
from astra_jax.mesh.sharding import Shards
from astra_jax.models.attention import MixedPrecisionAttention
from astra_jax.models.blocks import block_at
from astra_jax.models.interface import Report
from astra_jax.models.mask import Block
from astra_jax.models.rotary import Rotary
from astra_jax.strategies.base import Single
from astra_jax.strategies.coded import Astra, need_codec
from train.navq import NoiseAugmented

B, D, H, J, E = 2, 8, 4, 2, 4
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


def turn(x, position, theta):
    """RoPE of heads [heads,E]: dimensions e and e + E/2 are one complex number, which turns with the position."""
    real, imaginary = np.split(x, 2, axis=-1)
    turned = (real + 1j * imaginary) * np.exp(1j * position * theta ** (-2 * np.arange(E / 2) / E))
    return np.concatenate([turned.real, turned.imag], axis=-1)


def slow_attention(module, shards, class_token, received, causal):
    """The equations of the paper's section 3, query by query and key by key, in float64.

    Args:
      shards: one list per device of vectors [D], its class token first.
      received: which codes arrived, for every receiving device one list per sending device.
      causal: whether a query sees only tokens before it and itself.

    Returns: one list per device of outputs [D].
    """
    C = np.asarray(module.codec.codebook, np.float64)
    before = np.cumsum([0, *map(len, shards)])

    def turned(x, n, i):
        """Heads [.,E] of token i of shard n at its place (there is no class token where they turn)."""
        x = x.reshape(-1, E)
        return turn(x, before[n] + i, module.rotary.rope_theta) if module.rotary else x

    def seen_by(n, j, m, i, y):
        """K and V of token i of shard m as query j of shard n gets them; None where it is not seen."""
        k, v = linear(module.k, y), linear(module.v, y)
        if causal and (m, i) > (n, j):
            return None
        if m != n:
            at_home = i == 0 and class_token == "distributed"
            if at_home or not received[n][m][i]:
                return None
            y_hat = quantize(C, np.concatenate([k, v]) if module.site == "kv" else y)
            k, v = np.split(y_hat, 2) if module.site == "kv" else (linear(module.k, y_hat), linear(module.v, y_hat))
        return turned(k, m, i), v.reshape(-1, E)

    def one_query(n, j, y):
        pairs = [seen_by(n, j, m, i, key) for m, tokens in enumerate(shards) for i, key in enumerate(tokens)]
        keys, values = (np.stack(part) for part in zip(*filter(None, pairs), strict=True))
        outputs = []
        for h, q in enumerate(turned(linear(module.q, y), n, j)):
            weights = np.exp(keys[:, h // (H // J)] @ q / np.sqrt(E))
            outputs.append(weights @ values[:, h // (H // J)] / weights.sum())
        return linear(module.o, np.concatenate(outputs))

    return [[one_query(n, j, y) for j, y in enumerate(tokens)] for n, tokens in enumerate(shards)]


def check_equations(random_module, split, site, losses, rotary=None):
    """Virtual shards of random inputs against `slow_attention`, in all slots that hold a token."""
    astra, class_token = VQConfig(groups=2, codewords=4, site=site), split.class_token
    options = dict(qkv_bias=True, rotary=rotary, astra=astra, dtype=jnp.float32)
    module = random_module(MixedPrecisionAttention, D, H, J, E, **options)
    rng = np.random.default_rng(0)
    slots = rng.normal(size=(B, split.N, split.class_slots + split.S, D)).astype(np.float32)
    shape = (2, B, split.N, *slots.shape[1:3])  # [block, sequence, receiver, sender, slot]
    received = rng.random(shape) < 0.5 if losses else np.ones(shape, bool)

    strategy = Astra.virtual(split, arrived=jnp.asarray(received.reshape(2, B, split.N, -1)) if losses else None)
    attention = nnx.jit(lambda module, y: module(y, strategy, (), Block(1)))
    out, estimate, report = attention(module, jnp.asarray(slots.reshape(B, -1, D)))
    assert (estimate, report) == ((), Report())
    out = out.reshape(slots.shape)
    lengths = np.broadcast_to(split.lengths, (B, split.N))
    for b in range(B):
        # Slots of real tokens: the class token where it is in use, then as many as the shard is long.
        heads = [class_token == "distributed" or (class_token == "single" and n == 0) for n in range(split.N)]
        real = [[0] * heads[n] + [split.class_slots + i for i in range(length)] for n, length in enumerate(lengths[b])]
        tokens = [list(slots[b, n, places].astype(np.float64)) for n, places in enumerate(real)]
        arrived = [[list(received[1, b, n, m, places]) for m, places in enumerate(real)] for n in range(split.N)]
        for n, expected in enumerate(slow_attention(module, tokens, class_token, arrived, split.causal)):
            if expected:
                np.testing.assert_allclose(out[b, n, real[n]], expected, atol=2e-6)


@pytest.mark.parametrize("losses", [False, True])
@pytest.mark.parametrize("class_token", ["distributed", "single"])
@pytest.mark.parametrize("site", ["hidden", "kv"])
def test_virtual_attention_computes_the_equations(random_module, site, class_token, losses):
    check_equations(random_module, Shards(LENGTHS, class_token), site, losses)


@pytest.mark.parametrize("losses", [False, True])
@pytest.mark.parametrize("site", ["hidden", "kv"])
def test_causal_attention_with_rotary_embeddings_computes_the_equations(random_module, site, losses):
    """Also where every sequence has a split of its own, and the first shards of one are empty."""
    split = Shards(jnp.asarray([[3, 1, 2], [0, 1, 1]]), slots=3, causal=True)
    check_equations(random_module, split, site, losses, Rotary(rope_theta=3.0))


T = 12


@nnx.jit
def run_cut(model, ids, lengths):
    """Logits [B,T,V] where every sequence has a split of its own."""
    shards = Shards(lengths, slots=T, causal=True)
    return shards.gather(model(shards.scatter(ids), Astra.virtual(shards))[0], T)


@pytest.mark.parametrize(("family", "site"), [("tiny_gpt2", "hidden"), ("tiny_llama", "kv")])
@given(cuts=st.lists(st.integers(0, T), min_size=2, max_size=2), t=st.integers(0, T - 1))
def test_a_token_changes_what_follows_and_nothing_before(request, family, site, cuts, t):
    """In its own shard and, through codes, in all later ones, beginning at the border. Shards may be empty."""
    model = request.getfixturevalue(family)(VQConfig(groups=4, codewords=16, site=site))
    lengths = np.diff([0, *sorted(cuts), T])
    ids = np.stack([np.arange(T), np.arange(T)])
    ids[1, t] += 20
    before, after = run_cut(model, jnp.asarray(ids), jnp.asarray([lengths, lengths]))
    changed = np.abs(before - after).max(-1) > 1e-5
    assert changed.tolist() == (np.arange(T) >= t).tolist()


@nnx.jit(static_argnums=2)
def run_text(model, text, N):
    shards, tokens = model.shards(N, text), model.to_tokens(text)
    out = model(shards.scatter(tokens), Astra.virtual(shards))[0]
    return shards.gather(out, tokens.shape[1]) if model.per_token else out


CODES = VQConfig(groups=4, codewords=16)
IDS = VQConfig(groups=4, codewords=16, predictor="linear", schedule=("known",))  # of one block
TWO_BLOCKS = dataclasses.replace(IDS, schedule=("known", "coded"))


@pytest.mark.parametrize(
    ("family", "options", "astra"),
    [
        ("tiny_gpt2", {}, CODES),
        ("tiny_llama", {}, CODES),
        ("tiny_bert", {"pooling": "class"}, CODES),
        ("tiny_bert", {"pooling": "class"}, TWO_BLOCKS),
        ("tiny_bert", {"pooling": "class"}, dataclasses.replace(TWO_BLOCKS, class_token="single")),
    ],
    ids=str,
)
def test_a_text_is_computed_as_if_it_were_alone(request, random_text, family, options, astra):
    """Whatever stands beside it in a batch, and whatever both are padded to."""
    model = request.getfixturevalue(family)(astra, **options)
    text = random_text(23, 1, 2, 7)
    together = run_text(model, text, 4)
    for b, length in enumerate(text.lengths):
        alone = Text(np.pad(text.ids[b : b + 1], [(0, 0), (0, 8)]), text.lengths[b : b + 1])
        row = slice(length) if model.per_token else ...
        np.testing.assert_allclose(run_text(model, alone, 4)[0][row], together[b][row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("site", ["hidden", "kv"])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("tiny_gpt2", {"n_layer": 1}),
        ("tiny_llama", {"num_hidden_layers": 1}),
        ("tiny_bert", {"num_hidden_layers": 1}),
        ("tiny_bert", {"num_hidden_layers": 1, "pooling": "class"}),
    ],
    ids=str,
)
def test_with_token_ids_one_block_loses_nothing(request, random_text, family, options, site):
    """Of a class token that is sent; what replicas of it see is less."""
    model = request.getfixturevalue(family)(dataclasses.replace(IDS, site=site, class_token="single"), **options)
    text = random_text(23, 1, 2, 7)
    alone, sharded = (run_text(model, text, N) for N in (1, 4))
    real = np.arange(24) < text.lengths[:, None] if model.per_token else ...
    np.testing.assert_allclose(sharded[real], alone[real], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("class_token", ["distributed", "single"])
def test_one_virtual_shard_is_a_single_device(tiny_vit, rank_coded, class_token):
    model, images = tiny_vit(VQConfig(groups=4, codewords=16, class_token=class_token)), rank_coded(2)
    one = model.shards(1)
    alone, _ = run(model, images, Single(one), one)
    np.testing.assert_allclose(run(model, images, Astra.virtual(one), one)[0], alone, atol=1e-6)


@pytest.mark.parametrize(("site", "groups"), [("hidden", 1), ("hidden", 4), ("kv", 2)])
def test_with_a_perfect_codebook_virtual_shards_change_nothing(tiny_vit, rank_coded, site, groups):
    """Codewords are the very vectors that are quantized, found by capturing them on one device."""
    model = tiny_vit(VQConfig(groups=groups, codewords=32, site=site, class_token="single"))
    images = rank_coded(1)
    alone, reports = run(model, images, Single(model.shards(1), capture=True), model.shards(1))
    inputs = reports.captured
    each = (block_at(model.blocks, n).attention.codec_input(inputs[n]) for n in range(len(inputs)))
    vectors = jnp.stack([*each])
    L, _, T, width = vectors.shape  # 1 + 25 vectors for 32 codewords: the last ones repeat
    codewords = jnp.pad(vectors[:, 0], [(0, 0), (0, 32 - T), (0, 0)], mode="edge")
    model.codec.codebook[...] = codewords.reshape(L, 32, groups, width // groups).swapaxes(1, 2)
    shards = model.shards(4)
    np.testing.assert_allclose(run(model, images, Astra.virtual(shards), shards)[0], alone, atol=2e-5)
    model.codec.codebook[...] += 0.1
    assert np.abs(run(model, images, Astra.virtual(shards), shards)[0] - alone).max() > 1e-3


def test_training_reports_what_every_block_saw(tiny_vit, rank_coded):
    model = tiny_vit(VQConfig(groups=4, codewords=16))
    shards = model.shards(4)

    @nnx.jit
    def run_noisy(model, key):
        return model(shards.scatter(model.to_tokens(rank_coded(2))), NoiseAugmented.virtual(shards, key=key))

    first, second = (run_noisy(model, jax.random.key(seed)) for seed in range(2))
    assert not np.array_equal(first[0], second[0])
    assert first[1].observed.count.shape == (2, 4, 16)
    np.testing.assert_array_equal(first[1].observed.count.sum(-1), 2 * 25)  # neither class tokens nor padding
    model.codec.residual_mean[...] *= 0
    model.codec.residual_var[...] *= 0
    quiet = run(model, rank_coded(2), Astra.virtual(shards), shards)[0]
    np.testing.assert_allclose(run_noisy(model, jax.random.key(0))[0], quiet, atol=1e-5)


def test_training_on_text_counts_the_tokens_of_every_sequence(tiny_gpt2, random_text):
    text = random_text(23, 1, 7)

    @nnx.jit
    def run_noisy(model, text):
        shards = model.shards(3, text)
        return model(shards.scatter(model.to_tokens(text)), NoiseAugmented.virtual(shards, key=jax.random.key(0)))[1]

    seen = run_noisy(tiny_gpt2(VQConfig(groups=4, codewords=16)), text).observed
    np.testing.assert_array_equal(seen.count.sum(-1), 23 + 1 + 7)
    assert np.isfinite(seen.commitment).all()


@pytest.mark.parametrize(("class_token", "slots"), [("distributed", 7), ("single", 8)])
def test_wire_bits(tiny_vit, class_token, slots):
    """25 tokens on 4 devices are 7 slots, and one more where the class token is sent."""
    model = tiny_vit(VQConfig(groups=4, codewords=8, class_token=class_token))
    shards = model.shards(4)
    expected = -(-slots * 4 * 3 // 8) * 8
    assert Astra(shards).wire_bits(model) == 2 * expected
    assert Single(model.shards(1)).wire_bits(model) == 0


def test_one_of_n_runs_without_the_others(tiny_vit, rank_coded):
    model = tiny_vit(VQConfig(groups=4, codewords=8))
    shards = model.shards(4)
    patches = model.to_tokens(rank_coded(2))[:, : shards.S]
    logits, _ = nnx.jit(lambda model, patches: model(patches, Astra(shards).alone(4)))(model, patches)
    assert logits.shape == (2, 5)
    assert np.isfinite(logits).all()


def test_without_codebooks_there_is_one_device(tiny_vit, rank_coded):
    model = tiny_vit()
    shards = model.shards(2)
    with pytest.raises(
        AstraError, match="has no codebooks, so it runs on one device only: run `astra calibrate` first"
    ):
        model(shards.scatter(model.to_tokens(rank_coded(1))), Astra.virtual(shards))
    with pytest.raises(AstraError, match="no codebooks"):
        need_codec(None)
