"""The mesh, and how the tokens of a sequence are split over it."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jaxtyping import Array, Float, Int, Shaped

from astra_jax.errors import AstraError

DATA = "data"  # the batch is split over this axis
SEQ = "seq"  # the tokens are split over this axis: N devices

MOST_CPU_DEVICES = 256  # that are made on demand: each has threads of its own, and thousands take all memory

CLASSES = ("class", "second class")  # class tokens that heads read; there may be more, such as registers
Pooling = Literal["class", "mean", "last"]  # what a configuration may say that a head reads
# What a head may read: see `Shards.weights`; or all tokens by attention of its own, see `Strategy.attend`.
Reading = Pooling | Literal["second class", "input", "attention"]
Table = Array | np.ndarray  # a numpy table is known when a program is traced, and becomes a constant of it


def parse_devices(text: str) -> tuple[int, int]:
    """Reads `--devices`: `"4"` is (1, 4), four shards of the tokens; `"2x4"` is (2, 4), two batches of four shards."""
    match = re.fullmatch(r"(?:([0-9]{1,9})x)?([0-9]{1,9})", text.strip())
    data, seq = (int(match[1] or 1), int(match[2])) if match else (0, 0)
    if data < 1 or seq < 1:
        raise AstraError(
            f"devices is {text!r}; write N for N shards of the tokens or DxN for D batches of N shards: try 4 or 2x4"
        )
    return data, seq


def make_mesh(seq: int, data: int = 1, *, to_run: bool = True) -> Mesh:
    """A (data, seq) mesh over `data * seq` devices.

    On the CPU of one host the devices are made on demand, which works only before JAX has started its backend. Of
    several hosts, all devices are used, and the last shards are on host 0, where the user is: so the end of a prompt,
    from which a language model goes on, is there.

    Args:
      to_run: False where programs are compiled for the mesh, but not run. Where there are too few accelerators, CPU
        devices do for that: what a program sends is the same.

    Raises:
      AstraError: there are fewer devices, or several hosts have more; the message says how many and what to do.
    """
    wanted = data * seq
    several = jax.distributed.is_initialized()
    try:
        # Only the CPU backend reads this; an accelerator's devices are what they are.
        if not several and jax.config.jax_num_cpu_devices < wanted <= MOST_CPU_DEVICES:  # type: ignore[attr-defined]
            jax.config.update("jax_num_cpu_devices", wanted)
    except RuntimeError:
        pass  # the backend is running: its device count, checked below, is final
    devices = jax.devices()
    if several:
        if len(devices) != wanted:
            raise AstraError(
                f"{data} x {seq} devices were asked for, but the {jax.process_count()} hosts have {len(devices)}: "
                f"use --devices {len(devices)}"
            )
        devices = sorted(devices, key=lambda device: (device.process_index == 0, device.process_index, device.id))
        return Mesh(np.reshape(devices, (seq, data)).T, (DATA, SEQ), axis_types=(AxisType.Auto,) * 2)
    if len(devices) < wanted and not to_run:
        devices = jax.devices("cpu")
    if len(devices) < wanted:
        others = "set JAX_PLATFORMS=cpu, or let `astra eval` do it with --virtual"
        if devices[0].platform == "cpu":
            others = f'call jax.config.update("jax_num_cpu_devices", {wanted}) before any other use of JAX'
        raise AstraError(
            f"{data} x {seq} devices were asked for, but JAX has {len(devices)} ({devices[0].platform}): use fewer, or "
            + others
        )
    return jax.make_mesh((data, seq), (DATA, SEQ), devices=devices[:wanted], axis_types=(AxisType.Auto,) * 2)


def put(array: Any, sharding: Any) -> Array:
    """An array that this host has as a whole, on the devices of a sharding. Each host fills its own; nothing moves."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return array  # in place already
    return jax.make_array_from_callback(array.shape, sharding, lambda index: np.asarray(array)[index])


class Tokens(NamedTuple):
    """What attention has to know of the tokens in a row of slots, besides their contents."""

    shard: Shaped[Table, "*B S"]  # which shard a slot belongs to
    position: Shaped[Table, "*B S"]  # place in the sequence
    valid: Shaped[Table, "*B S"]  # False for padding
    sent: Shaped[Table, "*B S"]  # False for what stays on its device


@dataclasses.dataclass(frozen=True)
class Shards:
    """A split of the tokens of a sequence into N contiguous shards, each padded to the same S slots.

    With class tokens every shard has a slot more for each at its head. Under `distributed` all N shards hold replicas
    that stay at home; under `single` only shard 0's are in use, and they are sent like any other token.

    Attributes:
      lengths: tokens in every shard, class tokens not counted; they may differ. A tuple of N numbers is the same split
        for every sequence of a batch; an array [B,N], which may be traced, is one split per sequence.
      slots: S; None for the longest shard of a tuple.
      longest: of an array, tokens that a sequence may have; None of a tuple.
      most: of an array, tokens that each shard may have; None where that is S.
      class_token: `distributed`, `single`, or None for a family that has none.
      causal: whether a token sees only itself and those before it.
      class_count: class tokens of a sequence, where there are any: all that are no part of the input.

    Raises:
      AstraError: a shard of a tuple would be empty.
    """

    lengths: tuple[int, ...] | Int[Array, "B N"]
    class_token: str | None = None
    slots: int | None = None
    causal: bool = False
    longest: int | None = None
    class_count: int = 1
    most: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.lengths, tuple) and min(self.lengths, default=0) < 1:
            raise AstraError(
                f"{sum(self.lengths)} tokens cannot be split over {len(self.lengths)} devices: "
                f"use at most {max(1, sum(self.lengths))} devices"
            )

    @classmethod
    def split(cls, T: int, N: int, class_token: str | None = None, class_count: int = 1) -> "Shards":
        """Splits T tokens over N devices as evenly as can be, the longer shards last.

        Raises:
          AstraError: a device would get no token.
        """
        return cls(_known(T, np.ones(N, int)), class_token, class_count=class_count)

    @classmethod
    def ragged(
        cls, lengths: Int[Array, "B"], T: int, N: int, class_token: str | None = None, causal: bool = False
    ) -> "Shards":
        """Splits every sequence of a batch, padded to T, on its own: each as if it were alone.

        What cannot be split evenly goes to the last shards, so that the end of every sequence is in the last one. A
        sequence with fewer than N tokens leaves the first shards empty.
        """
        even = np.ones(N, int)
        return cls(_parts(lengths, even), class_token, -(-T // N), causal, T, most=_most(T, even))

    def in_proportion(self, speeds: Sequence[float]) -> "Shards":
        """The same tokens, split anew in proportion to how fast the devices are: of a batch every sequence on its own.

        That is our choice: the paper has an experiment on unequal devices, but no method.

        Raises:
          AstraError: a device would get no token; there are not N speeds, or one is not above 0.
        """
        weights = _weights(self.N, speeds)
        if self.longest is not None:
            lengths, most = _parts(jnp.asarray(self.lengths).sum(-1), weights), _most(self.longest, weights)
            return dataclasses.replace(self, lengths=lengths, slots=max(most), most=most)
        lengths = _known(self.T, weights)
        if min(lengths) < 1:
            raise AstraError(
                f"of {self.T} tokens device {lengths.index(0)}, with speed {speeds[lengths.index(0)]:g}, would get "
                "none: leave it out"
            )
        return dataclasses.replace(self, lengths=lengths)

    def without_replicas(self) -> "Shards":
        """The same with class tokens, if there are any, that are tokens like any other."""
        return dataclasses.replace(self, class_token="single" if self.class_token else None)

    @property
    def N(self) -> int:
        """Devices on the sequence axis."""
        return np.shape(self.lengths)[-1]

    @property
    def T(self) -> int:
        """Tokens in a sequence, class tokens not counted. Only of a tuple of lengths."""
        assert isinstance(self.lengths, tuple)
        return sum(self.lengths)

    @property
    def S(self) -> int:
        """Slots of a shard for the tokens that the input has, class tokens not counted."""
        if self.slots is not None:
            return self.slots
        assert isinstance(self.lengths, tuple)
        return max(self.lengths)

    @property
    def unused(self) -> tuple[int, ...]:
        """Slots at the end of every shard that hold no token of any sequence."""
        most = self.lengths if isinstance(self.lengths, tuple) else self.most or (self.S,) * self.N
        return tuple(self.S - one for one in most)

    @property
    def class_slots(self) -> int:
        """Slots at the head of every shard for class tokens."""
        return self.class_count if self.class_token is not None else 0

    @property
    def home_slots(self) -> int:
        """Leading slots of every shard whose codes are never sent."""
        return self.class_slots if self.class_token == "distributed" else 0

    @property
    def sent_slots(self) -> int:
        """Slots whose codes every device sends in every block, padding included."""
        return self.class_slots + self.S - self.home_slots

    @property
    def even(self) -> bool:
        """Whether shards differ by one token at most, the longer ones last."""
        if isinstance(self.lengths, tuple):
            return self.lengths[-1] - self.lengths[0] <= 1 and sorted(self.lengths) == list(self.lengths)
        return -(-(self.longest or 0) // self.N) == self.S

    @property
    def all_see_all(self) -> bool:
        """Whether no mask is needed: every slot is a token that all others see, and that is known without the input."""
        even = isinstance(self.lengths, tuple) and set(self.lengths) == {self.S}
        return even and not self.causal and (self.class_token != "single" or self.N == 1)

    @property
    def _np(self) -> Any:
        """numpy where the split is known, so that masks are constants of a program."""
        return np if isinstance(self.lengths, tuple) else jnp

    def used(self) -> Int[Table, "*B N 1"]:
        """Tokens in every shard, class tokens not counted."""
        return self._np.asarray(self.lengths)[..., None]

    def index(self) -> Int[Table, "*B N S"]:
        """The token in every slot; padding repeats the last token of its shard."""
        lengths = self.used()
        return lengths.cumsum(-2) - lengths + self._np.minimum(np.arange(self.S), (lengths - 1).clip(0))

    def tokens(self) -> Tokens:
        """The attributes of all slots, class tokens included: arrays [*B, N, class_slots + S], or without B."""
        lengths, shard, places = self.used(), np.arange(self.N)[:, None], np.arange(self.class_slots)
        valid = np.arange(self.S) < lengths
        position = self.index() + self.class_slots
        sent = np.ones((self.N, self.class_slots + self.S), bool)
        if self.class_token is not None:
            # A replica counts where there are tokens, and on the last shard, lest a text without any has none.
            distributed = (lengths > 0) | (shard == self.N - 1)
            head = distributed if self.class_token == "distributed" else 0 * lengths + shard == 0
            valid = self._np.concatenate([head & (places >= 0), valid], axis=-1)
            position = self._np.concatenate([0 * position[..., :1] + places, position], axis=-1)
            sent[:, : self.home_slots] = False
        return Tokens(np.broadcast_to(shard, sent.shape), position, valid, sent)

    def weights(self, reading: Reading) -> Float[Table, "*B N slots"]:
        """What every slot weighs in the state that a head reads.

        `class` is the mean of the first class tokens in use, `second class` that of the second ones, `mean` that of all
        tokens, `input` that of all but class tokens, and `last` is the last token.
        """
        valid = self.tokens().valid
        slots = np.arange(valid.shape[-1])
        if reading in CLASSES:
            used = valid & (slots == CLASSES.index(reading))
        elif reading == "input":
            used = valid & (slots >= self.class_slots)
        elif reading == "mean":
            used = valid
        else:
            slot = np.arange(self.S) + self.S * np.arange(self.N)[:, None]
            last = self.S * (self.N - 1) + self.used()[..., -1:, :] - 1
            used = slot == last
        return used / used.sum((-2, -1), keepdims=True)

    def scatter(self, x: Shaped[Array, "B T *feature"]) -> Shaped[Array, "B slots *feature"]:
        """[B,T,...] -> [B,N*S,...]: puts tokens into the slots of their shards."""
        if isinstance(self.lengths, tuple):
            if x.shape[1] != self.T:
                raise AstraError(f"the input has {x.shape[1]} tokens; the split {self.lengths} is for {self.T}")
            if len(set(self.lengths)) == 1:
                return x
            return jnp.take(x, self.index().reshape(-1), axis=1)
        return _take(x, self.index().reshape(x.shape[0], -1))

    def gather(self, x: Shaped[Array, "B slots *feature"], T: int) -> Shaped[Array, "B T *feature"]:
        """[B,N*S,...] -> [B,T,...]: back into the order of the sequence; beyond a sequence's end it repeats tokens."""
        lengths = jnp.broadcast_to(self.used()[..., 0], (x.shape[0], self.N))
        ends = lengths.cumsum(-1)
        t = jnp.arange(T)
        shard = jnp.minimum((t[:, None] >= ends[:, None, :]).sum(-1), self.N - 1)  # [B,T]
        return _take(x, shard * self.S + t - jnp.take_along_axis(ends - lengths, shard, axis=1))


def _weights(N: int, speeds: Sequence[float]) -> Int[np.ndarray, "N"]:
    """Speeds as whole numbers, thousandths of the greatest, so that all who split tokens by them round alike."""
    if len(speeds) != N:
        raise AstraError(f"{len(speeds)} speeds were given for {N} devices: give one for each")
    for speed in speeds:
        if not 0 < speed < np.inf:
            raise AstraError(f"a device's speed is {speed:g}; it must be above 0: leave the device out, or give 0.5")
    return np.ceil(1000 * np.asarray(speeds) / max(speeds)).astype(int)


def _parts(T: Any, weights: Int[np.ndarray, "N"]) -> Any:
    """[*B] -> [*B,N]: T tokens in N parts in proportion to whole weights, rounded down; the last parts get 1 more."""
    parts, N = T[..., None] * weights // weights.sum(), len(weights)
    return parts + (np.arange(N) >= N - (T[..., None] - parts.sum(-1, keepdims=True)))


def _most(T: int, weights: Int[np.ndarray, "N"]) -> tuple[int, ...]:
    """The most tokens that each part has of any sequence of up to T."""
    return tuple(int(n) for n in _parts(np.arange(T + 1), weights).max(0))


def _known(T: int, weights: Int[np.ndarray, "N"]) -> tuple[int, ...]:
    """The same of one length that is known."""
    return tuple(int(n) for n in _parts(np.asarray(T), weights))


def _take(x: Shaped[Array, "B M *feature"], index: Int[Table, "B T"]) -> Shaped[Array, "B T *feature"]:
    """Row by row, `x[b, index[b]]`; an index that is out of bounds takes the last."""
    return jax.vmap(lambda row, places: jnp.take(row, places, axis=0, mode="clip"))(x, index)
