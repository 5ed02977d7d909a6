"""k-NN accuracy against scikit-learn's, one picture left out at a time, and by hand."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from astra_jax.errors import AstraError
from eval.quality import neighbours
from eval.quality.neighbours import TEMPERATURE, neighbour_accuracy, voters


def test_as_scikit_learn_does(monkeypatch):
    monkeypatch.setattr(neighbours, "ROWS", 16)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 50)
    rows = rng.normal(size=(50, 6)) + 1.5 * np.eye(6)[labels]
    knn = KNeighborsClassifier(7, metric="cosine", weights=lambda d: np.exp((1 - d) / TEMPERATURE))
    others = [np.arange(50) != i for i in range(50)]
    right = [knn.fit(rows[o], labels[o]).predict(rows[~o])[0] == labels[i] for i, o in enumerate(others)]
    assert 30 < 100 * np.mean(right) < 95
    found = neighbour_accuracy(3 * rows, labels, 7)
    assert found == {"k-NN accuracy %": pytest.approx(100 * np.mean(right))}


def test_few_pictures():
    rows, labels = np.array([[1.0, 0], [2.0, 0.1], [0, 1], [0, 0]]), np.array([1, 1, 0, 0])
    assert neighbour_accuracy(rows, labels, 1)["k-NN accuracy %"] >= 50
    assert neighbour_accuracy(rows[:3], labels[:3], 1) == {"k-NN accuracy %": pytest.approx(200 / 3)}
    assert [voters(np.repeat([0, 2], n)) for n in ((1, 9), (4, 9), (30, 25))] == [1, 3, 20]
    with pytest.raises(AstraError, match=r"1 picture\(s\) have no neighbours: give more"):
        voters(labels[:1])
