"""What a way to run a model costs its devices, whatever the link: operations, seconds, and what they send."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from astra_jax.errors import AstraError
from astra_jax.serving.compile import STRATEGIES
from astra_jax.strategies.base import Message
from eval.cost.flops import flops
from eval.cost.timing import compute_seconds, share
from eval.cost.workload import Setting, Workload
from eval.network.devices import Devices


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


def cost(work: Workload, setting: Setting, devices: Devices, flops_per_second: float) -> Cost:
    """What a setting costs its N devices, of which one of speed 1 does `flops_per_second`."""
    work_done = device_flops(work, setting, devices)
    seconds = devices.seconds(work_done, flops_per_second)
    return Cost(setting, work_done, seconds, predicted_messages(work, setting, devices))


def share_flops(work: Workload, setting: Setting, N: int | None = None) -> int:
    """Operations of one device of N (by default the setting's N) in a forward pass."""
    mine = share(work.abstract(setting.groups), N or setting.N, work.inputs(), setting.make)
    return flops(mine.run, *mine.arguments)


def measured_flops_per_second(work: Workload, model: Any, setting: Setting, repeats: int) -> float:
    """Operations per second that one device reaches here in a setting, as measured so often with a model."""
    seconds = compute_seconds(model, setting.N, work.inputs(), setting.make, repeats)
    return share_flops(work, setting) / seconds


def device_flops(work: Workload, setting: Setting, devices: Devices) -> tuple[float, ...]:
    """Operations of every device; where tokens are split, in proportion to how fast they are.

    What a device computes is linear in its own tokens: projections, MLP and encoding of these, attention of these to
    all, projections of all others. So two even splits tell it for any share. Where tables have codewords counted,
    attention to others does not become less with more tokens of one's own. Then it is quadratic, and takes three.

    Raises:
      AstraError: there are too few tokens for the finest of these splits, of 2 N or 4 N shards.
    """
    from scipy.interpolate import barycentric_interpolate

    N, strategy = setting.N, STRATEGIES[setting.strategy]
    if devices.equal or not strategy.splits_tokens:
        return (float(share_flops(work, setting)),) * N
    counted = strategy.folds and setting.groups == 1 and work.astra.codewords < work.T
    splits = (N, 2 * N, 4 * N) if counted else (N, 2 * N)
    least = splits[-1]
    if least > work.T:
        raise AstraError(f"{work.T} tokens are too few for {N} unequal devices: use at least {least}, or equal devices")
    shards = devices.split(work.abstract(setting.groups).shards(N, work.inputs()))
    lengths = np.asarray(shards.lengths).reshape(-1)
    even = [share_flops(work, setting, n) for n in splits]
    found = barycentric_interpolate([1 / n for n in splits], even, lengths / lengths.sum())
    return tuple(map(float, found))


def predicted_messages(work: Workload, setting: Setting, devices: Devices) -> tuple[Message, ...]:
    """What one device sends. Messages are padded to the longest shard, for which all wait."""
    model = work.abstract(setting.groups)
    strategy = setting.make(model, setting.N, work.inputs())
    if strategy.splits_tokens:
        strategy = dataclasses.replace(strategy, shards=devices.split(strategy.shards))
    return tuple(strategy.messages(model))


def check_split(work: Workload, ways: Iterable[Setting], devices: Devices) -> None:
    """Raises AstraError, before anything is measured, for a model that cannot be run in one of these ways.

    Args:
      devices: all there are, of which a way uses the N fastest.
    """
    for way in ways:
        if work.T < way.N:
            raise AstraError(f"{work.T} tokens cannot be split over {way.N} devices: use at most {work.T} devices")
        predicted_messages(work, way, devices.fastest(way.N))
