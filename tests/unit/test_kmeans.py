"""k-means, against scikit-learn and its own promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans

from train.kmeans import assign, kmeans


def test_separated_clusters_are_found_exactly():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(2, 8, 3)) * 10
    y = np.stack([centres[g][rng.integers(0, 8, 4000)] for g in range(2)], axis=1).astype(np.float32)
    C, error = kmeans(jnp.asarray(y), 8, 30, jax.random.key(0))
    assert float(error[-1]) < 1e-8
    for g in range(2):
        np.testing.assert_allclose(np.sort(np.asarray(C[g]), axis=0), np.sort(centres[g], axis=0), atol=1e-4)


def test_error_is_that_of_scikit_learn():
    y = np.random.default_rng(1).normal(size=(3000, 1, 4)).astype(np.float32)
    _, error = kmeans(jnp.asarray(y), 16, 40, jax.random.key(0))
    theirs = KMeans(16, n_init=3, random_state=0).fit(y[:, 0]).inertia_ / y.size
    assert float(error[-1]) < 1.05 * theirs


def test_error_never_rises_without_empty_codewords():
    y = np.random.default_rng(2).normal(size=(2000, 4, 2)).astype(np.float32)
    _, error = kmeans(jnp.asarray(y), 8, 20, jax.random.key(3))
    assert np.all(np.diff(np.asarray(error)) <= 1e-6)


@pytest.mark.parametrize("G", [1, 3])
def test_assign_counts_and_sums(G):
    rng = np.random.default_rng(3)
    y, C = rng.normal(size=(50, G, 2)).astype(np.float32), rng.normal(size=(G, 4, 2)).astype(np.float32)
    z, count, total = assign(jnp.asarray(y), jnp.asarray(C))
    for g in range(G):
        for k in range(4):
            chose = np.asarray(z)[:, g] == k
            assert float(count[g, k]) == chose.sum()
            np.testing.assert_allclose(np.asarray(total[g, k]), y[chose, g].sum(0), atol=1e-5)
