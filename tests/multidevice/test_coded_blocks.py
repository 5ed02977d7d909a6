"""Codes of the first blocks alone: what the others go by, what is sent, and the same on a mesh as on virtual shards."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from astra_jax.codecs.config import AstraConfig
from astra_jax.mesh.sharding import make_mesh
from astra_jax.models.blocks import block_at
from astra_jax.serving.compile import parallelize
from astra_jax.serving.generate import Generator
from astra_jax.serving.sampling import Sampling
from astra_jax.strategies.base import Astra, Noise, Virtual
from eval.cost.traffic import messages
from tests.helpers.sharded import CLASS, KV, check, decode, real, recompute, run_virtual, three_blocks, tokens

MLP = AstraConfig(groups=4, codewords=16, predictor="mlp", hidden_units=5)
IDS = dataclasses.replace(MLP, side_info="token-ids")
NESTED = dataclasses.replace(MLP, codec="nested-pq", widths=(6, 6, 3, 3), levels=(1, 1, 2))


def of(astra, coded_blocks):
    return dataclasses.replace(astra, coded_blocks=coded_blocks)


@pytest.mark.parametrize(
    ("family", "astra", "N"),
    [
        ("tiny_vit", of(NESTED, 2), 4),
        ("tiny_gpt2", of(IDS, 1), 3),
        pytest.param("tiny_gpt2", of(MLP, 1), 4, marks=pytest.mark.slow),
        pytest.param("tiny_llama", of(dataclasses.replace(IDS, **KV), 2), 2, marks=pytest.mark.slow),
        pytest.param(CLASS, of(IDS, 2), 3, marks=pytest.mark.slow),
        pytest.param("tiny_bert", of(MLP, 3), 4, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_it_is_the_same_model_as_on_virtual_shards(request, rank_coded, random_text, family, astra, N):
    """Texts of different lengths, some shards empty."""
    inputs = rank_coded(2) if family == "tiny_vit" else random_text(23, 1, 2, 7, 24)
    check(three_blocks(request, family, astra), inputs, N)


@pytest.mark.slow
def test_weights_in_an_array_for_each_block_do_not_matter(request, monkeypatch, random_text):
    model, text = three_blocks(request, "tiny_gpt2", of(MLP, 2)), random_text(24)
    stacked = parallelize(model, make_mesh(3))(text)
    monkeypatch.setattr("astra_jax.models.blocks.LEAST_UNSTACKED", 0)
    np.testing.assert_allclose(parallelize(model, make_mesh(3))(text), stacked, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "astra"),
    [
        ("tiny_gpt2", of(IDS, 2)),
        pytest.param("tiny_vit", of(MLP, 2), marks=pytest.mark.slow),
        pytest.param("tiny_gpt2", of(NESTED, 1), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_it_is_as_if_all_codes_of_the_others_were_lost(request, rank_coded, random_text, family, astra):
    """Which is computed in another way: every receiver then has estimates of its own."""
    inputs = rank_coded(2) if family == "tiny_vit" else random_text(23, 24)
    model, lossy = (three_blocks(request, family, a) for a in (astra, of(astra, None)))
    shards, tokens = model.shards(4, inputs), model.to_tokens(inputs)
    slots = shards.scatter(tokens).shape[1] + 4 * shards.class_slots
    arrived = jnp.asarray(np.arange(3) < astra.coded_blocks)[:, None, None, None]
    arrived = jnp.broadcast_to(arrived, (3, 2, 4, slots))
    expected = lossy(shards.scatter(tokens), Virtual(shards, arrived=arrived))[0]
    expected = shards.gather(expected, tokens.shape[1]) if model.per_token else expected
    found, all_codes = run_virtual(model, inputs, 4), run_virtual(lossy, inputs, 4)
    np.testing.assert_allclose(real(model, inputs, found), real(model, inputs, expected), rtol=1e-5, atol=1e-5)
    assert np.abs(real(model, inputs, found) - real(model, inputs, all_codes)).max() > 1e-4


def test_a_silent_block_goes_by_what_is_predicted(request, random_text):
    model = three_blocks(request, "tiny_gpt2", MLP)
    codec, shards = block_at(model.blocks, 1).attention.codec, model.shards(4, random_text(24))
    y, before = np.random.default_rng(0).normal(size=(2, 1, 24, 16)).astype(np.float32)
    strategy = Virtual(shards, silent=True)
    remote, carry, _ = strategy.exchange(codec, jnp.asarray(y), jnp.asarray(before), 1)
    np.testing.assert_array_equal(carry, codec.predict(jnp.asarray(before), strategy._around))
    np.testing.assert_array_equal(remote.message, carry)


def test_training_computes_the_same(request, random_text):
    """With noise of strength 0, and no gradient reaches a token by way of a silent block's codes."""
    model, text = three_blocks(request, "tiny_gpt2", of(MLP, 1)), random_text(24)
    shards = model.shards(4, text)
    slots = shards.scatter(model.to_tokens(text))
    noisy, seen = model(slots, Virtual(shards, Noise(jax.random.key(0), 0.0)))
    np.testing.assert_allclose(noisy, model(slots, Virtual(shards))[0], rtol=1e-5, atol=1e-5)
    assert seen.error.shape == (3,)
    codec = block_at(model.blocks, 1).attention.codec
    silent, speaking = (Virtual(shards, Noise(jax.random.key(0), 0.0), silent=silent) for silent in (True, False))

    def of_codes(y, strategy):
        return jnp.sum(strategy.exchange(codec, y, jnp.zeros((1, 24, 16)), 1)[0].message)

    y = jnp.ones((1, 24, 16))
    assert not jax.grad(of_codes)(y, silent).any() and (jax.grad(of_codes)(y, speaking) == 1).all()


@pytest.mark.parametrize(
    ("family", "astra", "codes", "ids"),
    [
        ("tiny_gpt2", of(MLP, 2), [(96, 2)], []),
        ("tiny_gpt2", of(IDS, 2), [(96, 1)], [(96, 1)]),
        ("tiny_gpt2", of(IDS, 1), [], [(96, 1)]),
        ("tiny_gpt2", of(MLP, 9), [(96, 3)], []),
    ],
    ids=str,
)
def test_what_is_sent(request, random_text, family, astra, codes, ids):
    """6 tokens of 4 codes of 4 bits, and ids of 16 bits; `messages` itself compares with the compiled program."""
    model = three_blocks(request, family, astra)
    sent = messages(model, 4, random_text(24), Astra.of)
    assert [(m.bits, m.times) for m in sent if m.in_blocks] == codes
    assert [(m.bits, m.times) for m in sent if not m.in_blocks] == ids


@pytest.mark.parametrize("astra", [of(MLP, 1), pytest.param(of(IDS, 1), marks=pytest.mark.slow)], ids=str)
def test_text_goes_on_from_estimates(tiny_gpt2, random_text, astra):
    model, text = tiny_gpt2(astra), random_text(23, 1, 2, 7)
    generator = Generator(model, make_mesh(4))
    new = tokens(generator, text, Sampling(temperature=3.0))
    np.testing.assert_allclose(decode(generator, text, new), recompute(model, text, new, 4), rtol=1e-5, atol=1e-5)
