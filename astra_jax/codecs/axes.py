"""The axes of nested codes: which errors matter, along which axes tokens differ, who gets the bits.

What counts is the error of keys and values (our choice; that a quantizer should minimise the error of what its vectors
are used for is the idea of ScaNN, 1908.10396). In whitened axes of that metric, ordered by variance, bits are given out
by reverse water-filling, as rate-distortion theory has it for Gaussian vectors.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from astra_jax.errors import AstraError

SPREADS = (1.0, 2.0, 4.0, 16.0)


class Axes(NamedTuple):
    """`u = (y - mean) analysis` is uncorrelated, the greatest variance first; `y ~ mean + u synthesis`."""

    mean: Float[np.ndarray, "W"]
    analysis: Float[np.ndarray, "W W"]
    synthesis: Float[np.ndarray, "W W"]
    variance: Float[np.ndarray, "W"]


def principal_axes(y: Float[np.ndarray, "M W"], metric: Float[np.ndarray, "W W"]) -> Axes:
    """The principal axes of vectors under a metric."""
    y = y.astype(np.float64)
    mean = y.mean(0)
    centred = y - mean
    covariance = centred.T @ centred / len(y)  # of a matrix with itself, for which BLAS does half the work
    squares, basis = np.linalg.eigh(metric)
    root = (basis * np.sqrt(np.clip(squares, 0, None))) @ basis.T
    variance, turned = np.linalg.eigh(root @ covariance @ root)
    variance, analysis = np.clip(variance[::-1], 0, None), root @ turned[:, ::-1]
    alive = variance > 1e-9 * variance[0]
    # The best linear estimate of y from these axes, also of what the metric does not see.
    synthesis = (analysis.T @ covariance) * np.where(alive, 1 / np.where(alive, variance, 1), 0)[:, None]
    return Axes(mean, analysis, synthesis, variance)


def axis_bits(variance: Float[np.ndarray, "W"], total: float) -> Float[np.ndarray, "W"]:
    """Reverse water-filling: `max(0, log2(variance / level) / 2)` of every axis, with the level that gives `total`."""
    logs = np.log2(np.maximum(variance, 1e-12 * variance.max())) / 2
    # With the n greatest above the level, what they have above it is their sum less n levels; any other n gives less.
    level = ((np.cumsum(np.sort(logs)[::-1]) - total) / np.arange(1, len(logs) + 1)).max()
    return np.maximum(logs - level, 0)


def codeword_spread(variance: Float[np.ndarray, "d"], bits: int) -> Float[np.ndarray, "d"]:
    """How far codewords of so many bits lie from the mean along each axis, as a share of how far vectors do: by
    rate-distortion theory `sqrt(1 - D / variance)` for Gaussian vectors, where D is what the code loses along the axis.

    K-means that starts from vectors as they are finds few codewords that are of use where there are few bits for many
    axes: most are so long that no vector but themselves is nearest to them.
    """
    return np.sqrt(1 - 4.0 ** -axis_bits(np.maximum(variance, np.finfo(np.float32).tiny), float(bits)))


def pack(bits: Float[np.ndarray, "W"], G: int) -> tuple[int, ...]:
    """How many consecutive axes each of G groups gets, so that all have as many bits. Axes without any are left out.

    Raises:
      AstraError: there are fewer axes than groups.
    """
    if len(bits) < G:
        raise AstraError(f"groups is {G}, more than the quantized width {len(bits)}: use at most {len(bits)}")
    alive = max(G, int((bits > 0).sum()))
    ends = np.searchsorted(np.cumsum(bits), np.arange(1, G) * bits.sum() / G) + 1
    edges = [0]
    for group, end in enumerate(ends, 1):
        edges.append(int(np.clip(end, edges[-1] + 1, alive - (G - group))))
    return tuple(int(n) for n in np.diff([*edges, alive]))


def candidates(variances: Float[np.ndarray, "L W"], levels: tuple[int, ...], K: int) -> list[tuple[int, ...]]:
    """Widths of the groups that may be good, the same in all blocks, from the mean of the bits that each block gives
    its axes. Codewords of several axes make use of more of them than water-filling says, so that some are for `SPREADS`
    times the bits that there are. Every level divides the same axes.

    Args:
      variances: of all axes in every block.
      levels: groups of each.
    """
    total = sum(levels) * np.log2(K)
    bits = (np.mean([axis_bits(v, spread * total) for v in variances], axis=0) for spread in SPREADS)
    return sorted({tuple(width for G in levels for width in pack(b, G)) for b in bits})
