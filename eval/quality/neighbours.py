"""How often a picture's nearest neighbours among others are of its class: what embeddings know without training."""

import numpy as np
from jaxtyping import Float, Int

from astra_jax.errors import AstraError

MOST = 20  # neighbours that vote
TEMPERATURE = 0.07  # of votes, as in DINO's evaluation (2104.14294)
ROWS = 1024  # whose similarities are held at once


def voters(labels: Int[np.ndarray, "n"]) -> int:
    """How many neighbours vote: at most `MOST`, and as many as every class has for each of its own.

    More would count against small classes, of which one row is always left out. Raises AstraError for a single row.
    """
    if len(labels) < 2:
        raise AstraError(f"{len(labels)} picture(s) have no neighbours: give more")
    return max(1, min(MOST, int(np.unique(labels, return_counts=True)[1].min()) - 1))


def neighbour_accuracy(embeddings: Float[np.ndarray, "n D"], labels: Int[np.ndarray, "n"], k: int) -> dict[str, float]:
    """Share of the rows that the k nearest other rows say the label of (leave-one-out).

    Nearest by cosine; each votes with a weight of `exp(cosine / TEMPERATURE)`.
    """
    n = len(labels)
    rows = np.asarray(embeddings, np.float32)
    rows = rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), np.finfo(np.float32).tiny)
    right = 0
    for start in range(0, n, ROWS):
        some = np.arange(start, min(start + ROWS, n))
        cosines = rows[some] @ rows.T
        cosines[np.arange(len(some)), some] = -np.inf
        nearest = np.argpartition(-cosines, k - 1, axis=-1)[:, :k]
        weights = np.exp((np.take_along_axis(cosines, nearest, -1) - 1) / TEMPERATURE)
        votes = np.zeros((len(some), labels.max() + 1))
        np.add.at(votes, (np.arange(len(some))[:, None], labels[nearest]), weights)
        right += int((votes.argmax(-1) == labels[some]).sum())
    return {"k-NN accuracy %": 100 * right / n}
