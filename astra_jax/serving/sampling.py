"""How the next token is drawn: per row, from its own seed and its own place in its text."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from astra_jax.errors import AstraError

TEMPERATURES = (1e-6, 1e6)  # beyond these, float32 makes infinities of logits, or nothing of their differences
SEEDS = 2**32


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token of one text is drawn, in this order.

    Raises:
      AstraError: a value is of another type, or outside its range.
    """

    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Draw among the k likeliest tokens only; 0 for all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have at least this probability."""
    seed: int = 0
    """Seed of the drawing; of several prompts each has the next one."""

    def __post_init__(self) -> None:
        low, high = TEMPERATURES
        if not is_number(self.temperature) or not (self.temperature == 0 or low <= self.temperature <= high):
            raise AstraError(
                f"--temperature is {self.temperature}; it must be 0 (greedy), or from {low:f} to {high:,.0f}: try 0.8"
            )
        if not is_whole(self.top_k) or self.top_k < 0:
            raise AstraError(f"--top-k is {self.top_k}; it must be 0 (all tokens) or more: try 40")
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise AstraError(f"--top-p is {self.top_p}; it must be above 0 and at most 1: try 0.9")
        if not is_whole(self.seed) or not 0 <= self.seed < SEEDS:
            raise AstraError(f"--seed is {self.seed}; it must be from 0 to {SEEDS - 1}")

    @property
    def work(self) -> int:
        """What drawing takes: 0 the likeliest token, 1 all tokens, 2 some of them, which have to be sorted."""
        if self.temperature == 0:
            return 0
        return 1 if self.top_k == 0 and self.top_p == 1 else 2


def is_whole(value: Any) -> bool:
    """Whether it is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a finite number, and no bool."""
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def seeded(sampling: Sampling, B: int) -> list[Sampling]:
    """The same for B rows, each with the next seed, so that equal prompts go on in different ways."""
    return [dataclasses.replace(sampling, seed=(sampling.seed + row) % SEEDS) for row in range(B)]


class Draws(NamedTuple):
    """How the next token of every row is drawn: `Sampling` as arrays, and how many tokens of it were drawn before."""

    temperature: Float[Array | np.ndarray, "B"]
    top_k: Int[Array | np.ndarray, "B"]
    top_p: Float[Array | np.ndarray, "B"]
    seed: UInt32[Array | np.ndarray, "B"]
    place: Int[Array | np.ndarray, "B"]

    @classmethod
    def of(cls, rows: Sequence[Sampling]) -> "Draws":
        """The first tokens of these rows."""
        return cls(
            np.asarray([row.temperature for row in rows], np.float32),
            np.asarray([min(row.top_k, 2**31 - 1) for row in rows], np.int32),
            np.asarray([row.top_p for row in rows], np.float32),
            np.asarray([row.seed for row in rows], np.uint32),
            np.zeros(len(rows), np.int32),
        )


def restrict(logits: Float[Array, "B V"], top_k: Int[Array, "B"], top_p: Float[Array, "B"]) -> Float[Array, "B V"]:
    """The logits of tokens that may be drawn, as in `Sampling`; -inf for all others."""
    k, p = top_k[:, None], top_p[:, None]
    ordered, place = jnp.sort(logits, axis=-1, descending=True), jnp.arange(logits.shape[-1])
    stays = (place < k) | (k == 0)  # no `lax.top_k`, which would bring rows of all devices together
    likely = jax.nn.softmax(jnp.where(stays, ordered, -jnp.inf), axis=-1)
    # A token stays if those before it have not reached top_p yet; the likeliest always does.
    stays = stays & ((likely.cumsum(-1) - likely < p) | (p >= 1) | (place == 0))
    smallest = jnp.min(jnp.where(stays, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < smallest, -jnp.inf, logits)


def draw(logits: Float[Array, "B V"], draws: Draws, work: Any) -> Int[Array, "B"]:
    """Draws the next token of every row.

    Args:
      work: the most that any row takes (`Sampling.work`). It is no part of the program, which does not do more than
        that: to sort a vocabulary takes longer than some models take for a token.
    """

    def likeliest(logits: Array) -> Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def drawn(logits: Array, restricted: bool) -> Array:
        greedy = draws.temperature == 0
        warm = logits / jnp.where(greedy, 1, draws.temperature)[:, None]
        warm = restrict(warm, jnp.asarray(draws.top_k), jnp.asarray(draws.top_p)) if restricted else warm
        keys = jax.vmap(lambda seed, place: jax.random.fold_in(jax.random.key(seed), place))(draws.seed, draws.place)
        found = jax.vmap(jax.random.categorical)(keys, warm).astype(jnp.int32)
        return jnp.where(greedy, likeliest(logits), found)

    return jax.lax.switch(work, [likeliest, lambda a: drawn(a, False), lambda a: drawn(a, True)], logits)
