"""Who sees whom: every mask of attention is made here, and knows the block that it is for."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from astra_jax.codecs.config import Kind
from astra_jax.mesh.sharding import Shards, Table, Tokens


class Block(NamedTuple):
    """A block of the stack, as masks and strategies need to know it.

    Attributes:
      number: its place, 0..L-1; may be traced.
      kind: what devices know of each other's tokens in it (`AstraConfig.schedule`).
      windows: of every block of the stack, how far a query sees: tokens that are fewer places away. None for all.
      relative: what scores get by places (`mpnet.RelativePositions`); None for nothing.
    """

    number: Any
    kind: Kind = "coded"
    windows: "Windows | None" = None
    relative: Any = None

    @property
    def window(self) -> Any:
        """Of this block: a number where all blocks have the same, else traced; None where all see all."""
        if self.windows is None or len(set(self.windows)) == 1:
            return self.windows and self.windows[0]
        return jnp.asarray([_ALL if window is None else window for window in self.windows])[self.number]


Windows = tuple[int | None, ...]

_ALL = 2**30  # wider than any sequence


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


class Hop(NamedTuple):
    """What shards send to those some places further on.

    Attributes:
      by: places from the sender to the receiver; negative where that comes before.
      slots: of every shard, the slots that are sent: all that can be within reach of the receiver's queries.
    """

    by: int
    slots: Int[Table, "*B N c"]


def hops(shards: Shards, window: int | None) -> tuple[Hop, ...] | None:
    """Who has to hear what in a block with a window; None where all send everything to all.

    With h - 1 shards between them, none of which is shorter than the sender's l tokens (they are even, the longer ones
    last), a receiver's first query can see `min(l, window - 1 - (h - 1) l)` of these: at most `(window - 1) / h`,
    whatever the length of the sequence. A class token is at the front of the text, whichever shard it is in, and shards
    in proportion to speeds are not even: then all is sent. So it is where hops would be more than half of that (our
    choice: each is an exchange of its own).
    """
    if window is None or not shards.even or shards.class_slots:
        return None
    found = []
    for h in range(1, shards.N):
        counts = {h: (window - 1) // h} | ({} if shards.causal else {-h: (window - 2 + h) // h})
        found += [_hop(shards, by, min(shards.S, count)) for by, count in counts.items() if count]
    sent = sum(hop.slots.shape[-1] for hop in found)
    return tuple(found) if 2 * sent <= (shards.N - 1) * shards.S else None


def heard(shards: Shards, windows: Windows | None, everything: bool) -> Bool[np.ndarray, "L N N"]:
    """Which shard has to hear of which in every block [L, receiver, sender], or where all blocks are alike in one.

    Args:
      everything: whether a window makes no difference.
    """
    receiver, sender = np.arange(shards.N)[:, None], np.arange(shards.N)
    some = sender < receiver if shards.causal else sender != receiver
    found = []
    for window in (None,) if windows is None or everything else windows:
        near = some
        if window is not None and shards.even and not shards.class_slots:
            # Between two shards there are as many tokens as the shortest of those between them have; maybe none.
            between = np.abs(receiver - sender) - 1
            least = min(shards.lengths) if isinstance(shards.lengths, tuple) else 0
            near = some & (between * least < window - 1)
        found.append(near)
    return np.stack(found)


def _hop(shards: Shards, by: int, count: int) -> Hop:
    """The last `count` slots in use of every shard for those behind it, the first ones for those before it."""
    lengths = shards.used()
    first = lengths - count if by > 0 else 0 * lengths
    return Hop(by, (first + np.arange(count)).clip(0, shards.S - 1))


def one_query_says_all(block: Block) -> bool:
    """Whether all queries of a shard see the same remote tokens: shards are contiguous, so that a remote one lies
    wholly before a query, or wholly after it. A window may end within a shard."""
    return block.window is None
