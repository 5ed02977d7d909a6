"""Codes along axes that calibration finds, level by level: the first groups are a code by themselves (our choice)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, Shaped, UInt16

from astra_jax.codecs.axes import principal_axes
from astra_jax.codecs.base import Calibrated, Fit, Groups, Observation, Quantizer, Rotation
from astra_jax.codecs.config import NestedPQConfig, VQConfig
from astra_jax.codecs.product import VectorQuantizer
from astra_jax.errors import AstraError


class Observations(NamedTuple):
    """What a batch tells about a quantizer of several levels: of each of them, and of what all together leave."""

    levels: tuple[Observation, ...]
    commitment: Float[Array, "*L"]
    error: Float[Array, "*L"]
    surprise: Float[Array, "*L"]


class NestedQuantizer(Quantizer):
    """A quantizer of the axes of y along which errors of keys and values cost most: `nested-pq` (our choice).

    `u = (y - mean) A` are uncorrelated, and attention's error is about that of u, so that axes with little variance can
    be left out: `y^ = mean + u^ B` is the best linear estimate from the others. Consecutive axes, in the order of their
    variance, form groups, as many axes as `NestedPQConfig.widths` says, padded with zeros to the widest.

    With one level the groups have about as many bits, and the first m of them are a code of the axes that they have.
    With several, each level codes what those before it left of all axes (residual quantization), so that already the
    first, of one group, is as good a code as its bits allow. codecs/axes.py finds A, B and the widths.
    """

    rotates = True

    def __init__(self, config: NestedPQConfig, width: int):
        super().__init__(config, width)
        self.widths = config.level_widths
        self.width = A = max(map(sum, self.widths))
        if width < A:
            raise AstraError(f"widths are {A} axes together, more than the quantized width {width}")
        self.mean = Rotation(jnp.zeros((width,), jnp.float32))
        self.analysis = Rotation(jnp.zeros((width, A), jnp.float32))
        self.synthesis = Rotation(jnp.zeros((A, width), jnp.float32))
        parts = [(VQConfig(groups=len(w), codewords=config.codewords), len(w) * max(w)) for w in self.widths]
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

    def coordinates(self, z: UInt16[Array, "*tokens G"], groups: Groups | None = None) -> Float[Array, "*more A"]:
        u: Any = 0.0
        for level, widths, places in self.each():
            first = None if groups is None else groups - places.start
            u = u + unpadded(level.coordinates(z[..., places], first), widths, self.width)
        return u

    def calibrate(
        self, y: Float[np.ndarray, "M W"], metric: Float[np.ndarray, "W W"], fit: Fit, depth: Int[np.ndarray, "M 1"]
    ) -> Calibrated:
        axes = principal_axes(y, metric)
        self.mean[...] = jnp.asarray(axes.mean, jnp.float32)
        self.analysis[...] = jnp.asarray(axes.analysis[:, : self.width], jnp.float32)
        self.synthesis[...] = jnp.asarray(axes.synthesis[: self.width], jnp.float32)
        u = left = np.asarray(self.axes(jnp.asarray(y)))
        missing = u.copy()
        for number, (level, widths, _) in enumerate(self.each()):
            left = left - fit(level, left, widths, level=number, principal=True)
            np.copyto(missing, left, where=number < depth)
        found = (np.asarray(self.from_coordinates(jnp.asarray(u - rest))) for rest in (left, missing))
        return Calibrated(*found)

    def moments(self, groups: Int[Array, ""] | None = None) -> Float[Array, "2 A"]:
        """As of the last group that an axis is in, among those that are used."""
        found, used = jnp.zeros((2, self.width)), self.groups if groups is None else groups
        for level, widths, places in self.each():
            has = places.start + np.repeat(np.arange(len(widths)), widths) < used
            has = jnp.pad(jnp.asarray(has), (0, self.width - sum(widths)))
            found = jnp.where(has, unpadded(level.moments(), widths, self.width), found)
        return found

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
