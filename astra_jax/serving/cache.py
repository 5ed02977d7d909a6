"""The mixed-precision KV cache: own tokens exactly, remote ones as codes; and the strategy that decodes from it."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from astra_jax.mesh.sharding import Reading, Tokens
from astra_jax.models import mask
from astra_jax.models.interface import Codes, Content, Exchanged, Kept, Remote, Report, Source
from astra_jax.models.mask import Block
from astra_jax.strategies.base import Whole


class Cache(NamedTuple):
    """What decoding needs of B texts.

    Attributes:
      key, value: of own tokens, at their places in the sequence; M slots, of which the first `own` are in use.
      own: tokens in these slots.
      position: place of the next token in the sequence.
      content: what came of remote tokens: codes, or with a predictor the estimates that they led to; None where one
        device has seen the whole prompt.
      remote_position, remote_valid: place of every remote token, and whether there is one.
    """

    key: Float[Array, "L B M J E"]
    value: Float[Array, "L B M J E"]
    own: Int[Array, "B"]
    position: Int[Array, "B"]
    content: Content | None
    remote_position: Int[Array, "B R"] | None
    remote_valid: Bool[Array, "B R"] | None

    @property
    def room(self) -> tuple[int, int]:
        """(M, R): for how many own tokens of a text there is room, and for how many remote ones."""
        return self.key.shape[2], 0 if self.content is None else self.content[0].shape[2]

    def with_room(self, M: int, R: int) -> "Cache":
        """The same with room for so many; never less than before."""
        more = M - self.room[0]

        def pad(arrays: Any, axis: int, by: int) -> Any:
            return jax.tree.map(lambda a: jnp.pad(a, [(0, by * (n == axis)) for n in range(a.ndim)]), arrays)

        return self._replace(
            key=pad(self.key, 2, more),
            value=pad(self.value, 2, more),
            content=pad(self.content, 2, R - self.room[1]),
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
        by_block = {"key", "value", "content"}
        found: list[Any] = [
            jax.tree.map(partial(_last, function, int(name in by_block)), *arrays)
            for name, *arrays in zip(self._fields, self, *others, strict=True)
        ]
        return Cache(*found)


def _last(function: Callable[..., Any], axis: int, *arrays: Any) -> Any:
    """`function(*arrays, axis)`."""
    return function(*arrays, axis)


@dataclasses.dataclass(frozen=True)
class Decode(Whole):
    """The strategy of one new token per text: it sees itself, the own tokens of the cache, and the remote ones."""

    cache: Cache
    keep = True

    def positions(self) -> Int[Array, "B 1"]:
        return self.cache.position[:, None]

    def tokens(self) -> Tokens:
        """The new token, which is in the shard behind all others."""
        position = self.positions()
        there = jnp.ones_like(position, bool)
        return Tokens(jnp.ones_like(position), position, there, there)

    def prepend_class(self, cls: Shaped[Array, "*B k D"], x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """A text that goes on has no class token."""
        return x

    def pool(self, x: Float[Array, "B S D"], *readings: Reading) -> Float[Array, "B D"]:
        """The state of the only token."""
        return x[:, -1]

    def exchange(self, codec: Any, y: Array, estimate: Any, block: Block) -> Exchanged:
        cache = self.cache
        if cache.content is None:
            return Exchanged(None, estimate, Report())
        assert cache.remote_position is not None and cache.remote_valid is not None
        content = jax.tree.map(lambda a: a[block.number], cache.content)
        position, there = cache.remote_position, cache.remote_valid
        if isinstance(content, Codes) and content.groups is not None:
            there = there & (content.groups > 0)
        seen = mask.sees(self.tokens(), Tokens(jnp.zeros_like(position), position, there, there), True, block)
        return Exchanged(Remote(content, position, seen), estimate, Report())

    def cached(self, block: Block) -> list[Source]:
        cache = self.cache
        slot = jnp.arange(cache.key.shape[2])
        there, position = slot < cache.own[:, None], (cache.position - cache.own)[:, None] + slot
        seen = mask.sees(self.tokens(), Tokens(jnp.ones_like(position), position, there, there), True, block)
        return [Source(cache.key[block.number], cache.value[block.number], seen)]

    def local_mask(self, block: Block) -> Bool[Array, "1 1"]:
        return jnp.ones((1, 1), bool)


class Memory(NamedTuple):
    """Bytes of the remote tokens in a cache: of their codes, and of the keys and values that they stand for."""

    codes: int
    key_value: int


def memory(cache: Cache) -> Memory:
    """What codes save; nothing where no token is remote."""
    if cache.content is None:
        return Memory(0, 0)
    L, B, R, _ = cache.content[0].shape
    J, E = cache.key.shape[3:]
    return Memory(cache.content[0].nbytes, 2 * L * B * R * J * E * cache.key.dtype.itemsize)
