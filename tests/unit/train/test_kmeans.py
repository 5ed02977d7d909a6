"""k-means, against scikit-learn and its own promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans

from astra_jax.codecs.product import lookup
from train import kmeans as kmeans_module
from train.kmeans import AT_ONCE, LAST, assign, kmeans


def test_separated_clusters_are_found_exactly():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(2, 8, 3)) * 10
    y = np.stack([centres[g][rng.integers(0, 8, 4000)] for g in range(2)], axis=1).astype(np.float32)
    C, *_, error = kmeans(jnp.asarray(y), 8, 30, jax.random.key(0))
    assert float(error[-1]) < 1e-8
    for g in range(2):
        np.testing.assert_allclose(np.sort(np.asarray(C[g]), axis=0), np.sort(centres[g], axis=0), atol=1e-4)


def test_error_is_that_of_scikit_learn():
    y = np.random.default_rng(1).normal(size=(4000, 2, 3)).astype(np.float32)
    error = kmeans(jnp.asarray(y), 8, 30, jax.random.key(0)).errors  # a program of the test above
    theirs = sum(KMeans(8, n_init=3, random_state=0).fit(y[:, g]).inertia_ for g in range(2)) / y.size
    assert float(error[-1]) < 1.05 * theirs


def test_error_never_rises_while_all_are_seen():
    """Without empty codewords: always, where there are few vectors, and at the end, where a part was enough before."""
    rng = np.random.default_rng(2)
    few, many = (jnp.asarray(rng.normal(size=(M, 4, 2)).astype(np.float32)) for M in (100, 2000))
    assert np.all(np.diff(np.asarray(kmeans(few, 8, 20, jax.random.key(3)).errors)) <= 1e-6)
    found = kmeans(many, 8, 20, jax.random.key(3))
    after = np.mean((np.asarray(many) - np.asarray(found.estimate)) ** 2)
    assert np.all(np.diff([*np.asarray(found.errors[-20 // LAST :]), after]) <= 1e-6)


@pytest.mark.slow
def test_a_part_at_a_time_is_as_good_as_all():
    """With the same number of iterations the error is no more than a percent above."""
    y = np.random.default_rng(4).normal(size=(4096, 2, 4)).astype(np.float32)

    def error(parts: int) -> float:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kmeans_module, "PARTS", parts)
            return float(np.mean((y - np.asarray(kmeans(jnp.asarray(y), 64, 10, jax.random.key(0)).estimate)) ** 2))

    assert error(4) < 1.01 * error(1)


def test_estimates_are_of_the_nearest_codewords():
    y = jnp.asarray(np.random.default_rng(5).normal(size=(500, 2, 3)).astype(np.float32))
    found = kmeans(y, 16, 5, jax.random.key(0))
    z, count, _ = jax.jit(assign)(y, found.codewords)
    np.testing.assert_array_equal(found.estimate, jax.jit(lookup)(found.codewords, z))
    np.testing.assert_array_equal(found.count, count)


def test_unsettled_estimates_are_means_of_the_last_clusters():
    y = np.random.default_rng(5).normal(size=(500, 2, 3)).astype(np.float32)
    settled, found = (
        jax.tree.map(np.asarray, kmeans(jnp.asarray(y), 16, 5, jax.random.key(0), settle=settle))
        for settle in (True, False)
    )
    np.testing.assert_array_equal(found.codewords, settled.codewords)
    for g in range(2):
        for codeword, count in zip(found.codewords[g], found.count[g], strict=True):
            chose = np.all(found.estimate[:, g] == codeword, axis=-1)
            assert chose.sum() == count
            np.testing.assert_allclose(y[chose, g].mean(0), codeword, atol=1e-5)
    near, own = (float(np.mean((y - one.estimate) ** 2)) for one in (settled, found))
    assert near <= own < found.errors[-1]


@pytest.mark.parametrize(("M", "G"), [(50, 1), (50, 3), (AT_ONCE + 50, 2)])
def test_assign_counts_and_sums(M, G):
    rng = np.random.default_rng(3)
    y, C = rng.normal(size=(M, G, 2)).astype(np.float32), rng.normal(size=(G, 4, 2)).astype(np.float32)
    z, count, total = map(np.asarray, jax.jit(assign)(y, C))
    for g in range(G):
        for k in range(4):
            chose = z[:, g] == k
            assert count[g, k] == chose.sum()
            np.testing.assert_allclose(total[g, k], y[chose, g].sum(0), rtol=1e-5, atol=1e-4)
