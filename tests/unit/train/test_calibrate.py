"""Which tokens calibration serves: those that are sent."""

import jax.numpy as jnp
import numpy as np
import pytest

import checkpoints
from astra_jax.codecs.config import VQConfig
from astra_jax.models.blocks import block_at
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
    attention = block_at(coded.blocks, 0).attention
    seen = block_at(model.blocks, 0).norm1(model.cls[...] + model.position[...][0])[None, None]
    code = attention.codec.encode(jnp.asarray(seen))
    error = jnp.linalg.norm(attention.codec.decode(code) - seen) / jnp.linalg.norm(seen)
    assert (float(error) < 1e-5) == (class_token == "single")
