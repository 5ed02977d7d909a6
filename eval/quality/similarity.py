"""How similar two embeddings are, and whether that is what people say."""

import numpy as np
from jaxtyping import Float

from astra_jax.codecs.config import Similarity
from astra_jax.errors import AstraError


def similarities(
    first: Float[np.ndarray, "pairs D"], second: Float[np.ndarray, "pairs D"], by: Similarity
) -> Float[np.ndarray, "pairs"]:
    """The similarity of every pair, as sentence-transformers has it: of distances the negative."""
    if by in ("cosine", "dot"):
        products = np.einsum("pd,pd->p", first, second)
        if by == "dot":
            return products
        norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
        return products / np.maximum(norms, np.finfo(np.float32).tiny)
    return -np.linalg.norm(first - second, ord=2 if by == "euclidean" else 1, axis=-1)


def correlations(
    first: Float[np.ndarray, "pairs D"],
    second: Float[np.ndarray, "pairs D"],
    scores: Float[np.ndarray, "pairs"],
    by: Similarity = "cosine",
) -> dict[str, float]:
    """Pearson's and Spearman's correlation of scores with the similarities of embeddings.

    Raises AstraError where there is none: fewer than two pairs, or all scores or all similarities the same.
    """
    from scipy import stats

    found = similarities(first, second, by)
    for what, values in (("scores", scores), (f"similarities ({by})", found)):
        if len(values) < 2 or np.ptp(values) == 0:
            raise AstraError(
                f"the {what} of {len(values)} pairs are all the same, so nothing correlates: give more or other pairs"
            )
    return {
        "Pearson": float(stats.pearsonr(found, scores).statistic),
        "Spearman": float(stats.spearmanr(found, scores).statistic),
    }
