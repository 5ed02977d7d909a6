"""Who sees whom: every mask of attention is made here, and knows the block that it is for."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool

from astra_jax.codecs.config import Kind
from astra_jax.mesh.sharding import Shards, Tokens


class Block(NamedTuple):
    """A block of the stack, as masks and strategies need to know it.

    Attributes:
      number: its place, 0..L-1; may be traced.
      kind: what devices know of each other's tokens in it (`AstraConfig.schedule`).
    """

    number: Any
    kind: Kind = "coded"


def sees(queries: Tokens, keys: Tokens, causal: bool, block: Block) -> Bool[Array, "*B queries keys"]:
    """Which keys a query can attend to: real tokens, and in a decoder none that comes after it."""
    mask = keys.valid[..., None, :]
    if causal:
        mask = mask & (keys.position[..., None, :] <= queries.position[..., :, None])
    return jnp.asarray(mask)


def local(shards: Shards, tokens: Tokens, block: Block) -> Bool[Array, "*B queries keys"] | None:
    """Which tokens of its own shard a query sees; None where it sees all."""
    return None if shards.all_see_all else sees(tokens, tokens, shards.causal, block)


def remote(shards: Shards, queries: Tokens, keys: Tokens, block: Block) -> Bool[Array, "*B queries keys"]:
    """Which tokens of other shards a query sees, among those that are sent."""
    sent = sees(queries, keys, shards.causal, block) & jnp.asarray(keys.sent[..., None, :])
    theirs, mine = keys.shard[..., None, :], queries.shard[..., :, None]
    return sent & jnp.asarray(theirs < mine if shards.causal else theirs != mine)


def one_query_says_all(block: Block) -> bool:
    """Whether all queries of a shard see the same remote tokens: shards are contiguous, so that a remote one lies
    wholly before a query, or wholly after it."""
    return True
