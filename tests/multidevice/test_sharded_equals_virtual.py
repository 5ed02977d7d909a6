"""ASTRA on a mesh computes what virtual shards compute on one device, and one device what a plain model computes.

25 tokens, which no N but 1 divides; every patch has a value of its own, so that any misplaced shard shows.
"""

import itertools

import numpy as np
import pytest
from flax import nnx

from astra_jax.config import AstraConfig
from astra_jax.errors import AstraError
from astra_jax.sharding import make_mesh
from astra_jax.strategies import Single, Virtual, parallelize

HIDDEN, KV, DISTRIBUTED, SINGLE = "hidden", "kv", "distributed", "single"


@nnx.jit(static_argnums=(2, 3))
def run_virtual(model, images, strategy, shards):
    return model(shards.scatter(model.to_tokens(images)), strategy)[0]


def check(model, images, N, data=1):
    shards = model.shards(N)
    expected = run_virtual(model, images, Virtual(shards) if N > 1 else Single(shards), shards)
    on_mesh = parallelize(model, make_mesh(N, data))(images)
    assert on_mesh.shape == expected.shape
    np.testing.assert_allclose(on_mesh, expected, rtol=1e-5, atol=1e-5)


FAST = [(1, HIDDEN, SINGLE), (2, KV, DISTRIBUTED), (3, HIDDEN, SINGLE), (4, KV, SINGLE), (8, HIDDEN, DISTRIBUTED)]
ALL = itertools.product((1, 2, 3, 4, 8), (HIDDEN, KV), (DISTRIBUTED, SINGLE))


@pytest.mark.parametrize(
    ("N", "site", "class_token"),
    [pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow) for case in ALL],
)
def test_tokens_over_n_devices(tiny_vit, rank_coded, N, site, class_token):
    check(tiny_vit(AstraConfig(groups=4, codewords=16, site=site, class_token=class_token)), rank_coded(2), N)


@pytest.mark.parametrize(
    ("data", "N", "B"),
    [
        (2, 4, 3),
        (2, 2, 4),
        pytest.param(4, 2, 1, marks=pytest.mark.slow),
        pytest.param(8, 1, 5, marks=pytest.mark.slow),
    ],
)
def test_batch_and_tokens_at_once(tiny_vit, rank_coded, data, N, B):
    """Also batches that the data axis does not divide."""
    check(tiny_vit(AstraConfig(groups=4, codewords=16)), rank_coded(B), N, data)


def test_a_shard_per_token(tiny_vit, rank_coded):
    """Four tokens: one on each of four devices, and too few for eight."""
    model = tiny_vit(AstraConfig(groups=4, codewords=16), patch_size=10)
    check(model, rank_coded(1), 4)
    with pytest.raises(AstraError, match="4 tokens cannot be split over 8 devices"):
        parallelize(model, make_mesh(8))


def test_several_devices_need_codebooks(tiny_vit, rank_coded):
    model = tiny_vit()
    with pytest.raises(AstraError, match="no codebooks"):
        parallelize(model, make_mesh(2))
    check(model, rank_coded(3), 1, data=2)
