"""The paper's codec: product quantization with one codebook per group (paper section 3)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Shaped, UInt16

from astra_jax.codecs.base import Calibrated, Codebook, CodeStatistic, Fit, Groups, Observation, Quantizer
from astra_jax.codecs.config import VQConfig

TILE = 2**20  # scores that are held at once on a CPU: larger tiles leave the cache and run three to ten times slower


def _tiled_nearest(y: Float[Array, "M G d"], C: Float[Array, "G K d"]) -> Int[Array, "M G"]:
    """`nearest` for a CPU: one group at a time and as many codewords as keep the scores in the cache."""
    K, M = C.shape[1], y.shape[0]
    tile = min(K, max(64, 1 << ((TILE // M).bit_length() - 1) if M <= TILE else 64))

    def one_group(group: tuple[Array, Array]) -> Array:
        codewords, vectors = group  # [K, d], [d, M]

        def one_tile(best: tuple[Array, Array, Array], tile_codewords: Array) -> tuple[tuple, None]:
            score, code, first = best
            scores = tile_codewords @ vectors - 0.5 * jnp.sum(tile_codewords**2, axis=-1, keepdims=True)
            # A variadic argmax is slow on XLA's CPU backend: take the maximum, then the first index equal to it.
            top = jnp.max(scores, axis=0)
            index = jnp.min(jnp.where(scores == top, jnp.arange(tile)[:, None], tile), axis=0)
            return (jnp.maximum(score, top), jnp.where(top > score, index + first, code), first + tile), None

        # Starting values are made from `vectors` so that they vary over a mesh as it does.
        none = jnp.full_like(vectors[0], -jnp.inf)
        start = (none, jnp.zeros_like(none, dtype=jnp.int32), jnp.int32(0))
        return jax.lax.scan(one_tile, start, codewords.reshape(K // tile, tile, -1))[0][1]

    return jax.lax.map(one_group, (C, y.transpose(1, 2, 0))).T


def _dense_nearest(y: Float[Array, "M G d"], C: Float[Array, "G K d"]) -> Int[Array, "M G"]:
    """`nearest` for accelerators: all scores in one batched matmul."""
    scores = jnp.einsum("mgd,gkd->mgk", y, C) - 0.5 * jnp.sum(C**2, axis=-1)
    return jnp.argmax(scores, axis=-1)


def nearest(y: Float[Array, "M G d"], C: Float[Array, "G K d"]) -> Int[Array, "M G"]:
    """argmin_k ||y_g - C[g,k]|| per group, in float32; the lowest index of equals.

    `||y - c||^2` is smallest where `y.c - ||c||^2 / 2` is largest, which is one matmul.
    """
    y, C = y.astype(jnp.float32), C.astype(jnp.float32)
    with jax.default_matmul_precision("highest"):  # an accelerator's default would change which codeword is nearest
        return jax.lax.platform_dependent(y, C, cpu=_tiled_nearest, default=_dense_nearest).astype(jnp.int32)


def lookup(C: Float[Array, "G K d"], z: Shaped[Array, "*tokens G"]) -> Float[Array, "*tokens G d"]:
    """C[g, z_g], the codewords that codes stand for."""
    return jax.vmap(lambda codewords, k: codewords[k], in_axes=(0, -1), out_axes=-2)(C, z.astype(jnp.int32))


class VectorQuantizer(Quantizer):
    """A quantizer of vectors of width W in G groups of K codewords (paper section 3; grouping as in its G=1..32).

    Codebooks start from k-means (train/calibrate.py) and follow the data by EMA; dead codewords are revived. The
    paper's initialisation and update rule are not public: these are our choice.
    """

    def __init__(self, config: VQConfig, width: int):
        super().__init__(config, width)
        G, K, d = config.groups, config.codewords, config.group_width(width)
        self.width = width
        self.codebook = Codebook(jnp.zeros((G, K, d), jnp.float32))
        self.count = CodeStatistic(jnp.zeros((G, K), jnp.float32))
        self.total = CodeStatistic(jnp.zeros((G, K, d), jnp.float32))
        self.residual_mean = CodeStatistic(jnp.zeros((width,), jnp.float32))
        self.residual_var = CodeStatistic(jnp.zeros((width,), jnp.float32))

    def in_groups(self, y: Float[Array, "*tokens W"]) -> Float[Array, "*tokens G d"]:
        """A vector as its groups."""
        return y.reshape(*y.shape[:-1], self.groups, -1)

    def encode(self, y: Float[Array, "*tokens W"]) -> UInt16[Array, "*tokens G"]:
        """z = argmin_k ||y_g - C[g,k]|| per group (paper section 3)."""
        y = self.in_groups(y)
        return nearest(y.reshape(-1, *y.shape[-2:]), self.codebook[...]).reshape(y.shape[:-1]).astype(jnp.uint16)

    def coordinates(self, z: UInt16[Array, "*tokens G"], groups: Groups | None = None) -> Float[Array, "*more W"]:
        return self._first(lookup(self.codebook[...], z).reshape(*z.shape[:-1], self.width), groups)

    def moments(self, groups: Int[Array, ""] | None = None) -> Float[Array, "2 W"]:
        return self._first(jnp.stack([self.residual_mean[...], self.residual_var[...]]), groups)

    def _first(self, u: Float[Array, "*tokens W"], groups: Groups | None) -> Float[Array, "*more W"]:
        """The same with zeros behind the first `groups` groups."""
        if groups is None:
            return u
        return jnp.where(jnp.arange(self.width) < jnp.asarray(groups)[..., None] * (self.width // self.groups), u, 0)

    def calibrate(
        self, y: Float[np.ndarray, "M W"], metric: Float[np.ndarray, "W W"], fit: Fit, depth: Int[np.ndarray, "M 1"]
    ) -> Calibrated:
        estimate = fit(self, y, (self.width // self.groups,) * self.groups, level=0, principal=False)
        return Calibrated(estimate, estimate)

    def counts(self) -> Float[Array, "*L G K"]:
        return self.count[...]

    def products(self, rows: Float[Array, "W width"]) -> Float[Array, "G K width"]:
        C = self.codebook[...]
        return jnp.einsum("gkd,gdf->gkf", C, rows.reshape(C.shape[0], C.shape[2], -1), precision="highest")

    def observe(
        self, y: Float[Array, "B S W"], z: UInt16[Array, "B S G"], key: Key[Array, ""], mask: Bool[Array, "*B S"]
    ) -> Observation:
        """The statistics of a batch; only tokens where `mask` is True count."""
        G, K, d = self.codebook[...].shape
        y = y.astype(jnp.float32)
        fixed = jax.lax.stop_gradient(y)
        weight = jnp.broadcast_to(mask, y.shape[:2]).astype(jnp.float32)  # [B,S]
        tokens = jnp.maximum(weight.sum(), 1.0)
        estimate = self.coordinates(z)
        residual = fixed - estimate
        mean = jnp.einsum("bsd,bs->d", residual, weight) / tokens
        vectors, codes = fixed.reshape(-1, G, d), z.reshape(-1, G).astype(jnp.int32)
        ones = weight.reshape(-1)
        draw = jax.random.choice(key, ones.size, (K,), p=ones)
        commitment = jnp.einsum("bsd,bs->", (y - estimate) ** 2, weight) / tokens
        power = jnp.einsum("bsd,bs->", fixed**2, weight) / tokens
        scatter = jax.vmap(partial(jax.ops.segment_sum, num_segments=K), in_axes=(1, 1))
        return Observation(
            count=scatter(jnp.broadcast_to(ones[:, None], codes.shape), codes),
            total=scatter(vectors * ones[:, None, None], codes),
            residual_mean=mean,
            residual_var=jnp.einsum("bsd,bs->d", (residual - mean) ** 2, weight) / tokens,
            candidates=vectors[draw].transpose(1, 0, 2),
            commitment=commitment,
            error=jax.lax.stop_gradient(commitment) / jnp.maximum(power, 1e-12),
            surprise=power,
        )

    def follow(self, seen: Observation, decay: float, revive_below: float) -> None:
        """Moves codebook and residual statistics towards what was seen (in place; stacked blocks work alike).

        EMA of shares and sums per token, `C = total / count`; a codeword whose count falls below `revive_below` times
        the mean count of its group is replaced by a vector of the batch and given the mean count.
        """

        def ema(old: Array, new: Array) -> Array:
            return decay * old + (1 - decay) * new

        # Per token, so that a batch of any size, or the calibration set, weighs the same.
        tokens = jnp.maximum(seen.count.sum(-1, keepdims=True), 1.0)
        count = ema(self.count[...], seen.count / tokens)
        total = ema(self.total[...], seen.total / tokens[..., None])
        mean_count = jnp.mean(count, axis=-1, keepdims=True)
        dead = (count < revive_below * mean_count)[..., None]
        count = jnp.where(dead[..., 0], mean_count, count)
        total = jnp.where(dead, seen.candidates * mean_count[..., None], total)
        self.count[...], self.total[...] = count, total
        self.codebook[...] = total / jnp.maximum(count, 1e-12)[..., None]
        self.residual_mean[...] = ema(self.residual_mean[...], seen.residual_mean)
        self.residual_var[...] = ema(self.residual_var[...], seen.residual_var)
