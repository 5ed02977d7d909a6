"""Who sees whom: every mask of attention is made here, and knows the block that it is for."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from astra_jax.codecs.config import Kind
from astra_jax.mesh.sharding import Shards, Tokens


class Block(NamedTuple):
    """A block of the stack, as masks and strategies need to know it.

    Attributes:
      number: its place, 0..L-1; may be traced.
      kind: what devices know of each other's tokens in it (`AstraConfig.schedule`).
      window: a query sees tokens that are fewer places away than this; None for all. May be traced.
    """

    number: Any
    kind: Kind = "coded"
    window: Any = None


Windows = tuple[int | None, ...]  # of every block, as `Block.window`

_ALL = 2**30  # wider than any sequence


def window_at(windows: Windows | None, number: Any) -> Any:
    """`Block.window` of a block, whose number may be traced; known where all blocks have the same."""
    if windows is None or len(set(windows)) == 1:
        return windows and windows[0]
    return jnp.asarray(np.array([_ALL if window is None else window for window in windows], np.int32))[number]


def sees(queries: Tokens, keys: Tokens, causal: bool, block: Block) -> Bool[Array, "*B queries keys"]:
    """Which keys a query can attend to: real tokens within its window, and in a decoder none that comes after it."""
    mask, away = keys.valid[..., None, :], queries.position[..., :, None] - keys.position[..., None, :]
    if causal:
        mask = mask & (away >= 0)
    if block.window is not None:
        mask = mask & (abs(away) < block.window)
    return jnp.asarray(mask)


def all_see_all(shards: Shards, block: Block) -> bool:
    """Whether no mask is needed, which is known without the input."""
    return shards.all_see_all and block.window is None


def local(shards: Shards, tokens: Tokens, block: Block) -> Bool[Array, "*B queries keys"] | None:
    """Which tokens of its own shard a query sees; None where it sees all."""
    return None if all_see_all(shards, block) else sees(tokens, tokens, shards.causal, block)


def remote(shards: Shards, queries: Tokens, keys: Tokens, block: Block) -> Bool[Array, "*B queries keys"]:
    """Which tokens of other shards a query sees, among those that are sent."""
    sent = sees(queries, keys, shards.causal, block) & jnp.asarray(keys.sent[..., None, :])
    theirs, mine = keys.shard[..., None, :], queries.shard[..., :, None]
    return sent & jnp.asarray(theirs < mine if shards.causal else theirs != mine)


def one_query_says_all(block: Block) -> bool:
    """Whether all queries of a shard see the same remote tokens: shards are contiguous, so that a remote one lies
    wholly before a query, or wholly after it. A window may end within a shard."""
    return block.window is None
