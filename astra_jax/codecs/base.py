"""What all codecs have in common: an embedding becomes integer codes, and codes an estimate of it."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, UInt8, UInt16

from astra_jax.codecs import bitpacking
from astra_jax.codecs.config import AstraConfig, Kind
from astra_jax.codecs.predictor import Around, Prediction, Predictor, around

Groups = int | Int[Array, "..."]  # how many of the first groups count: of all tokens, or of each; 0 for none


class Codebook(nnx.Variable):
    """Codewords C [G, K, D/G]. They follow the data by EMA, never by gradient (our choice)."""


class CodeStatistic(nnx.Variable):
    """Running statistics of codes and residuals, float32 whatever the model computes in."""


class Rotation(nnx.Variable):
    """The axes of a rotated quantizer, float32. Calibration finds them; training leaves them as they are."""


BY_GRADIENT = nnx.Any(nnx.Param, Prediction)  # what an optimizer changes of a model; its codebooks follow the data


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


@runtime_checkable
class Tables(Protocol):
    """Keys and values of codewords or axes, computed once (`models/key_value_tables.py`)."""

    def of(self, codec: "Quantizer", z: UInt16[Array, "B R G"], groups: Groups | None = None) -> Float[Array, "B R KV"]:
        """Keys and values of tokens with these codes, or with the first `groups` of them."""


@runtime_checkable
class Fit(Protocol):
    """Finds codewords for vectors, in place (`train/calibrate.py`)."""

    def __call__(
        self, quantizer: Any, y: Float[np.ndarray, "M A"], widths: tuple[int, ...], level: int, principal: bool
    ) -> Float[np.ndarray, "M A"]:
        """What the vectors' codes then stand for. `principal`: the vectors' axes do not correlate and have no mean."""


class Calibrated(NamedTuple):
    """What receivers make of a block's vectors: of all their codes, and of those that come."""

    best: Float[np.ndarray, "M W"]
    arrived: Float[np.ndarray, "M W"]


class Quantizer(nnx.Module):
    """A codec. It makes codes of a vector (`encode`), and of codes the coordinates of an estimate (`coordinates`): the
    vector itself, or its places along axes. `from_coordinates` makes a vector of these.

    Subclasses define these three where they differ, and for training `moments`, `observe`, `follow` and `calibrate`.
    """

    rotates: ClassVar[bool] = False  # whether coordinates are along axes of its own: then it has `synthesis` and `mean`

    width: int  # coordinates of a vector

    def __init__(self, config: AstraConfig, width: int):
        self.groups, self.codewords, self.bits = config.groups, config.codewords, config.bits
        self.nested = config.nested
        self.predictor: Predictor | None = nnx.data(None if config.predictor == "none" else Predictor(config, width))

    # What is sent

    def encode(self, y: Float[Array, "*tokens W"]) -> UInt16[Array, "*tokens G"]:
        """z, the codes of a vector."""
        raise NotImplementedError

    def pack(self, z: UInt16[Array, "B S G"]) -> UInt8[Array, "B bytes"]:
        """One device's codes as they cross the link: bit-packed, token by token (`codecs/bitpacking.py`)."""
        return bitpacking.pack(z.reshape(z.shape[0], -1), self.bits)

    def unpack(self, packed: UInt8[Array, "*devices B bytes"], S: int) -> UInt16[Array, "*devices B S G"]:
        """The inverse of `pack`, of S tokens."""
        codes = bitpacking.unpack(packed, S * self.groups, self.bits)
        return codes.reshape(*codes.shape[:-1], S, self.groups)

    def wire_bits(self, S: int) -> int:
        """Bits that one device sends in a coded block for S tokens: S * G * log2(K), rounded up to whole bytes."""
        return 8 * bitpacking.packed_bytes(S * self.groups, self.bits)

    # What codes stand for

    def coordinates(self, z: UInt16[Array, "*tokens G"], groups: Groups | None = None) -> Float[Array, "*more A"]:
        """The coordinates that codes stand for; with `groups` of the first so many alone, 0 for none."""
        raise NotImplementedError

    def from_coordinates(self, u: Float[Array, "*tokens A"]) -> Float[Array, "*tokens W"]:
        """The vectors that have these coordinates. Here they are the coordinates."""
        return u

    def decode(self, z: UInt16[Array, "*tokens G"], groups: Groups | None = None) -> Float[Array, "*more W"]:
        """y^, what the codes stand for.

        Args:
          groups: how many of the first groups arrived, of every token, or of each (broadcast against `tokens`); where
            none did the result is 0. None for all.
        """
        y = self.from_coordinates(self.coordinates(z, groups))
        return y if groups is None else jnp.where(jnp.asarray(groups)[..., None] > 0, y, 0)

    def key_value(
        self,
        z: UInt16[Array, "B R G"],
        project: Callable[[Array], Array],
        tables: Tables | None,
        groups: Groups | None = None,
    ) -> Float[Array, "B R KV"]:
        """K^ and V^ of remote tokens side by side: from tables, or by projecting what their codes stand for.

        Args:
          groups: see `decode`; where codes are nothing in part, a token has all or is not looked at.
        """
        some = groups if self.nested else None
        return project(self.decode(z, some)) if tables is None else tables.of(self, z, some)

    # What devices expect of each other's tokens

    around = staticmethod(around)  # what is around every token's estimate, to be handed to `expect`

    @property
    def remembers(self) -> int:
        """W, numbers in the estimate of a token that goes on from block to block; 0 without a predictor."""
        return 0 if self.predictor is None else self.predictor.width

    def expect(self, estimate: Any, around: Around, kind: Kind = "coded") -> Any:
        """p [*tokens, W], what is expected before a block's codes arrive; 0 without a predictor.

        Args:
          estimate: of the block before; of a known block, what token ids say of it.
          around: see `Predictor`.
          kind: of the block.
        """
        if kind == "known":
            return estimate
        return 0.0 if self.predictor is None else self.predictor(estimate, around)

    def update(self, p: Any, z: UInt16[Array, "*tokens G"] | None, groups: Groups | None) -> Any:
        """The estimate after a block: what was expected, and what codes add to it; () without a predictor.

        Args:
          z: the codes; None where none were sent.
          groups: see `decode`.
        """
        if self.predictor is None:
            return ()
        return jax.lax.stop_gradient(p if z is None else p + self.decode(z, groups))

    # Training

    def calibrate(
        self, y: Float[np.ndarray, "M W"], metric: Float[np.ndarray, "W W"], fit: Fit, depth: Int[np.ndarray, "M 1"]
    ) -> Calibrated:
        """Finds what the codec needs to quantize vectors, in place.

        Args:
          metric: what an error e costs, `e metric e^T`.
          depth: how many levels of every token's codes come.
        """
        raise NotImplementedError

    def moments(self, groups: Int[Array, ""] | None = None) -> Float[Array, "2 A"]:
        """mu_r and diag Sigma_r: the running mean and variance of what codes, or the first `groups` of them, leave of
        the coordinates; 0 of those that none of them codes."""
        raise NotImplementedError

    def noise(
        self, key: Key[Array, ""], shape: tuple[int, ...], groups: Int[Array, ""] | None = None
    ) -> Float[Array, "*tokens A"]:
        """xi ~ N(mu_r, diag Sigma_r), see `moments` (Noise-Augmented Quantization)."""
        mean, variance = self.moments(groups)
        return mean + jnp.sqrt(variance) * jax.random.normal(key, shape)

    def straight_through(
        self,
        y: Float[Array, "*tokens W"],
        z: UInt16[Array, "*tokens G"],
        key: Key[Array, ""],
        noise: float,
        groups: Int[Array, ""] | None = None,
    ) -> Float[Array, "*tokens W"]:
        """y^ + noise * xi, with gradients passing straight through to y (NAVQ; the paper's best `noise` is 1)."""
        u = self.coordinates(z, groups)
        u = u + noise * self.noise(key, u.shape, groups)
        return y + jax.lax.stop_gradient(self.from_coordinates(u).astype(y.dtype) - y)

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
