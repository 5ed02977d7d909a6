"""Every collective of the project: nothing else crosses the link.

Each function names the shapes before and after on one device; N is the size of the mesh axis `axis`.
They work only inside `jax.shard_map`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8


def shard_index(axis: str) -> Int[Array, ""]:
    """[] -> []: which shard this device holds, 0..N-1. Sends nothing."""
    return jax.lax.axis_index(axis)


def others(axis: str) -> Int[Array, "others"]:
    """[] -> [N-1]: the shards of the other devices, the next one first, in ring order. Sends nothing."""
    N = jax.lax.axis_size(axis)
    return (shard_index(axis) + 1 + jnp.arange(N - 1)) % N


def gather_codes(packed: UInt8[Array, "B bytes"], axis: str) -> UInt8[Array, "others B bytes"]:
    """[B, bytes] -> [N-1, B, bytes]: the packed codes of every other device, in the order of `others`.

    Every device sends its own `B * bytes` bytes: this is the only exchange inside the network.
    """
    return jax.lax.all_gather(packed, axis)[others(axis)]


def sum_over_shards(x: Float[Array, "..."], axis: str) -> Float[Array, "..."]:
    """[...] -> [...]: the sum over the devices, on every device (the mean of class states, once per forward pass)."""
    return jax.lax.psum(x, axis)
