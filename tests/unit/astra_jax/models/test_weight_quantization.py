"""Weights of 8 and 4 bits: how far off they are, that nothing else changes, and that every family runs with them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import checkpoints
from astra_jax.cli.main import main
from astra_jax.codecs.config import VQConfig
from astra_jax.errors import AstraError
from astra_jax.mesh.sharding import make_mesh
from astra_jax.models.weight_quantization import dequantized, is_quantized, quantize_weights, weight_bytes
from astra_jax.serving import batch
from astra_jax.serving.compile import parallelize
from astra_jax.serving.generate import Generator
from astra_jax.serving.sampling import Sampling
from astra_jax.strategies.base import Single
from astra_jax.strategies.coded import Astra
from astra_jax.strategies.rivals import TensorParallel

ASTRA = VQConfig(groups=4, codewords=16)
STEPS = {"int8": 127.5, "int4": 7.5}  # from 0 to the largest weight


def arrays(model):
    """Path -> array, quantized arrays whole."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(model), is_leaf=is_quantized)
    return {jax.tree_util.keystr(path): a for path, a in leaves}


def full_precision(model):
    """The model with its quantized kernels as ordinary ones."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.jit(dequantized)(state))


def relative_error(a, b):
    return np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(b)


@nnx.jit(static_argnums=2)
def run(model, inputs, N):
    shards, tokens = model.shards(N, inputs), model.to_tokens(inputs)
    out = model(shards.scatter(tokens), Astra.virtual(shards) if N > 1 else Single(shards))[0]
    return shards.gather(out, tokens.shape[1]) if model.per_token else out


@pytest.mark.parametrize("weights", STEPS)
def test_a_weight_is_off_by_half_a_step_at_most(tiny_llama, weights):
    """Scales computed here: of a column, or of groups of rows, which are 32 of 64 rows and 8 of 24."""
    model, group = tiny_llama(ASTRA, hidden_size=64), {64: 32, 24: 8}
    before, after = arrays(model), arrays(quantize_weights(model, weights))
    kernels = [path for path in before if "blocks" in path and "kernel" in path]
    assert len(kernels) == 7
    for path in kernels:
        W, q = np.asarray(before[path]), after[path]
        assert q.qvalue.dtype == jnp.dtype(weights) and q.qvalue.shape == W.shape
        L, rows, columns = W.shape
        groups = W.reshape(L, 1 if weights == "int8" else rows // group[rows], -1, columns)
        step = np.abs(groups).max(2, keepdims=True) / STEPS[weights]
        off = np.abs(groups - np.asarray(dequantized(q)).reshape(groups.shape))
        assert (off <= step * (0.5 + 1e-5)).all()
        np.testing.assert_allclose(q.scale, step.squeeze(2), rtol=1e-6)


@pytest.mark.parametrize("weights", STEPS)
def test_in_bfloat16_a_weight_is_off_by_little_more(tiny_vit, weights):
    """Scale and product are rounded to 8 bits: half a step, and 1/256 of the largest weight."""
    graphdef, state = nnx.split(tiny_vit())
    model = nnx.merge(graphdef, jax.tree.map(lambda a: a.astype(jnp.bfloat16), state))
    before, after = arrays(model), arrays(quantize_weights(model, weights))
    for path in (path for path, a in after.items() if is_quantized(a)):
        W, back = before[path], dequantized(after[path])
        assert back.dtype == jnp.bfloat16
        largest = np.abs(np.asarray(W, np.float32)).max()
        off = np.abs(np.asarray(back, np.float32) - np.asarray(W, np.float32)).max()
        assert off <= largest * (0.5 / STEPS[weights] + 1 / 256)


def test_all_but_the_kernels_of_blocks_stays_as_it_is(tiny_gpt2):
    model = tiny_gpt2(ASTRA)
    before = arrays(model)
    after = arrays(quantize_weights(model, "int8"))
    assert before.keys() == after.keys()
    for path, a in after.items():
        if is_quantized(a):
            assert "blocks" in path and "kernel" in path
        else:
            np.testing.assert_array_equal(a, before[path])
    assert not any(map(is_quantized, arrays(model).values())), "the model that was given has changed"


def test_bytes_counted_by_hand(tiny_vit):
    model = tiny_vit(ASTRA)
    kernels, columns = 4 * 16 * 16 + 2 * 16 * 32, 4 * 16 + 32 + 16  # of one block
    others = weight_bytes(model) - 2 * 4 * kernels
    assert weight_bytes(quantize_weights(model, "int8")) == others + 2 * (kernels + 4 * columns)
    # Kernels of 16 rows have one group, that of 32 rows has one, too.
    assert weight_bytes(quantize_weights(model, "int4")) == others + 2 * (kernels // 2 + 4 * columns)


@pytest.mark.parametrize("family", ["vit", pytest.param("gpt2", marks=pytest.mark.slow), "llama", "bert"])
def test_outputs_are_close_to_full_precision(request, rank_coded, random_text, family):
    """Random weights are hard to round: 2 % at 8 bits, and through codes exactly what rounded weights give."""
    model = request.getfixturevalue(f"tiny_{family}")(ASTRA)
    inputs = rank_coded(2) if family == "vit" else random_text(24, 24)
    quantized = quantize_weights(model, "int8")
    rounded = full_precision(quantized)
    assert 1e-4 < relative_error(run(rounded, inputs, 1), run(model, inputs, 1)) < 2e-2
    expected = run(rounded, inputs, 3)
    np.testing.assert_allclose(run(quantized, inputs, 3), expected, rtol=1e-5, atol=1e-5)


def test_four_bits_are_coarser(tiny_vit, rank_coded):
    model, images = tiny_vit(ASTRA), rank_coded(2)
    expected = run(model, images, 1)
    assert 2e-2 < relative_error(run(quantize_weights(model, "int4"), images, 1), expected) < 0.3


@pytest.mark.parametrize("weights", STEPS)
def test_sharded_equals_virtual(tiny_vit, rank_coded, weights):
    model, images = quantize_weights(tiny_vit(ASTRA), weights), rank_coded(2)
    on_mesh = parallelize(model, make_mesh(3))(images)
    np.testing.assert_allclose(on_mesh, run(model, images, 3), rtol=1e-5, atol=1e-5)


def test_tensor_parallel_splits_the_scales_too(tiny_vit, rank_coded):
    """Kernels of 64 rows have two groups, one for each of two devices."""
    model, images = quantize_weights(tiny_vit(hidden_size=64, intermediate_size=64), "int4"), rank_coded(2)
    on_mesh = parallelize(model, make_mesh(2), TensorParallel.of)(images)
    np.testing.assert_allclose(on_mesh, run(model, images, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_generation(tiny_gpt2, random_text):
    model = quantize_weights(tiny_gpt2(ASTRA), "int4")
    mesh, text = make_mesh(2), random_text(9, 5)
    generators = (Generator(m, mesh) for m in (model, full_precision(model)))
    tokens, expected = (list(batch.tokens(generator, text, 6, Sampling())) for generator in generators)
    np.testing.assert_array_equal(tokens, expected)


def test_weights_are_quantized_once(tiny_vit):
    quantized = quantize_weights(tiny_vit(), "int8")
    with pytest.raises(AstraError, match="quantized already: load the checkpoint again to have them in int4"):
        quantize_weights(quantized, "int4")


@pytest.fixture
def checkpoint(tiny_vit):
    model = tiny_vit()
    half = {"size": {"height": 20, "width": 20}, "image_mean": [0.5], "image_std": [0.5]}
    return checkpoints.Checkpoint("vit", model.config, None, None, half, {}, "float32", (), model)


def test_they_are_not_saved(checkpoint, tmp_path):
    """No verb tries: all load full-precision weights, and those that save never quantize them."""
    quantized = dataclasses.replace(checkpoint, model=quantize_weights(checkpoint.model, "int8"))
    with pytest.raises(TypeError, match="QArray"):
        checkpoints.save(tmp_path / "out", quantized)
    assert not (tmp_path / "out").exists()


def test_run_says_what_it_saves(checkpoint, tmp_path):
    checkpoints.save(tmp_path / "model", checkpoint)
    Image.fromarray(np.arange(400, dtype=np.uint8).reshape(20, 20) // 2).save(tmp_path / "a.png")
    report = tmp_path / "run.json"
    arguments = [tmp_path / "model", "--image", tmp_path / "a.png", "--weights", "int4", "--json", report]
    assert main(["run", *map(str, arguments)]) == 0
    found = json.loads(report.read_text())
    assert found["full_weight_bytes"] == weight_bytes(checkpoint.model)
    assert found["weight_bytes"] == weight_bytes(quantize_weights(checkpoint.model, "int4"))
