"""The mesh, and how the tokens of a sequence are split over it."""

import dataclasses
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jaxtyping import Array, Bool, Int, Shaped

from astra_jax.errors import AstraError

DATA = "data"  # the batch is split over this axis
SEQ = "seq"  # the tokens are split over this axis: N devices


def parse_devices(text: str) -> tuple[int, int]:
    """Reads `--devices`: `"4"` is (1, 4), four shards of the tokens; `"2x4"` is (2, 4), two batches of four shards."""
    match = re.fullmatch(r"(?:(\d+)x)?(\d+)", text.strip())
    data, seq = (int(match[1] or 1), int(match[2])) if match else (0, 0)
    if data < 1 or seq < 1:
        raise AstraError(
            f"devices is {text!r}; write N for N shards of the tokens or DxN for D batches of N shards: try 4 or 2x4"
        )
    return data, seq


def make_mesh(seq: int, data: int = 1) -> Mesh:
    """A (data, seq) mesh over `data * seq` devices.

    On the CPU the devices are made on demand, which works only before JAX has started its backend.

    Raises:
      AstraError: there are fewer devices; the message says how many and what to do.
    """
    wanted = data * seq
    try:
        # Only the CPU backend reads this; an accelerator's devices are what they are.
        if jax.config.jax_num_cpu_devices < wanted:  # type: ignore[attr-defined]
            jax.config.update("jax_num_cpu_devices", wanted)
    except RuntimeError:
        pass  # the backend is running: its device count, checked below, is final
    devices = jax.devices()
    if len(devices) < wanted:
        raise AstraError(
            f"{data} x {seq} devices were asked for, but JAX has {len(devices)} ({devices[0].platform}): use fewer, or "
            f'on a CPU call jax.config.update("jax_num_cpu_devices", {wanted}) before any other use of JAX'
        )
    return jax.make_mesh((data, seq), (DATA, SEQ), devices=devices[:wanted], axis_types=(AxisType.Auto,) * 2)


class Tokens(NamedTuple):
    """What attention has to know of the tokens in a row of slots, besides their contents."""

    shard: Int[Array, "S"] | Int[np.ndarray, "S"]  # which shard a slot belongs to
    position: Int[Array, "S"] | Int[np.ndarray, "S"]  # place in the sequence
    valid: Bool[Array, "S"] | Bool[np.ndarray, "S"]  # False for padding
    sent: Bool[Array, "S"] | Bool[np.ndarray, "S"]  # False for what stays on its device


@dataclasses.dataclass(frozen=True)
class Shards:
    """A split of T tokens into N contiguous shards, each padded to the same S slots.

    With a class token every shard has one more slot at its head. Under `distributed` all N of them hold a replica
    that stays at home; under `single` only shard 0's is in use, and it is sent like any other token.

    Attributes:
      lengths: tokens in every shard, class tokens not counted; they may differ.
      class_token: `distributed`, `single`, or None for a family that has none.

    Raises:
      AstraError: a shard would be empty.
    """

    lengths: tuple[int, ...]
    class_token: str | None = None

    def __post_init__(self) -> None:
        if min(self.lengths, default=0) < 1:
            raise AstraError(
                f"{sum(self.lengths)} tokens cannot be split over {len(self.lengths)} devices: "
                f"use at most {max(1, sum(self.lengths))} devices"
            )

    @classmethod
    def even(cls, T: int, N: int, class_token: str | None = None) -> "Shards":
        """Splits T tokens over N devices as evenly as can be, the longer shards first."""
        return cls(tuple(T // N + (n < T % N) for n in range(N)), class_token)

    @property
    def N(self) -> int:
        """Devices on the sequence axis."""
        return len(self.lengths)

    @property
    def T(self) -> int:
        """Tokens in the sequence, class tokens not counted."""
        return sum(self.lengths)

    @property
    def S(self) -> int:
        """Slots of a shard for the tokens that the input has, class token not counted."""
        return max(self.lengths)

    @property
    def class_slots(self) -> int:
        """Slots at the head of every shard for the class token: 0 or 1."""
        return int(self.class_token is not None)

    @property
    def home_slots(self) -> int:
        """Leading slots of every shard whose codes are never sent."""
        return int(self.class_token == "distributed")

    @property
    def sent_slots(self) -> int:
        """Slots whose codes every device sends in every block, padding included."""
        return self.class_slots + self.S - self.home_slots

    def index(self) -> Int[np.ndarray, "N S"]:
        """The token in every slot; padding repeats the last token of its shard."""
        starts = np.cumsum([0, *self.lengths[:-1]])
        return starts[:, None] + np.minimum(np.arange(self.S), np.asarray(self.lengths)[:, None] - 1)

    def tokens(self) -> Tokens:
        """The attributes of all slots, class tokens included: arrays [N, class_slots + S]."""
        valid = np.arange(self.S) < np.asarray(self.lengths)[:, None]
        position = self.index() + self.class_slots
        sent = np.ones_like(valid)
        if self.class_token is not None:
            used = np.arange(self.N) == 0 if self.class_token == "single" else np.ones(self.N, bool)
            head = used[:, None]
            valid = np.concatenate([head, valid], axis=1)
            position = np.concatenate([np.zeros_like(head, dtype=position.dtype), position], axis=1)
            sent = np.concatenate([np.full_like(head, self.home_slots == 0), sent], axis=1)
        shard = np.broadcast_to(np.arange(self.N)[:, None], valid.shape)
        return Tokens(shard, position, valid, sent)

    def class_weights(self) -> np.ndarray:
        """[N]: the weight of every shard's final class state in the pooled one."""
        used = np.asarray(self.tokens().valid[:, 0], np.float32)
        return used / used.sum()

    def scatter(self, x: Shaped[Array, "B T *feature"]) -> Shaped[Array, "B slots *feature"]:
        """[B,T,...] -> [B,N*S,...]: puts tokens into the slots of their shards."""
        if x.shape[1] != self.T:
            raise AstraError(f"the input has {x.shape[1]} tokens; the split {self.lengths} is for {self.T}")
        if len(set(self.lengths)) == 1:
            return x
        return jnp.take(x, self.index().reshape(-1), axis=1)
