"""Layers that several families share, against float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from astra_jax.models.layers import LayerNorm


@pytest.mark.parametrize("mean", [0, 100, 1000])
def test_a_layer_norm_where_the_mean_is_far_larger_than_the_deviation(mean):
    """Only the rounding of the mean is left: at most 4 units in its last place. E[x^2] - E[x]^2 is off by more."""
    x = np.random.default_rng(0).normal(mean, 1.0, (8, 64)).astype(np.float32)
    found = LayerNorm(64, epsilon=1e-6, rngs=nnx.Rngs(0))(jnp.asarray(x))
    exact = x.astype(np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-6)
    assert np.abs(found - exact).max() < 1e-6 + 4 * np.spacing(np.float32(mean))


def test_families_take_no_other_layer_norm(tiny_vit, tiny_gpt2, tiny_bert, tiny_llama):
    for model in (tiny_vit(), tiny_gpt2(), tiny_bert(), tiny_llama()):
        norms = [module for _, module in nnx.iter_modules(model) if isinstance(module, nnx.LayerNorm)]
        assert norms or isinstance(model.norm, nnx.RMSNorm)  # which has no mean
        assert not any(norm.use_fast_variance for norm in norms)
