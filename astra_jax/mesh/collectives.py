"""Every collective of the project: nothing else crosses the link.

`Peers` are the devices along a mesh axis, inside `jax.shard_map`; `Alone` is one of them whose peers are missing. Each
method names the shapes before and after on one device; N is the number of devices.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from astra_jax.mesh.sharding import DATA


def _bits(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """16-bit floats as integers: XLA's CPU backend would send them as 32-bit floats."""
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 2
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if narrow else x


def _of_bits(x: Shaped[Array, "*shape"], dtype: Any) -> Shaped[Array, "*shape"]:
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


@dataclasses.dataclass(frozen=True)
class Peers:
    """The N devices along a mesh axis. The methods work only inside `jax.shard_map`.

    Attributes:
      axis: name of the mesh axis.
    """

    axis: str

    @property
    def N(self) -> int:
        """How many devices there are."""
        return jax.lax.axis_size(self.axis)

    def index(self) -> Any:
        """[] -> []: which device this is, 0..N-1. Sends nothing."""
        return jax.lax.axis_index(self.axis)

    def others(self) -> Any:
        """[] -> [N-1]: the other devices, the next one first, in ring order. Sends nothing."""
        return (self.index() + 1 + jnp.arange(self.N - 1)) % self.N

    def gather(self, x: Shaped[Array, "*shape"]) -> Shaped[Array, "N *shape"]:
        """[...] -> [N, ...]: what every device holds, in their order. A device sends all of `x` (an all-gather)."""
        return _of_bits(jax.lax.all_gather(_bits(x), self.axis, to="invarying"), x.dtype)

    def alike(self, x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
        """[...] -> [...]: `x`, which all devices of this axis have, as something that may differ with the batch, which
        `jax.shard_map` has to know where a loop makes it so. Sends nothing."""
        return jax.lax.pcast(x, (DATA,), to="varying")

    def apart(self, x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
        """[...] -> [...]: `x`, which all devices have alike, as something in which they may differ. Sends nothing."""
        return jax.lax.pcast(x, (self.axis,), to="varying")

    def shift(self, x: Shaped[Array, "*shape"], by: int) -> Shaped[Array, "*shape"]:
        """[...] -> [...]: what the device `by` places before has; zeros where there is none (a collective-permute)."""
        pairs = [(n, n + by) for n in range(self.N) if 0 <= n + by < self.N]
        return _of_bits(jax.lax.ppermute(_bits(x), self.axis, pairs), x.dtype)

    def total(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """[...] -> [...]: the sum over the devices, on every device (an all-reduce)."""
        return jax.lax.psum(x, self.axis)

    def transpose(self, x: Shaped[Array, "*shape"], split: int, join: int) -> Shaped[Array, "*other"]:
        """Cuts axis `split` into N parts, sends part n to device n, and puts what arrives side by side on axis `join`.

        [B, N*S, D] -> [B, S, N*D] with split=1, join=2 (an all-to-all).
        """
        moved = jax.lax.all_to_all(_bits(x), self.axis, split_axis=split, concat_axis=join, tiled=True)
        return _of_bits(moved, x.dtype)


@dataclasses.dataclass(frozen=True)
class Alone:
    """The last of N devices without the others: its own messages stand in for theirs. Only for timing and counting.

    Last, because for a decoder that is the device which sees all others.
    """

    N: int

    def index(self) -> Any:
        return self.N - 1

    def others(self) -> Any:
        return jnp.arange(self.N - 1)

    def gather(self, x: Shaped[Array, "*shape"]) -> Shaped[Array, "N *shape"]:
        return jnp.broadcast_to(x, (self.N, *x.shape))

    def alike(self, x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
        return x

    def apart(self, x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
        return x

    def shift(self, x: Shaped[Array, "*shape"], by: int) -> Shaped[Array, "*shape"]:
        return x

    def total(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return x

    def transpose(self, x: Shaped[Array, "*shape"], split: int, join: int) -> Shaped[Array, "*other"]:
        part = jax.lax.slice_in_dim(x, 0, x.shape[split] // self.N, axis=split)
        return jnp.concatenate([part] * self.N, axis=join)
