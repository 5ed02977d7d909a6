"""ViT: what its configuration refuses and how it reads images. Its numbers are compared in tests/parity."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from astra_jax.codecs.config import VQConfig
from astra_jax.errors import AstraError
from astra_jax.mesh.sharding import Shards
from astra_jax.models.blocks import block_at, scan_blocks
from astra_jax.models.mask import Block
from astra_jax.models.vit import ViT, ViTConfig
from astra_jax.strategies.base import Single


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden_size": 0}, "hidden_size is 0; it must be a whole number of at least 1"),
        ({"image_size": 10**6, "patch_size": 1}, "image_size is 1000000; it must be a whole number of at most 16,384"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan; it must be a number from 0 to 1"),
        ({"num_hidden_layers": "12"}, "num_hidden_layers is '12'; it must be a whole number"),
        ({"num_attention_heads": 7}, "hidden_size 768 is not a multiple of num_attention_heads 7"),
        ({"image_size": 225}, "image_size 225 is not a multiple of patch_size 16"),
        (
            {"hidden_act": "swish"},
            "hidden_act is 'swish'; known are gelu, gelu_new, gelu_pytorch_tanh, quick_gelu, relu, silu",
        ),
    ],
)
def test_a_config_that_cannot_be(wrong, message):
    with pytest.raises(AstraError, match=message):
        ViTConfig(**wrong)


def test_the_shapes_of_vit_base_without_its_weights():
    config = ViTConfig()
    model = nnx.eval_shape(lambda: ViT(config, VQConfig(), rngs=nnx.Rngs(0)))
    sizes = {a.size for a in jax.tree.leaves(nnx.state(model, nnx.Param))}
    assert 12 * 768 * 3072 in sizes
    assert sum(a.size for a in jax.tree.leaves(nnx.state(model, nnx.Param))) == 86_567_656
    assert model.codec.codebook.shape == (12, 32, 1024, 24)
    assert (config.num_patches, model.shards(4).lengths) == (196, (49,) * 4)


def test_patches_are_read_row_by_row(tiny_vit):
    model = tiny_vit()
    images = jnp.arange(20 * 20.0).reshape(1, 20, 20, 1)
    patches = model.to_tokens(images)
    assert patches.shape == (1, 25, 16)
    np.testing.assert_array_equal(patches[0, 7], images[0, 4:8, 8:12].reshape(-1))  # second row, third column
    with pytest.raises(AstraError, match=r"images are \(20, 20, 3\); this model takes \(20, 20, 1\)"):
        model.to_tokens(jnp.zeros((1, 20, 20, 3)))


def test_a_stack_of_blocks_is_its_blocks_one_after_the_other(tiny_vit):
    model = tiny_vit()
    x = jax.random.normal(jax.random.key(0), (2, 6, 16))
    single = Single(Shards((5,), "distributed"))
    expected = x
    one_block = nnx.jit(lambda block, x: block(x, single, (), Block(0))[0])
    for index in range(2):
        expected = one_block(block_at(model.blocks, index), expected)
    stack = nnx.jit(lambda model, x: scan_blocks(model, x, single)[0])
    np.testing.assert_allclose(stack(model, x), expected, atol=1e-5)


def test_activations_may_be_bfloat16_while_weights_and_logits_stay_float32(tiny_vit, rank_coded):
    full = tiny_vit()
    half = nnx.eval_shape(lambda: ViT(full.config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    nnx.update(half, nnx.state(full))
    assert {a.dtype for a in jax.tree.leaves(nnx.state(half, nnx.Param))} == {jnp.dtype("float32")}
    assert dataclasses.asdict(half.config) == dataclasses.asdict(full.config)
    run = nnx.jit(lambda model: model(model.to_tokens(rank_coded(2)), Single(model.shards(1)))[0])
    logits = [run(model) for model in (full, half)]
    assert logits[1].dtype == jnp.float32
    np.testing.assert_allclose(logits[1], logits[0], atol=0.1)
