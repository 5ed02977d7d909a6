"""What a way to run a model costs its devices, whatever the link: operations, seconds, and what they send."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from astra_jax.errors import AstraError
from astra_jax.serving.compile import STRATEGIES
from astra_jax.strategies.base import Message
from eval.cost.flops import flops
from eval.cost.timing import compute_seconds, share
from eval.cost.workload import Setting, Workload

FASTEST = 1e6  # of relative speeds


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a forward pass costs the devices, whatever the link.

    Attributes:
      setting: how it is run.
      flops: operations of each device.
      compute: seconds of each device.
      messages: what one device sends.
    """

    setting: Setting
    flops: tuple[float, ...]
    compute: tuple[float, ...]
    messages: tuple[Message, ...]

    @property
    def bits(self) -> int:
        """All bits that one device gives to collectives."""
        return sum(m.bits * m.times for m in self.messages)


def cost(work: Workload, setting: Setting, speeds: Sequence[float], flops_per_second: float) -> Cost:
    """What a setting costs: of every device `flops / (speed * flops_per_second)` seconds.

    Args:
      speeds: of the N devices, relative to the one that does `flops_per_second`.
    """
    work_done = device_flops(work, setting, speeds)
    seconds = tuple(n / (speed * flops_per_second) for n, speed in zip(work_done, speeds, strict=True))
    return Cost(setting, work_done, seconds, predicted_messages(work, setting, speeds))


def share_flops(work: Workload, setting: Setting, N: int | None = None) -> int:
    """Operations of one device of N (by default the setting's N) in a forward pass."""
    mine = share(work.abstract(setting.groups), N or setting.N, work.inputs(), setting.make)
    return flops(mine.run, *mine.arguments)


def measured_flops_per_second(work: Workload, model: Any, setting: Setting, repeats: int) -> float:
    """Operations per second that one device reaches here in a setting, as measured so often with a model."""
    seconds = compute_seconds(model, setting.N, work.inputs(), setting.make, repeats)
    return share_flops(work, setting) / seconds


def device_flops(work: Workload, setting: Setting, speeds: Sequence[float]) -> tuple[float, ...]:
    """Operations of every device; where tokens are split, in proportion to speeds.

    What a device computes is linear in its own tokens: projections, MLP and encoding of these, attention of these to
    all, projections of all others. So two even splits tell it for any share. Where tables have codewords counted,
    attention to others does not become less with more tokens of one's own. Then it is quadratic, and takes three.

    Raises:
      AstraError: there are too few tokens for the finest of these splits, of 2 N or 4 N shards.
    """
    from scipy.interpolate import barycentric_interpolate

    N, strategy = setting.N, STRATEGIES[setting.strategy]
    if len(set(speeds)) == 1 or not strategy.splits_tokens:
        return (float(share_flops(work, setting)),) * N
    counted = strategy.folds and setting.groups == 1 and work.astra.codewords < work.T
    splits = (N, 2 * N, 4 * N) if counted else (N, 2 * N)
    least = splits[-1]
    if least > work.T:
        raise AstraError(f"{work.T} tokens are too few for {N} unequal devices: use at least {least}, or equal devices")
    shards = work.abstract(setting.groups).shards(N, work.inputs(), tuple(speeds))
    lengths = np.asarray(shards.lengths).reshape(-1)
    even = [share_flops(work, setting, n) for n in splits]
    found = barycentric_interpolate([1 / n for n in splits], even, lengths / lengths.sum())
    return tuple(map(float, found))


def predicted_messages(work: Workload, setting: Setting, speeds: Sequence[float]) -> tuple[Message, ...]:
    """What one device sends. Messages are padded to the longest shard, for which all wait."""
    model, inputs = work.abstract(setting.groups), work.inputs()
    strategy = setting.make(model, setting.N, inputs)
    if strategy.splits_tokens:
        shards = model.shards(setting.N, inputs, tuple(speeds))
        shards = dataclasses.replace(shards, class_token=strategy.shards.class_token)
        strategy = dataclasses.replace(strategy, shards=shards)
    return tuple(strategy.messages(model))


def check_split(work: Workload, ways: Iterable[Setting], speeds: Sequence[float]) -> None:
    """Raises AstraError, before anything is measured, for a model that cannot be run in one of these ways.

    Args:
      speeds: of all devices, of which a way uses the N fastest.
    """
    for way in ways:
        if work.T < way.N:
            raise AstraError(f"{work.T} tokens cannot be split over {way.N} devices: use at most {work.T} devices")
        predicted_messages(work, way, fastest(speeds, way.N))


def check_speeds(speeds: tuple[float, ...], N: int) -> tuple[float, ...]:
    """The speeds, or N times 1 where none are given. Raises AstraError unless there are N numbers above 0."""
    speeds = speeds or (1.0,) * N
    if len(speeds) != N:
        raise AstraError(f"--speeds has {len(speeds)} numbers for {N} devices: give one for each")
    for speed in speeds:
        if not 1 / FASTEST <= speed <= FASTEST:
            raise AstraError(
                f"--speeds has {speed:g}; a speed is above 0, from {1 / FASTEST:g} to {FASTEST:g}: leave it "
                "out, or give 0.5, say"
            )
    return speeds


def fastest(speeds: Sequence[float], N: int) -> tuple[float, ...]:
    """The speeds of the N fastest devices, in the order in which they were given."""
    chosen = sorted(range(len(speeds)), key=lambda n: -speeds[n])[:N]
    return tuple(speeds[n] for n in sorted(chosen))
