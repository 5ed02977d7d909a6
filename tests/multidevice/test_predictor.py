"""Estimates that all devices keep: the same to the last bit, the same model as on virtual shards, and what is sent."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from astra_jax.codecs.config import NestedPQConfig, VQConfig
from astra_jax.mesh.sharding import SEQ, make_mesh
from astra_jax.models.blocks import block_at, token_ids
from astra_jax.models.mask import Block
from astra_jax.models.weight_quantization import quantize_weights
from astra_jax.serving.generate import Generator
from astra_jax.serving.sampling import Sampling
from astra_jax.strategies.coded import Astra
from eval.cost.traffic import messages
from tests.helpers.sharded import CLASS, KV, as_pairs, check, decode, recompute, three_blocks, tokens

LINEAR = VQConfig(groups=4, codewords=16, predictor="linear")
KNOWN = ("known", "coded", "coded")
IDS = dataclasses.replace(LINEAR, schedule=KNOWN)
NESTED = NestedPQConfig.of(LINEAR, widths=(1, 2, 3, 4), levels=(4,))
MLP = dataclasses.replace(LINEAR, predictor="mlp", hidden_units=5)
SINGLE = dict(class_token="single")


@pytest.mark.parametrize(
    ("family", "astra", "N"),
    [
        ("tiny_vit", dataclasses.replace(NESTED, class_token="single"), 3),
        pytest.param("tiny_gpt2", IDS, 4, marks=pytest.mark.slow),
        ("tiny_llama", dataclasses.replace(IDS, **KV), 2),
        ("tiny_vit", MLP, 3),
        ("tiny_gpt2", dataclasses.replace(MLP, schedule=KNOWN), 4),
        pytest.param("tiny_bert", MLP, 3, marks=pytest.mark.slow),
        pytest.param("tiny_vit", dataclasses.replace(MLP, class_token="single"), 4, marks=pytest.mark.slow),
        pytest.param("tiny_llama", dataclasses.replace(MLP, **KV), 2, marks=pytest.mark.slow),
        (CLASS, IDS, 3),
        (CLASS, dataclasses.replace(IDS, **SINGLE, **KV), 4),
        pytest.param("tiny_bert", IDS, 4, marks=pytest.mark.slow),
        pytest.param(CLASS, dataclasses.replace(IDS, **KV), 2, marks=pytest.mark.slow),
        pytest.param(CLASS, dataclasses.replace(IDS, **SINGLE), 3, marks=pytest.mark.slow),
        pytest.param(CLASS, dataclasses.replace(NESTED, schedule=KNOWN), 4, marks=pytest.mark.slow),
        pytest.param("tiny_llama", NESTED, 8, marks=pytest.mark.slow),
        pytest.param("tiny_bert", LINEAR, 3, marks=pytest.mark.slow),
        pytest.param("tiny_gpt2", dataclasses.replace(NESTED, schedule=KNOWN), 3, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_it_is_the_same_model_as_on_virtual_shards(request, rank_coded, random_text, family, astra, N):
    """Texts of different lengths, some shards empty."""
    inputs = rank_coded(2) if family == "tiny_vit" else random_text(23, 1, 2, 7, 24)
    check(three_blocks(request, family, astra), inputs, N)


@pytest.mark.parametrize("family", [pytest.param("tiny_gpt2", marks=pytest.mark.slow), "tiny_bert"])
def test_weights_of_few_bits(request, random_text, family):
    """Keys and values that all devices compute of token ids are those of the quantized weights."""
    model = three_blocks(request, family, dataclasses.replace(IDS, **KV))
    check(quantize_weights(model, "int8"), as_pairs(model, random_text(23, 1, 7)), 3)


def estimates(model, strategy, mesh, y, ids):
    """What every device expects of all: of what the codecs of three blocks see [L,B,slots,W] and token ids [B,slots],
    an array [device,L,N,B,S,W]; and what virtual shards start from [N,B,S,W]."""
    graphdef, state = nnx.split(model)

    def one_device(state, y, ids):
        model = nnx.merge(graphdef, state)
        estimate, found = strategy.start(model.codec, y[0], token_ids(model, ids)), []
        for number, kind in enumerate(model.astra.kinds(3)):
            codec = block_at(model.blocks, number).attention.codec
            estimate = strategy.exchange(codec, y[number], estimate, Block(number, kind)).estimate
            found.append(estimate)
        return jnp.stack(found)[None]

    @jax.jit
    def run(state, y, ids):
        specs = P(), P(None, None, SEQ), P(None, SEQ)
        on_mesh = jax.shard_map(one_device, mesh=mesh, in_specs=specs, out_specs=P(SEQ), check_vma=False)
        virtual, model = Astra.virtual(strategy.shards), nnx.merge(graphdef, state)
        return on_mesh(state, y, ids), virtual.start(model.codec, y[0], token_ids(model, ids))

    return map(np.asarray, run(state, y, ids))


@pytest.mark.parametrize(
    ("family", "astra"),
    [
        ("tiny_gpt2", IDS),
        ("tiny_gpt2", MLP),
        (CLASS, MLP),
        ("tiny_bert", dataclasses.replace(IDS, **KV)),
        (CLASS, IDS),
        (CLASS, dataclasses.replace(IDS, **SINGLE)),
    ],
    ids=str,
)
def test_every_device_has_the_same_estimates_to_the_last_bit(request, random_text, family, astra):
    """And what the first block sees, where token ids are known: of all slots but those that stay at home."""
    model, text, mesh = three_blocks(request, family, astra), random_text(24, 20), make_mesh(4)
    strategy, W = Astra(model.shards(4, text)), model.codec.predictor.bias.shape[-1]
    shards, rng = strategy.shards, np.random.default_rng(0)
    slots = shards.class_slots + shards.S
    y = rng.normal(size=(3, 2, 4 * slots, W)).astype(np.float32)
    ids = rng.integers(0, model.config.vocab_size, (2, 4 * slots)).astype(np.int32)
    of_device, start = estimates(model, strategy, mesh, y, ids)
    assert of_device.shape == (4, 3, 4, 2, shards.sent_slots, W)
    np.testing.assert_array_equal(of_device, np.broadcast_to(of_device[:1], of_device.shape))
    assert np.abs(of_device[0, 2]).max() > 0
    if astra.schedule:
        np.testing.assert_allclose(of_device[0, 0], start, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "astra", "S"),
    [
        ("tiny_gpt2", LINEAR, 6),
        ("tiny_gpt2", IDS, 6),
        (CLASS, IDS, 6),
        (CLASS, dataclasses.replace(IDS, **SINGLE), 7),
    ],
    ids=str,
)
def test_what_is_sent(request, random_text, family, astra, S):
    """With token ids the first block sends none; `messages` itself compares with the compiled program.

    A class token that is sent is one of S. An encoder's devices also add up the state of the sequence.
    """
    model = three_blocks(request, family, astra)
    sent = messages(model, 4, random_text(24), Astra.of)
    codes, pooled = 8 * S * 4 * 4 // 8, [] if model.per_token else [(32 * 16, 1, False)]
    found = [(m.bits, m.times, m.in_blocks) for m in sent]
    if not astra.schedule:
        assert found == [(codes, 3, True), *pooled]
    else:
        assert found == [(S * 16, 1, False), (codes, 2, True), *pooled]


@pytest.mark.parametrize(
    ("family", "astra"),
    [
        ("tiny_gpt2", IDS),
        pytest.param("tiny_llama", dataclasses.replace(NESTED, **KV), marks=pytest.mark.slow),
    ],
)
def test_text_goes_on_from_estimates(request, random_text, family, astra):
    model, text = three_blocks(request, family, astra), random_text(23, 1, 2, 7)
    generator = Generator(model, make_mesh(4))
    new = tokens(generator, text, Sampling(temperature=3.0))
    np.testing.assert_allclose(decode(generator, text, new), recompute(model, text, new, 4), rtol=1e-5, atol=1e-5)
