"""Training is data-parallel over virtual shards: the gradient does not depend on how many devices share a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from astra_jax.codecs.config import VQConfig
from astra_jax.mesh.sharding import DATA, make_mesh
from train.navq import NoiseAugmented


@pytest.mark.slow
def test_gradients_of_a_sharded_batch_are_those_of_one_device(tiny_vit, rank_coded):
    model = tiny_vit(VQConfig(groups=4, codewords=16))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    shards, mesh = model.shards(3), make_mesh(1, data=4)

    @jax.jit
    def gradient(params, rest, images, key):
        def loss(params):
            model = nnx.merge(graphdef, params, rest)
            strategy = NoiseAugmented.virtual(shards, key=key)
            logits, reports = model(shards.scatter(model.to_tokens(images)), strategy)
            return jnp.mean(logits**2) + 5e-4 * reports.observed.commitment.sum()

        return jax.grad(loss)(params)

    images, key = rank_coded(8), jax.random.key(0)
    everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(DATA))
    sharded = gradient(*jax.device_put((params, rest), everywhere), jax.device_put(images, split), key)
    for got, expected in zip(
        jax.tree.leaves(sharded), jax.tree.leaves(gradient(params, rest, images, key)), strict=True
    ):
        assert np.any(expected)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
