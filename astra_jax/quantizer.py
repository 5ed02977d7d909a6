"""Codecs: what turns an embedding into the integer codes that cross the link, and codes into an estimate of it."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, UInt16

from astra_jax import wire
from astra_jax.config import AstraConfig
from astra_jax.predictor import Known, Predictor

TILE = 2**20  # scores that are held at once on a CPU: larger tiles leave the cache and run three to ten times slower


class Codebook(nnx.Variable):
    """Codewords C [G, K, D/G]. They follow the data by EMA, never by gradient (our choice)."""


class CodeStatistic(nnx.Variable):
    """Running statistics of codes and residuals, float32 whatever the model computes in."""


class Rotation(nnx.Variable):
    """The axes of a rotated quantizer, float32. Calibration finds them; training leaves them as they are."""


class Observation(NamedTuple):
    """What a batch tells about a quantizer (leading axes, such as blocks, are allowed everywhere).

    All of it is about the vectors `u = axes(y)` that are quantized, of width G*d: y itself, or rotated.

    Attributes:
      count: how often every codeword was chosen.
      total: sum of the vectors that chose it.
      residual_mean, residual_var: moments of `u - u^` per dimension.
      candidates: vectors of the batch, one for every codeword, to revive dead codewords with.
      commitment: mean over tokens of `||u - sg(u^)||^2`, which is differentiable.
      error: the same over the mean of `||u||^2`, a number between 0 (exact) and about 1.
    """

    count: Float[Array, "*L G K"]  # type: ignore[assignment]  # hides tuple.count
    total: Float[Array, "*L G K d"]
    residual_mean: Float[Array, "*L Gd"]
    residual_var: Float[Array, "*L Gd"]
    candidates: Float[Array, "*L G K d"]
    commitment: Float[Array, "*L"]
    error: Float[Array, "*L"]


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


class VectorQuantizer(nnx.Module):
    """A quantizer of vectors of width D in G groups of K codewords (paper section 3; grouping as in its G=1..32).

    Codebooks start from k-means (train/calibrate.py) and follow the data by EMA; dead codewords are revived. The
    paper's initialisation and update rule are not public: these are our choice.
    """

    def __init__(self, config: AstraConfig, width: int):
        G, K, d = config.groups, config.codewords, config.group_width(width)
        self.bits = config.bits
        self.codebook = Codebook(jnp.zeros((G, K, d), jnp.float32))
        self.count = CodeStatistic(jnp.zeros((G, K), jnp.float32))
        self.total = CodeStatistic(jnp.zeros((G, K, d), jnp.float32))
        self.residual_mean = CodeStatistic(jnp.zeros((width,), jnp.float32))
        self.residual_var = CodeStatistic(jnp.zeros((width,), jnp.float32))
        self.predictor: Predictor | None = nnx.data(None)

    @property
    def groups(self) -> int:
        """G."""
        return int(self.codebook.shape[-3])

    def wire_bits(self, S: int) -> int:
        """Bits that one device sends per block for S tokens: S * G * log2(K), rounded up to whole bytes."""
        return 8 * wire.packed_bytes(S * self.groups, self.bits)

    def predict(self, carry: Any) -> Any:
        """What is expected before a block's codes arrive: [...,D], or [D] of any token; 0 without a predictor.

        Args:
          carry: the estimate of the block before; for the first block what is `Known`.
        """
        if self.predictor is None:
            return 0.0
        if not isinstance(carry, Known):
            return self.predictor(carry)
        return self.predictor.bias[...] if carry.vectors is None else carry.vectors

    def axes(self, y: Float[Array, "*tokens D"]) -> Float[Array, "*tokens G d"]:
        """u: what is quantized, in its groups. Here that is y itself."""
        return y.reshape(*y.shape[:-1], self.groups, -1)

    def from_axes(self, u: Float[Array, "*tokens G d"]) -> Float[Array, "*tokens D"]:
        """The vectors that some u stand for."""
        return u.reshape(*u.shape[:-2], -1)

    def encode(self, y: Float[Array, "B S D"]) -> UInt16[Array, "B S G"]:
        """z = argmin_k ||u_g - C[g,k]|| (DESIGN: codes)."""
        u = self.axes(y)
        return nearest(u.reshape(-1, *u.shape[-2:]), self.codebook[...]).reshape(u.shape[:-1]).astype(jnp.uint16)

    def lookup(self, z: UInt16[Array, "*tokens G"]) -> Float[Array, "*tokens G d"]:
        """u^ = C[g, z_g]."""
        return jax.vmap(lambda C, k: C[k], in_axes=(0, -1), out_axes=-2)(self.codebook[...], z.astype(jnp.int32))

    def decode(self, z: UInt16[Array, "*tokens G"], groups: Int[Array, ""] | None = None) -> Float[Array, "*tokens D"]:
        """y^, what the codes stand for; with `groups` only the first so many, as for whoever gets no more of them."""
        return self.from_axes(self._first(self.lookup(z), groups))

    def _first(self, u: Float[Array, "*tokens G d"], groups: Int[Array, ""] | None) -> Float[Array, "*tokens G d"]:
        return u if groups is None else jnp.where(jnp.arange(self.groups)[:, None] < groups, u, 0)

    def noise(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
        """xi ~ N(mu_r, diag Sigma_r), the running moments of the residual (Noise-Augmented Quantization)."""
        return self.residual_mean[...] + jnp.sqrt(self.residual_var[...]) * jax.random.normal(key, shape)

    def straight_through(
        self,
        y: Float[Array, "B S D"],
        z: UInt16[Array, "B S G"],
        key: Key[Array, ""],
        noise: float,
        groups: Int[Array, ""] | None = None,
    ) -> Float[Array, "B S D"]:
        """y^ + noise * xi, with gradients passing straight through to y (NAVQ; the paper's best `noise` is 1)."""
        u = self.lookup(z)
        u = u + noise * self.noise(key, (*u.shape[:-2], u.shape[-2] * u.shape[-1])).reshape(u.shape)
        return y + jax.lax.stop_gradient(self.from_axes(self._first(u, groups)).astype(y.dtype) - y)

    def observe(
        self, y: Float[Array, "B S D"], z: UInt16[Array, "B S G"], key: Key[Array, ""], mask: Bool[Array, "*B S"]
    ) -> Observation:
        """The statistics of a batch; only tokens where `mask` is True count."""
        G, K, d = self.codebook[...].shape
        u = self.axes(y.astype(jnp.float32)).reshape(*y.shape[:2], G * d)
        fixed = jax.lax.stop_gradient(u)
        weight = jnp.broadcast_to(mask, y.shape[:2]).astype(jnp.float32)  # [B,S]
        tokens = jnp.maximum(weight.sum(), 1.0)
        estimate = self.lookup(z).reshape(u.shape)
        residual = fixed - estimate
        mean = jnp.einsum("bsd,bs->d", residual, weight) / tokens
        vectors, codes = fixed.reshape(-1, G, d), z.reshape(-1, G).astype(jnp.int32)
        ones = weight.reshape(-1)
        draw = jax.random.choice(key, ones.size, (K,), p=ones)
        commitment = jnp.einsum("bsd,bs->", (u - estimate) ** 2, weight) / tokens
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


class RotatedQuantizer(VectorQuantizer):
    """A quantizer of the axes of y along which errors of keys and values cost most: `codec="rotated-pq"` (our choice).

    `u = (y - mean) A` are uncorrelated, and attention's error is about that of u, so that axes with little variance can
    be left out: `y^ = mean + u^ B` is the best linear estimate from the others. Consecutive axes, in the order of their
    variance, form groups of about log2(K) bits each, as many axes as `AstraConfig.widths` says, padded with zeros to
    the widest. So the first m groups are a coarser code by themselves. train/rotation.py finds A, B and the widths.
    """

    def __init__(self, config: AstraConfig, width: int):
        G, d = config.groups, config.group_width(width)
        super().__init__(config, G * d)
        self.mean = Rotation(jnp.zeros((width,), jnp.float32))
        self.analysis = Rotation(jnp.zeros((width, G, d), jnp.float32))  # A
        self.synthesis = Rotation(jnp.zeros((G, d, width), jnp.float32))  # B

    def axes(self, y: Float[Array, "*tokens D"]) -> Float[Array, "*tokens G d"]:
        """u = (y - mean) A."""
        y = y.astype(jnp.float32) - self.mean[...]
        return jnp.einsum("...i,igd->...gd", y, self.analysis[...], precision="highest")

    def from_axes(self, u: Float[Array, "*tokens G d"]) -> Float[Array, "*tokens D"]:
        """mean + u B."""
        return self.mean[...] + jnp.einsum("...gd,gdi->...i", u, self.synthesis[...])


CODECS: dict[str, type[VectorQuantizer]] = {"vq": VectorQuantizer, "rotated-pq": RotatedQuantizer}


def make_codec(config: AstraConfig, width: int) -> VectorQuantizer:
    """The codec that a configuration asks for, for vectors of a width."""
    codec = CODECS[config.codec](config, width)
    if config.predictor != "none":
        codec.predictor = Predictor(config, width)
    return codec


class Usage(NamedTuple):
    """How well codewords are used, per group: `used` is the share of codewords in use (0..1), `perplexity` is
    exp(entropy) of the code distribution (1..K), `entropy_bits` its base-2 entropy (0..log2 K)."""

    used: Float[Array, "*G"]
    perplexity: Float[Array, "*G"]
    entropy_bits: Float[Array, "*G"]


def usage(count: Float[Array, "*G K"]) -> Usage:
    """Usage statistics from how often every codeword is chosen."""
    p = count / jnp.maximum(count.sum(-1, keepdims=True), 1e-12)
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0), axis=-1)
    used = jnp.mean(count > 1e-3 * jnp.mean(count, axis=-1, keepdims=True), axis=-1)
    return Usage(used, jnp.exp(entropy), entropy / jnp.log(2.0))
