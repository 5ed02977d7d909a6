"""Which tokens calibration serves: those that are sent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import checkpoints
from astra_jax.codecs.config import VQConfig
from astra_jax.models.blocks import block_at
from astra_jax.models.vit import ViT
from checkpoints import Checkpoint
from train.calibrate import capture
from train.fit_codecs import fit


@pytest.mark.parametrize("class_token, sent", [("single", 1 + 25), ("distributed", 25)])
def test_a_single_class_token_is_sent_and_so_calibrated(class_token, sent, tiny_vit):
    """In the first block it is the same vector in all images, so that a codeword of its own says it exactly."""
    model, B = tiny_vit(), 8
    images = np.random.default_rng(0).normal(size=(B, 20, 20, 1)).astype(np.float32)
    y = capture(model, [images], 10_000, 0, class_token)
    assert y.shape[1] == B * sent
    source = Checkpoint("vit", model.config, None, None, None, {}, "float32", (), model)
    coded = checkpoints.with_codebooks(source, VQConfig(1, 64, class_token=class_token)).model
    fit(coded, y, 20, 0)

    @nnx.jit
    def error(model: ViT, coded: ViT) -> jax.Array:
        codec = block_at(coded.blocks, 0).attention.codec
        seen = block_at(model.blocks, 0).norm1(model.cls[...] + model.position[...][0])[None, None]
        return jnp.linalg.norm(codec.decode(codec.encode(seen)) - seen) / jnp.linalg.norm(seen)

    assert (float(error(model, coded)) < 1e-5) == (class_token == "single")
