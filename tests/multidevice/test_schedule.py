"""Schedules, which say of every block what devices know of each other's tokens: what is computed, and what is sent."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from astra_jax.codecs.config import NestedPQConfig, VQConfig
from astra_jax.mesh.sharding import make_mesh
from astra_jax.models.blocks import block_at
from astra_jax.models.mask import Block
from astra_jax.serving.compile import parallelize
from astra_jax.serving.generate import Generator
from astra_jax.serving.sampling import Sampling
from astra_jax.strategies.coded import Astra
from eval.cost.traffic import messages
from tests.helpers.sharded import CLASS, KV, check, decode, real, recompute, run_virtual, three_blocks, tokens
from train.navq import NoiseAugmented

MLP = VQConfig(groups=4, codewords=16, predictor="mlp", hidden_units=5)
NESTED = NestedPQConfig.of(MLP, widths=(6, 6, 3, 3), levels=(1, 1, 2))


def of(astra, *schedule):
    return dataclasses.replace(astra, schedule=schedule)


CODED, PREDICTED, KNOWN = "coded", "predicted", "known"
FIRST, TWO = (CODED, PREDICTED, PREDICTED), (CODED, CODED, PREDICTED)  # that are coded
IDS, IDS_AND_ONE = (KNOWN, PREDICTED, PREDICTED), (KNOWN, CODED, PREDICTED)


@pytest.mark.parametrize(
    ("family", "astra", "N"),
    [
        ("tiny_vit", of(NESTED, *TWO), 4),
        ("tiny_gpt2", of(MLP, *IDS), 3),
        pytest.param("tiny_gpt2", of(MLP, *FIRST), 4, marks=pytest.mark.slow),
        pytest.param("tiny_llama", of(dataclasses.replace(MLP, **KV), *IDS_AND_ONE), 2, marks=pytest.mark.slow),
        pytest.param(CLASS, of(MLP, *IDS_AND_ONE), 3, marks=pytest.mark.slow),
        pytest.param("tiny_bert", of(MLP, CODED, CODED, CODED), 4, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_it_is_the_same_model_as_on_virtual_shards(request, rank_coded, random_text, family, astra, N):
    """Texts of different lengths, some shards empty."""
    inputs = rank_coded(2) if family == "tiny_vit" else random_text(23, 1, 2, 7, 24)
    check(three_blocks(request, family, astra), inputs, N)


def test_weights_in_an_array_for_each_block_do_not_matter(request, monkeypatch, random_text):
    model, text = three_blocks(request, "tiny_gpt2", of(MLP, *IDS_AND_ONE)), random_text(24)
    stacked = parallelize(model, make_mesh(3))(text)
    monkeypatch.setattr("astra_jax.models.blocks.LEAST_UNSTACKED", 0)
    np.testing.assert_allclose(parallelize(model, make_mesh(3))(text), stacked, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "astra"),
    [
        ("tiny_gpt2", of(MLP, *IDS_AND_ONE)),
        pytest.param("tiny_vit", of(MLP, *TWO), marks=pytest.mark.slow),
        pytest.param("tiny_gpt2", of(NESTED, *FIRST), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_it_is_as_if_all_codes_of_the_others_were_lost(request, rank_coded, random_text, family, astra):
    """Which is computed in another way: every receiver then has estimates of its own."""
    inputs = rank_coded(2) if family == "tiny_vit" else random_text(23, 24)
    all_coded = of(astra, *(kind if kind == KNOWN else CODED for kind in astra.schedule))
    model, lossy = (three_blocks(request, family, a) for a in (astra, all_coded))
    arrived = np.asarray([kind != PREDICTED for kind in astra.schedule])
    expected, all_codes = (run_virtual(lossy, inputs, 4, these) for these in (arrived, np.ones(3, bool)))
    found = run_virtual(model, inputs, 4)
    np.testing.assert_allclose(real(model, inputs, found), real(model, inputs, expected), rtol=1e-5, atol=1e-5)
    assert np.abs(real(model, inputs, found) - real(model, inputs, all_codes)).max() > 1e-4


def test_a_predicted_block_goes_by_what_is_predicted(request, random_text):
    rng = np.random.default_rng(0)
    y, before = (rng.normal(size=shape).astype(np.float32) for shape in ((1, 24, 16), (4, 1, 6, 16)))

    @nnx.jit
    def exchange(model, y, before):
        codec, strategy = block_at(model.blocks, 1).attention.codec, Astra.virtual(model.shards(4, random_text(24)))
        remote, estimate, _ = strategy.exchange(codec, y, before, Block(1, PREDICTED))
        return remote.content.y, estimate, codec.expect(before, strategy.around)

    seen, estimate, expected = map(np.asarray, exchange(three_blocks(request, "tiny_gpt2", MLP), y, before))
    np.testing.assert_array_equal(estimate, expected)
    np.testing.assert_array_equal(seen, estimate.swapaxes(0, 1).reshape(1, 24, 16))


def test_training_computes_the_same(request, random_text):
    """With noise of strength 0, and no gradient reaches a token by way of a predicted block's codes."""
    model, text = three_blocks(request, "tiny_gpt2", of(MLP, *FIRST)), random_text(24)

    @nnx.jit
    def run(model, y):
        shards = model.shards(4, text)
        strategy = NoiseAugmented.virtual(shards, key=jax.random.key(0), strength=0.0)
        noisy, reports = model(shards.scatter(model.to_tokens(text)), strategy)
        codec = block_at(model.blocks, 1).attention.codec

        def of_codes(y, kind):
            return jnp.sum(strategy.exchange(codec, y, jnp.zeros((4, 1, 6, 16)), Block(1, kind)).remote.content.y)

        gradients = [jax.grad(of_codes)(y, kind) for kind in (PREDICTED, CODED)]
        return shards.gather(noisy, 24), reports.observed.error, gradients

    noisy, error, (of_predicted, of_coded) = run(model, np.ones((1, 24, 16), np.float32))
    np.testing.assert_allclose(noisy, run_virtual(model, text, 4), rtol=1e-5, atol=1e-5)
    assert error.shape == (3,)
    assert not np.any(of_predicted) and np.all(np.asarray(of_coded) == 1)


@pytest.mark.parametrize(
    ("family", "astra", "codes", "ids"),
    [
        ("tiny_gpt2", of(MLP, *IDS_AND_ONE), [(96, 1)], [(96, 1)]),
        ("tiny_gpt2", of(MLP, *IDS), [], [(96, 1)]),
    ],
    ids=str,
)
def test_what_is_sent(request, random_text, family, astra, codes, ids):
    """6 tokens of 4 codes of 4 bits, and ids of 16 bits; `messages` itself compares with the compiled program."""
    model = three_blocks(request, family, astra)
    sent = messages(model, 4, random_text(24), Astra.of)
    assert [(m.bits, m.times) for m in sent if m.in_blocks] == codes
    assert [(m.bits, m.times) for m in sent if not m.in_blocks] == ids


@pytest.mark.parametrize("astra", [of(MLP, *FIRST), pytest.param(of(MLP, *IDS), marks=pytest.mark.slow)], ids=str)
def test_text_goes_on_from_estimates(tiny_gpt2, random_text, astra):
    """Tokens of a seed by whose rounding errors no logit changes by more: a random model has some that are 100 times as
    sensitive as the rest."""
    model, text = tiny_gpt2(astra, n_layer=3), random_text(23, 1, 2, 7)
    generator = Generator(model, make_mesh(4))
    new = tokens(generator, text, Sampling(temperature=3.0, seed=2))
    np.testing.assert_allclose(decode(generator, text, new), recompute(model, text, new, 4), rtol=1e-5, atol=1e-5)
