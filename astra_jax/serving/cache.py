"""The mixed-precision KV cache: own tokens exactly, remote ones as codes; and the strategy that decodes from it."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from astra_jax.models.attention import Kept, Source
from astra_jax.strategies.base import Remote, Strategy


class Cache(NamedTuple):
    """What decoding needs of B texts.

    Attributes:
      key, value: of own tokens, at their places in the sequence; M slots, of which the first `own` are in use.
      own: tokens in these slots.
      position: place of the next token in the sequence.
      codes: of remote tokens, or with a predictor the estimates that they led to; None where one device has seen the
        whole prompt.
      remote_position, remote_valid: place of every remote token, and whether there is one.
    """

    key: Float[Array, "L B M J E"]
    value: Float[Array, "L B M J E"]
    own: Int[Array, "B"]
    position: Int[Array, "B"]
    codes: Shaped[Array, "L B R _"] | None
    remote_position: Int[Array, "B R"] | None
    remote_valid: Bool[Array, "B R"] | None

    @property
    def room(self) -> tuple[int, int]:
        """(M, R): for how many own tokens of a text there is room, and for how many remote ones."""
        return self.key.shape[2], 0 if self.codes is None else self.codes.shape[2]

    def with_room(self, M: int, R: int) -> "Cache":
        """The same with room for so many; never less than before."""
        more = M - self.room[0]

        def pad(a: Any, axis: int, by: int) -> Any:
            return None if a is None else jnp.pad(a, [(0, by * (n == axis)) for n in range(a.ndim)])

        return self._replace(
            key=pad(self.key, 2, more),
            value=pad(self.value, 2, more),
            codes=pad(self.codes, 2, R - self.room[1]),
            remote_position=pad(self.remote_position, 1, R - self.room[1]),
            remote_valid=pad(self.remote_valid, 1, R - self.room[1]),
        )

    def append(self, kept: Kept) -> "Cache":
        """With one more own token in every text."""

        def put(slots: Float[Array, "L M J E"], new: Float[Array, "L J E"], at: Int[Array, ""]) -> Array:
            return slots.at[:, at].set(new, mode="drop")

        # Row by row, so that rows on different devices stay apart.
        in_rows = jax.vmap(put, in_axes=(1, 1, 0), out_axes=1)
        return self._replace(
            key=in_rows(self.key, kept.key[:, :, 0], self.own),
            value=in_rows(self.value, kept.value[:, :, 0], self.own),
            own=self.own + 1,
            position=self.position + 1,
        )

    def by_row(self, function: Callable[..., Any], *others: "Cache") -> "Cache":
        """`function(array, *others' arrays, axis of the rows)` of every array."""
        by_block = {"key", "value", "codes"}
        found: list[Any] = [
            None if arrays[0] is None else function(*arrays, int(name in by_block))
            for name, *arrays in zip(self._fields, self, *others, strict=True)
        ]
        return Cache(*found)


@dataclasses.dataclass(frozen=True)
class Decode(Strategy):
    """The strategy of one new token per text: it sees itself, the own tokens of the cache, and the remote ones."""

    cache: Cache
    keep = True

    def positions(self) -> Int[Array, "B 1"]:
        return self.cache.position[:, None]

    def exchange(self, codec: Any, y: Array, carry: Any, block: Any) -> tuple[Remote | None, Any, None]:
        cache = self.cache
        if cache.codes is None:
            return None, carry, None
        assert cache.remote_position is not None and cache.remote_valid is not None
        return Remote(cache.codes[block], cache.remote_position, cache.remote_valid[:, None, :]), carry, None

    def cached(self, block: Any) -> list[Source]:
        cache = self.cache
        mask = jnp.arange(cache.key.shape[2]) < cache.own[:, None, None]
        return [Source(cache.key[block], cache.value[block], mask)]

    def local_mask(self) -> Bool[Array, "1 1"]:
        return jnp.ones((1, 1), bool)


class Memory(NamedTuple):
    """Bytes of the remote tokens in a cache: of their codes, and of the keys and values that they stand for."""

    codes: int
    key_value: int


def memory(cache: Cache) -> Memory:
    """What codes save; nothing where no token is remote."""
    if cache.codes is None:
        return Memory(0, 0)
    L, B, R, _ = cache.codes.shape
    J, E = cache.key.shape[3:]
    return Memory(cache.codes.nbytes, 2 * L * B * R * J * E * cache.key.dtype.itemsize)
