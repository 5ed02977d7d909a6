"""Weights of every block as arrays of their own, without copies: the same numbers, the same messages."""

import jax
import numpy as np
import pytest
from flax import nnx

from astra_jax.codecs.config import VQConfig
from astra_jax.mesh.sharding import make_mesh
from astra_jax.models.blocks import Unstacked, unstacked
from astra_jax.models.weight_quantization import quantize_weights
from astra_jax.serving.compile import STRATEGIES, parallelize, place
from astra_jax.serving.generate import Generator
from astra_jax.serving.sampling import Sampling
from astra_jax.strategies.rivals import BlockParallel
from eval.cost.traffic import sent_bits
from eval.quality.perplexity import NextTokenLoss
from tests.helpers.sharded import decode, tokens

CODES = VQConfig(groups=4, codewords=16)


@pytest.fixture
def always(monkeypatch):
    """Also weights as small as those of tests are unstacked."""
    monkeypatch.setattr("astra_jax.models.blocks.LEAST_UNSTACKED", 0)


def unstacked_in(state):
    leaves = jax.tree.leaves(state, is_leaf=lambda a: isinstance(a, Unstacked))
    return [a for a in leaves if isinstance(a, Unstacked)]


def test_small_weights_stay_in_a_stack(tiny_vit):
    assert not unstacked_in(place(tiny_vit(CODES), make_mesh(2))[1])


def test_nothing_is_copied(always):
    stack = np.zeros((3, 16, 64), np.float32)
    stack = jax.device_put(stack, jax.devices()[0])
    found, head = jax.tree.leaves(
        unstacked({"blocks": {"w": stack}, "head": stack}), is_leaf=lambda a: isinstance(a, Unstacked)
    )
    assert head is stack
    places = [a.unsafe_buffer_pointer() - stack.unsafe_buffer_pointer() for a in found.blocks]
    assert places == [0, stack.nbytes // 3, 2 * stack.nbytes // 3]


@pytest.mark.parametrize(
    ("family", "options", "way"),
    [
        ("tiny_vit", {"num_attention_heads": 4}, "astra"),
        ("tiny_vit", {"num_attention_heads": 4}, "tp"),
        ("tiny_gpt2", {}, "astra"),
        pytest.param("tiny_llama", {}, "astra", marks=pytest.mark.slow),
        pytest.param("tiny_bert", {}, "sp", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_it_is_the_same_model(request, monkeypatch, rank_coded, random_text, family, options, way):
    model = request.getfixturevalue(family)(CODES, **options)
    inputs = rank_coded(2) if family == "tiny_vit" else random_text(23, 1, 7, 24)
    stacked = parallelize(model, make_mesh(4), STRATEGIES[way].of)
    monkeypatch.setattr("astra_jax.models.blocks.LEAST_UNSTACKED", 0)
    loop = parallelize(model, make_mesh(4), STRATEGIES[way].of)
    assert unstacked_in(loop.state) and not unstacked_in(stacked.state)
    np.testing.assert_allclose(loop(inputs), stacked(inputs), rtol=1e-5, atol=1e-5)
    sent = [sent_bits(program.lower(inputs).compile().as_text(), 4) for program in (loop, stacked)]
    assert sent[0] == sent[1] and sent[0]


def test_quantized_weights_and_block_parallelism_keep_the_stack(always, tiny_vit):
    """The first are made from it block by block, the second takes parts of it."""
    model = tiny_vit(CODES)
    state = place(quantize_weights(model, "int8"), make_mesh(2))[1]["blocks"]
    assert not unstacked_in(state["mlp"]["up"]["kernel"]) and unstacked_in(state["norm1"])
    assert not unstacked_in(place(model, make_mesh(2), BlockParallel.of)[1])


def test_quantized_weights_in_a_loop(monkeypatch, tiny_vit, rank_coded):
    model = quantize_weights(tiny_vit(CODES), "int4")
    expected = parallelize(model, make_mesh(3))(rank_coded(1))
    monkeypatch.setattr("astra_jax.models.blocks.LEAST_UNSTACKED", 0)
    np.testing.assert_allclose(parallelize(model, make_mesh(3))(rank_coded(1)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_text_goes_on_in_the_same_way(monkeypatch, tiny_gpt2, random_text):
    model, text = tiny_gpt2(CODES), random_text(23, 1, 2, 7)
    stacked = Generator(model, make_mesh(2, 2))
    monkeypatch.setattr("astra_jax.models.blocks.LEAST_UNSTACKED", 0)
    loop = Generator(model, make_mesh(2, 2))
    new = tokens(stacked, text, Sampling(temperature=3.0))
    np.testing.assert_array_equal(tokens(loop, text, Sampling(temperature=3.0)), new)
    np.testing.assert_allclose(decode(loop, text, new), decode(stacked, text, new), rtol=1e-5, atol=1e-5)


def test_a_model_within_another(monkeypatch, tiny_gpt2, random_text):
    """Perplexity is that of a wrapped model."""
    model, text = NextTokenLoss(tiny_gpt2(CODES)), random_text(23, 7)
    expected = parallelize(model, make_mesh(2))(text)
    monkeypatch.setattr("astra_jax.models.blocks.LEAST_UNSTACKED", 0)
    loop = parallelize(model, make_mesh(2))
    assert unstacked_in(loop.state)
    np.testing.assert_allclose(loop(text), expected, rtol=1e-5, atol=1e-5)


def test_shapes_stay_shapes(always, tiny_vit):
    model = tiny_vit(CODES)
    graphdef, state = nnx.split(model)
    shapes = nnx.merge(graphdef, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state))
    assert not unstacked_in(place(shapes, make_mesh(2))[1])
