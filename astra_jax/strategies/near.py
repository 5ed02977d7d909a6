"""Which devices are near each other, where some links are faster than others: these exchange more groups of codes.

The first groups of a code that is nested are a code by themselves. So every device tells all others its first
`far_groups` groups, and those near it the rest, too (our choice). What predictors go on from is of the first groups
alone, lest the estimates of two devices differ; the rest makes what attention sees better in this block.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int

from astra_jax.cli.numerals import whole
from astra_jax.codecs.quantizer import Quantizer, RotatedQuantizer
from astra_jax.errors import AstraError


@dataclasses.dataclass(frozen=True)
class Near:
    """Neighbourhoods of devices that are joined by faster links than to all others.

    Attributes:
      neighbourhoods: numbers of devices. One that is in none of them is near to nobody.
      far_groups: m, the groups of codes for devices that are not near. Those that are get all of them.

    Raises:
      AstraError: a device is in two neighbourhoods, or none has two devices.
    """

    neighbourhoods: tuple[tuple[int, ...], ...]
    far_groups: int

    def __post_init__(self) -> None:
        named = [device for devices in self.neighbourhoods for device in devices]
        for device in named:
            if named.count(device) > 1:
                raise AstraError(f"near names {device} twice: leave one of them out")
        if max(map(len, self.neighbourhoods), default=0) < 2:
            raise AstraError("near names no two that are near each other: write something like 0,1/2,3")

    def check(self, codec: Quantizer, N: int) -> None:
        """Raises AstraError where these codes have no first groups that are a code, or one of N devices is unknown."""
        if not isinstance(codec, RotatedQuantizer):
            raise AstraError("fewer groups for far devices need nested codes: run `astra calibrate --codec nested-pq`")
        if not 1 <= self.far_groups < codec.groups:
            raise AstraError(
                f"far groups are {self.far_groups}; these codes have {codec.groups}, of which devices that are not "
                "near get at least 1 and not all"
            )
        for device in (device for devices in self.neighbourhoods for device in devices):
            if not 0 <= device < N:
                raise AstraError(f"near names {device}; the {N} devices are numbered from 0 to {N - 1}")

    def table(self, N: int) -> Bool[np.ndarray, "N N"]:
        """Which of N devices are near each other; each is near itself."""
        table = np.eye(N, dtype=bool)
        for devices in self.neighbourhoods:
            table[np.ix_(devices, devices)] = True
        return table

    def steps(self) -> list[list[tuple[int, int]]]:
        """Who sends to whom, one step after the other, until all that are near have told each other: pairs (from, to).

        Nobody sends or receives twice in one step.
        """
        return [
            [
                (device, devices[(place + step) % len(devices)])
                for devices in self.neighbourhoods
                if step < len(devices)
                for place, device in enumerate(devices)
            ]
            for step in range(1, max(map(len, self.neighbourhoods)))
        ]


def near_of(near: str | None, far_groups: int | None) -> Near | None:
    """What `--near 0,1/2,3 --far-groups 4` says; None without both. Raises AstraError where one is missing or odd."""
    if near is None and far_groups is None:
        return None
    if near is None or far_groups is None:
        given, other = ("--near", "--far-groups 4") if far_groups is None else ("--far-groups", "--near 0,1/2,3")
        raise AstraError(f"{given} needs to know more: give something like {other}, too")
    try:
        neighbourhoods = tuple(tuple(map(whole, devices.split(","))) for devices in near.split("/"))
    except ValueError:
        raise AstraError(f"near is {near!r}: write numbers of devices, such as 0,1/2,3") from None
    return Near(neighbourhoods, far_groups)


def near_on(near: Near, hosts: Int[np.ndarray, "data seq"]) -> Near | None:
    """The same for the devices of a mesh, where `near` names hosts if there are several; None for one device.

    Args:
      hosts: on which host every device of the mesh is (`astra_jax.mesh.sharding.hosts_of`).

    Raises:
      AstraError: a host is unknown, or several hosts share a shard's batches, so that it is on none of them.
    """
    if hosts.shape[1] == 1 or hosts.max() == 0:
        return near if hosts.shape[1] > 1 else None
    if (hosts != hosts[0]).any():
        raise AstraError("near names hosts, but shards have batches on several of them: use --devices N, not DxN")
    for host in (host for near_hosts in near.neighbourhoods for host in near_hosts):
        if host not in hosts:
            raise AstraError(f"near names {host}; the hosts are numbered from 0 to {hosts.max()}")
    shards = [tuple(n for n, host in enumerate(hosts[0]) if host in near_hosts) for near_hosts in near.neighbourhoods]
    return dataclasses.replace(near, neighbourhoods=tuple(shards))
