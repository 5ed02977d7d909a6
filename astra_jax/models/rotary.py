"""Rotary position embeddings (RoPE, arXiv 2104.09864), with the scalings that Llama's configurations use."""

import dataclasses
import math
from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from astra_jax.codecs.config import LARGEST
from astra_jax.errors import AstraError

# `dynamic` changes nothing up to `max_position_embeddings`, beyond which no sequence is accepted.
ROPE_TYPES = ("default", "dynamic", "linear", "llama3", "longrope", "yarn")
# Above what, and up to what, a number may be, so that frequencies in float32 are numbers (our choice).
BOUNDS = {
    "rope_theta": (1, 1e15),
    **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor", "attention_factor"), (1e-6, 1e9)),
    **dict.fromkeys(("beta_fast", "beta_slow"), (1e-6, 1e9)),
    **dict.fromkeys(("mscale", "mscale_all_dim"), (-1e-6, 1e9)),  # 0 is none
    "partial_rotary_factor": (0, 1),
    "llama_4_scaling_beta": (-1e-6, 1e3),
    "original_max_position_embeddings": (-1, LARGEST),
}


@dataclasses.dataclass(frozen=True)
class Rotary:
    """A rotary embedding, under the names of Hugging Face's `rope_parameters`.

    Attributes:
      rope_type: `default`; `linear` divides all frequencies by `factor`; `llama3` divides the low ones, between the
        wavelengths `original_max_position_embeddings / high_freq_factor` and `/ low_freq_factor` smoothly; `yarn`
        (arXiv 2309.00071) ramps between frequencies that turn `beta_fast` and `beta_slow` times; `longrope`
        (arXiv 2402.13753) divides each by its `short_factor`.
      rope_theta: base of the frequencies.
      attention_factor: what YaRN and LongRoPE scale queries and keys with; None for their formulas.
      short_factor: of every pair, up to `original_max_position_embeddings` tokens.
      long_factor: of every pair in longer texts, which no model here takes.
      llama_4_scaling_beta: queries grow with it by the logarithm of how many times `original_max_position_embeddings`
        they are from the start (Ministral 3); None for none.
      partial_rotary_factor: which part of a head is turned, from its front; the rest has no positions.

    Raises:
      AstraError: a type that is not known, or one that lacks a value, or a value out of its range.
    """

    rope_type: str = "default"
    rope_theta: float = 10_000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    partial_rotary_factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    llama_4_scaling_beta: float | None = None

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise AstraError(f"config.json: rope_type is {self.rope_type!r}; known are {', '.join(ROPE_TYPES)}")
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not low < value <= high:
                raise AstraError(
                    f"config.json: {name} of the rotary embedding is {value}; it must be above {low} and at most "
                    f"{high:g}"
                )
        if not all(1e-6 < factor < 1e9 for factor in (*self.short_factor, *self.long_factor)):
            raise AstraError("config.json: a short_factor or long_factor of the rotary embedding is not above 0")
        needs = self.rope_type in ("llama3", "longrope", "yarn") or self.llama_4_scaling_beta is not None
        if needs and self.original_max_position_embeddings < 1:
            raise AstraError(f"config.json: rope_type {self.rope_type} needs original_max_position_embeddings")
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise AstraError(
                f"config.json: low_freq_factor is {self.low_freq_factor} and high_freq_factor "
                f"{self.high_freq_factor}; the second must be greater"
            )

    def frequencies(self, E: int) -> Float[np.ndarray, "pairs"]:
        """Radians per position of every pair of dimensions of a head that is turned."""
        E = int(E * self.partial_rotary_factor)
        plain = (1.0 / self.rope_theta ** (np.arange(0, E, 2, dtype=np.float32) / E)).astype(np.float32)
        slow = plain / np.float32(self.factor)
        if self.rope_type == "longrope":
            if len(self.short_factor) != len(plain):
                raise AstraError(
                    f"config.json: short_factor of the rotary embedding has {len(self.short_factor)} numbers for "
                    f"{len(plain)} pairs of a head"
                )
            return plain / np.asarray(self.short_factor, np.float32)
        if self.rope_type == "linear":
            return slow
        if self.rope_type == "llama3":
            turns = self.original_max_position_embeddings * plain / (2 * math.pi)
            share = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        elif self.rope_type == "yarn":
            share = 1 - self._yarn_ramp(E)
        else:
            return plain
        share = np.clip(share, 0, 1).astype(np.float32)
        return share * plain + (1 - share) * slow

    def _yarn_ramp(self, E: int) -> Float[np.ndarray, "pairs"]:
        """0 for the dimensions that stay as they are, 1 for those that are interpolated."""

        def dimension(turns: float) -> float:
            """The dimension that turns so often over the original context."""
            ratio = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return E * math.log(ratio) / (2 * math.log(self.rope_theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, E - 1)
        return (np.arange(E // 2) - low) / (high - low if high != low else 0.001)

    @property
    def scale(self) -> float:
        """What YaRN and LongRoPE scale cosine and sine with; 1 for the other types."""
        if self.rope_type not in ("longrope", "yarn"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.rope_type == "longrope":
            more = math.log(max(1.0, self.factor)) / math.log(max(2, self.original_max_position_embeddings))
            return math.sqrt(1 + more)

        def mscale(weight: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * weight * math.log(self.factor) + 1.0

        if self.mscale and self.mscale_all_dim:
            return mscale(self.mscale) / mscale(self.mscale_all_dim)
        return mscale(1.0)

    def __call__(
        self, x: Float[Array, "B R heads E"], position: Any, number: Any = None
    ) -> Float[Array, "B R heads E"]:
        """Turns every head of x by `position` [R] or [B,R]. The number of the block makes no difference."""
        return _turn(x, position, self.frequencies(x.shape[-1]), self.scale)

    def of_query(self, x: Float[Array, "B S heads E"], position: Any) -> Float[Array, "B S heads E"]:
        """Turned queries as longer texts need them."""
        if self.llama_4_scaling_beta is None:
            return x
        times = jnp.floor(jnp.asarray(position) / self.original_max_position_embeddings)
        return x * (1 + self.llama_4_scaling_beta * jnp.log1p(times))[..., None, None].astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class RotaryByBlock:
    """A rotary embedding for every block; None in it for one without positions."""

    blocks: tuple[Rotary | None, ...]

    def of_query(self, x: Float[Array, "B S heads E"], position: Any) -> Float[Array, "B S heads E"]:
        """Turned queries, as they are: no family with several rotary embeddings has it otherwise."""
        return x

    def __call__(self, x: Float[Array, "B R heads E"], position: Any, number: Any) -> Float[Array, "B R heads E"]:
        """Turns every head of x as block `number` does, which may be traced."""
        some = next(rotary for rotary in self.blocks if rotary)
        still = 0 * some.frequencies(x.shape[-1])
        frequencies = [still if rotary is None else rotary.frequencies(x.shape[-1]) for rotary in self.blocks]
        scales = np.array([1.0 if rotary is None else rotary.scale for rotary in self.blocks], np.float32)
        return _turn(x, position, jnp.asarray(np.stack(frequencies))[number], jnp.asarray(scales)[number])


def _turn(x: Float[Array, "B R heads E"], position: Any, frequencies: Any, scale: Any) -> Float[Array, "B R heads E"]:
    """Turns the pairs (e, e + E/2) of the front of every head by `position` [R] or [B,R] times frequency."""
    angle = jnp.asarray(position)[..., None, None] * frequencies  # [*B,R,1,pairs]
    cos, sin = scale * jnp.cos(angle), scale * jnp.sin(angle)
    front, rest = jnp.split(x, [2 * frequencies.shape[-1]], axis=-1)
    first, second = jnp.split(front.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return turned if rest.shape[-1] == 0 else jnp.concatenate([turned, rest], axis=-1)


def check_rotary(rotary: Rotary, E: int, allowed: Collection[str] = ()) -> None:
    """Raises AstraError where a rotary embedding does not fit heads of width E, or has what a family does not compute.

    Args:
      allowed: what of `partial_rotary_factor`, `longrope` and `llama_4_scaling_beta` the family computes.
    """
    if E % 2:
        raise AstraError(f"config.json: heads are {E} wide; rotary embeddings need an even width")
    part = rotary.partial_rotary_factor
    if part != 1 and "partial_rotary_factor" not in allowed:
        raise AstraError(
            f"config.json: partial_rotary_factor is {part!r}; only 1 is supported: whole heads are rotated"
        )
    if rotary.rope_type == "longrope" and "longrope" not in allowed:
        raise AstraError("config.json: rope_type longrope is not supported in this family")
    if rotary.llama_4_scaling_beta is not None and "llama_4_scaling_beta" not in allowed:
        raise AstraError("config.json: llama_4_scaling_beta is of Ministral 3 alone: remove it")
    rotary.frequencies(E)  # raises where its numbers do not fit heads of this width


def by_block(blocks: tuple[Rotary | None, ...]) -> Rotary | RotaryByBlock | None:
    """Rotary embeddings of all blocks, as one where they are the same."""
    return blocks[0] if len(set(blocks)) == 1 else RotaryByBlock(blocks)
