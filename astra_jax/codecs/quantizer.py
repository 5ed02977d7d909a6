"""Codecs: what turns an embedding into the integer codes that cross the link, and codes into an estimate of it."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, Shaped, UInt16

from astra_jax.codecs import bitpacking
from astra_jax.codecs.config import AstraConfig
from astra_jax.codecs.predictor import Around, Known, Predictor
from astra_jax.errors import AstraError

Groups = int | Int[Array, ""]  # how many of the first groups count

TILE = 2**20  # scores that are held at once on a CPU: larger tiles leave the cache and run three to ten times slower


class Codebook(nnx.Variable):
    """Codewords C [G, K, D/G]. They follow the data by EMA, never by gradient (our choice)."""


class CodeStatistic(nnx.Variable):
    """Running statistics of codes and residuals, float32 whatever the model computes in."""


class Rotation(nnx.Variable):
    """The axes of a `RotatedQuantizer`, float32. Calibration finds them; training leaves them as they are."""


class Observation(NamedTuple):
    """What a batch tells about a quantizer (leading axes, such as blocks, are allowed everywhere).

    Attributes:
      count: how often every codeword was chosen.
      total: sum of the vectors that chose it.
      residual_mean, residual_var: moments of `u - u^` per dimension.
      candidates: vectors of the batch, one for every codeword, to revive dead codewords with.
      commitment: mean over tokens of `||u - sg(u^)||^2`, which is differentiable.
      error: the same over the mean of `||u||^2`, a number between 0 (exact) and about 1.
      surprise: mean over tokens of `||u||^2`, or with a predictor of `||y - p||^2`, differentiable in its weights.
    """

    count: Float[Array, "*L G K"]  # type: ignore[assignment]  # hides tuple.count
    total: Float[Array, "*L G K d"]
    residual_mean: Float[Array, "*L Gd"]
    residual_var: Float[Array, "*L Gd"]
    candidates: Float[Array, "*L G K d"]
    commitment: Float[Array, "*L"]
    error: Float[Array, "*L"]
    surprise: Float[Array, "*L"]


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


class Quantizer(nnx.Module):
    """What all codecs have in common: how many codes a token has, and what is expected of it before they arrive.

    A codec makes codes of a vector (`encode`), and of codes the coordinates of an estimate (`coordinates`): the vector
    itself, or its places along axes. `from_coordinates` makes a vector of these.
    """

    width: int  # coordinates of a vector

    def __init__(self, config: AstraConfig):
        self.groups, self.codewords, self.bits = config.groups, config.codewords, config.bits
        self.coded_blocks = config.coded_blocks
        self.predictor: Predictor | None = nnx.data(None)

    def encode(self, y: Float[Array, "*tokens W"]) -> UInt16[Array, "*tokens G"]:
        """z, the codes of a vector."""
        raise NotImplementedError

    def coordinates(self, z: UInt16[Array, "*tokens G"], groups: Groups | None = None) -> Float[Array, "*tokens A"]:
        """The coordinates that codes stand for; with `groups` of the first so many alone."""
        raise NotImplementedError

    def from_coordinates(self, u: Float[Array, "*tokens A"]) -> Float[Array, "*tokens W"]:
        """The vectors that have these coordinates. Here they are the coordinates."""
        return u

    def noise(
        self, key: Key[Array, ""], shape: tuple[int, ...], groups: Int[Array, ""] | None = None
    ) -> Float[Array, "*tokens A"]:
        """xi ~ N(mu_r, diag Sigma_r) with the running moments of what codes leave (Noise-Augmented Quantization)."""
        raise NotImplementedError

    def counts(self) -> Float[Array, "*L G K"]:
        """How large a share of the tokens every codeword has."""
        raise NotImplementedError

    def products(self, rows: Float[Array, "A width"]) -> Float[Array, "G K width"]:
        """What every codeword adds to the product of an estimate's coordinates with `rows`."""
        raise NotImplementedError

    def observe(
        self, y: Float[Array, "B S W"], z: UInt16[Array, "B S G"], key: Key[Array, ""], mask: Bool[Array, "*B S"]
    ) -> Any:
        """The statistics of a batch, with `commitment` and `error`; only tokens where `mask` is True count."""
        raise NotImplementedError

    def follow(self, seen: Any, decay: float, revive_below: float) -> None:
        """Moves codebooks and statistics towards what was observed (in place; stacked blocks work alike)."""
        raise NotImplementedError

    def wire_bits(self, S: int) -> int:
        """Bits that one device sends per block for S tokens: S * G * log2(K), rounded up to whole bytes."""
        return 8 * bitpacking.packed_bytes(S * self.groups, self.bits)

    def predict(self, carry: Any, around: Around) -> Any:
        """What is expected before a block's codes arrive: [...,W], or [W] of any token; 0 without a predictor.

        Args:
          carry: the estimate of the block before; for the first block what is `Known`.
          around: see `Predictor`.
        """
        if self.predictor is None:
            return 0.0
        if not isinstance(carry, Known):
            return self.predictor(carry, around)
        return self.predictor.bias[...] if carry.vectors is None else carry.vectors

    def decode(self, z: UInt16[Array, "*tokens G"], groups: Groups | None = None) -> Float[Array, "*tokens W"]:
        """y^, what the codes stand for; with `groups` only the first so many, as for whoever gets no more of them."""
        return self.from_coordinates(self.coordinates(z, groups))

    def straight_through(
        self,
        y: Float[Array, "B S W"],
        z: UInt16[Array, "B S G"],
        key: Key[Array, ""],
        noise: float,
        groups: Int[Array, ""] | None = None,
    ) -> Float[Array, "B S W"]:
        """y^ + noise * xi, with gradients passing straight through to y (NAVQ; the paper's best `noise` is 1)."""
        u = self.coordinates(z, groups)
        u = u + noise * self.noise(key, u.shape, groups)
        return y + jax.lax.stop_gradient(self.from_coordinates(u).astype(y.dtype) - y)


class VectorQuantizer(Quantizer):
    """A quantizer of vectors of width W in G groups of K codewords (paper section 3; grouping as in its G=1..32).

    Codebooks start from k-means (train/calibrate.py) and follow the data by EMA; dead codewords are revived. The
    paper's initialisation and update rule are not public: these are our choice.
    """

    def __init__(self, config: AstraConfig, width: int):
        super().__init__(config)
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
        """z = argmin_k ||y_g - C[g,k]|| (DESIGN: codes)."""
        y = self.in_groups(y)
        return nearest(y.reshape(-1, *y.shape[-2:]), self.codebook[...]).reshape(y.shape[:-1]).astype(jnp.uint16)

    def coordinates(self, z: UInt16[Array, "*tokens G"], groups: Groups | None = None) -> Float[Array, "*tokens W"]:
        return self._first(lookup(self.codebook[...], z).reshape(*z.shape[:-1], self.width), groups)

    def noise(
        self, key: Key[Array, ""], shape: tuple[int, ...], groups: Int[Array, ""] | None = None
    ) -> Float[Array, "*tokens W"]:
        xi = self.residual_mean[...] + jnp.sqrt(self.residual_var[...]) * jax.random.normal(key, shape)
        return self._first(xi, groups)

    def _first(self, u: Float[Array, "*tokens W"], groups: Groups | None) -> Float[Array, "*tokens W"]:
        """The same with zeros behind the first `groups` groups."""
        return u if groups is None else jnp.where(jnp.arange(self.width) < groups * (self.width // self.groups), u, 0)

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


class Observations(NamedTuple):
    """What a batch tells about a quantizer of several levels: of each of them, and of what all together leave."""

    levels: tuple[Observation, ...]
    commitment: Float[Array, "*L"]
    error: Float[Array, "*L"]
    surprise: Float[Array, "*L"]


class RotatedQuantizer(Quantizer):
    """A quantizer of the axes of y along which errors of keys and values cost most: `nested-pq` (our choice).

    `u = (y - mean) A` are uncorrelated, and attention's error is about that of u, so that axes with little variance can
    be left out: `y^ = mean + u^ B` is the best linear estimate from the others. Consecutive axes, in the order of their
    variance, form groups, as many axes as `AstraConfig.widths` says, padded with zeros to the widest.

    With one level the groups have about as many bits, and the first m of them are a code of the axes that they have.
    With several, each level codes what those before it left of all axes (residual quantization), so that already the
    first, of one group, is as good a code as its bits allow. train/axes.py finds A, B and the widths.
    """

    def __init__(self, config: AstraConfig, width: int):
        super().__init__(config)
        self.widths = config.level_widths
        self.width = A = max(map(sum, self.widths))
        if width < A:
            raise AstraError(f"widths are {A} axes together, more than the quantized width {width}")
        self.mean = Rotation(jnp.zeros((width,), jnp.float32))
        self.analysis = Rotation(jnp.zeros((width, A), jnp.float32))
        self.synthesis = Rotation(jnp.zeros((A, width), jnp.float32))
        parts = [(AstraConfig(groups=len(w), codewords=config.codewords), len(w) * max(w)) for w in self.widths]
        # By names, not by numbers, which are no part of a path in a checkpoint.
        self.of_level = nnx.Dict({str(number): VectorQuantizer(*part) for number, part in enumerate(parts)})

    @property
    def levels(self) -> list[VectorQuantizer]:
        """The quantizer of every level."""
        return [self.of_level[str(number)] for number in range(len(self.widths))]

    def each(self) -> list[tuple[VectorQuantizer, tuple[int, ...], slice]]:
        """Every level with the widths of its groups and their places among all groups."""
        ends = np.cumsum([len(widths) for widths in self.widths])
        places = [slice(int(end) - len(widths), int(end)) for end, widths in zip(ends, self.widths, strict=True)]
        return list(zip(self.levels, self.widths, places, strict=True))

    def axes(self, y: Float[Array, "*tokens W"]) -> Float[Array, "*tokens A"]:
        """u = (y - mean) A."""
        return jnp.matmul(y.astype(jnp.float32) - self.mean[...], self.analysis[...], precision="highest")

    def from_coordinates(self, u: Float[Array, "*tokens A"]) -> Float[Array, "*tokens W"]:
        """mean + u B."""
        return self.mean[...] + u @ self.synthesis[...]

    def encode(self, y: Float[Array, "*tokens W"]) -> UInt16[Array, "*tokens G"]:
        rest, codes = self.axes(y), []
        for level, widths, _ in self.each():
            codes.append(level.encode(padded(rest, widths)))
            rest = rest - unpadded(level.coordinates(codes[-1]), widths, self.width)
        return jnp.concatenate(codes, axis=-1)

    def coordinates(self, z: UInt16[Array, "*tokens G"], groups: Groups | None = None) -> Float[Array, "*tokens A"]:
        u: Any = 0.0
        for level, widths, places in self.each():
            first = None if groups is None else groups - places.start
            u = u + unpadded(level.coordinates(z[..., places], first), widths, self.width)
        return u

    def noise(
        self, key: Key[Array, ""], shape: tuple[int, ...], groups: Int[Array, ""] | None = None
    ) -> Float[Array, "*tokens A"]:
        """As of the last group that an axis is in, among those that are used."""
        xi, used = jnp.zeros(shape), self.groups if groups is None else groups
        for number, (level, widths, places) in enumerate(self.each()):
            of_level = level.noise(jax.random.fold_in(key, number), (*shape[:-1], level.width))
            has = places.start + np.repeat(np.arange(len(widths)), widths) < used
            has = jnp.pad(jnp.asarray(has), (0, self.width - sum(widths)))
            xi = jnp.where(has, unpadded(of_level, widths, self.width), xi)
        return xi

    def counts(self) -> Float[Array, "*L G K"]:
        return jnp.concatenate([level.count[...] for level in self.levels], axis=-2)

    def products(self, rows: Float[Array, "A width"]) -> Float[Array, "G K width"]:
        parts = [level.products(padded(rows.T, widths).T) for level, widths, _ in self.each()]
        return jnp.concatenate(parts)

    def observe(
        self, y: Float[Array, "B S W"], z: UInt16[Array, "B S G"], key: Key[Array, ""], mask: Bool[Array, "*B S"]
    ) -> Observations:
        """The statistics of a batch, of every level; only tokens where `mask` is True count."""
        u = self.axes(y)
        weight = jnp.broadcast_to(mask, u.shape[:2]).astype(jnp.float32)
        rest, seen = u, []
        for number, (level, widths, places) in enumerate(self.each()):
            codes = z[..., places]
            seen.append(level.observe(padded(rest, widths), codes, jax.random.fold_in(key, number), mask))
            rest = rest - unpadded(level.coordinates(codes), widths, self.width)
        commitment, power = (jnp.einsum("bsa,bs->", a**2, weight) for a in (rest, jax.lax.stop_gradient(u)))
        tokens = jnp.maximum(weight.sum(), 1.0)
        error = jax.lax.stop_gradient(commitment) / jnp.maximum(power, 1e-12 * tokens)
        return Observations(tuple(seen), commitment / tokens, error, power / tokens)

    def follow(self, seen: Observations, decay: float, revive_below: float) -> None:
        """Moves the codebooks of all levels (in place); see `VectorQuantizer.follow`. The axes stay."""
        for level, one in zip(self.levels, seen.levels, strict=True):
            level.follow(one, decay, revive_below)


def padded(u: Float[Array, "*tokens A"], widths: tuple[int, ...]) -> Float[Array, "*tokens Gd"]:
    """Consecutive axes in groups of these widths, with zeros up to the widest behind each; axes beyond are left out."""
    if len(set(widths)) == 1:
        return u[..., : sum(widths)]
    d, starts = max(widths), np.cumsum((0, *widths[:-1]))
    places = np.where(np.arange(d) < np.asarray(widths)[:, None], starts[:, None] + np.arange(d), -1).reshape(-1)
    return jnp.concatenate([u, jnp.zeros_like(u[..., :1])], axis=-1)[..., places]


def unpadded(u: Shaped[Array, "*tokens Gd"], widths: tuple[int, ...], A: int) -> Shaped[Array, "*tokens A"]:
    """The inverse of `padded`, with zeros for axes that are in no group, up to A."""
    places = np.concatenate([g * max(widths) + np.arange(width) for g, width in enumerate(widths)])
    if len(places) < u.shape[-1]:
        u = u[..., places]
    return jnp.pad(u, [(0, 0)] * (u.ndim - 1) + [(0, A - len(places))])


CODECS: dict[str, type[Quantizer]] = {
    "vq": VectorQuantizer,
    "nested-pq": RotatedQuantizer,
}


def make_codec(config: AstraConfig, width: int) -> Quantizer:
    """The codec that a configuration asks for, for vectors of a width."""
    codec = CODECS[config.codec](config, width)  # type: ignore[call-arg]
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
