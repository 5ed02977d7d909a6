"""The devices that share a pass: how fast each is, and how many of the tokens it gets for that."""

import dataclasses
from collections.abc import Sequence

from astra_jax.cli.arguments import Numbers
from astra_jax.errors import AstraError
from astra_jax.mesh.sharding import Shards

FASTEST = 1e6  # of relative speeds


@dataclasses.dataclass(frozen=True)
class Devices:
    """Devices by how fast they are; as an option of a command nothing where all are equal. See `of`."""

    speeds: Numbers = ()
    """Relative speeds of the N devices, such as 1,1,0.5,0.5: tokens are split in proportion; by default equal."""

    def of(self, N: int) -> "Devices":
        """These, or N equal ones where none are given. Raises AstraError unless there are N numbers above 0."""
        if not self.speeds:
            return Devices((1.0,) * N)
        if len(self.speeds) != N:
            raise AstraError(f"--speeds has {len(self.speeds)} numbers for {N} devices: give one for each")
        for speed in self.speeds:
            if not 1 / FASTEST <= speed <= FASTEST:
                raise AstraError(
                    f"--speeds has {speed:g}; a speed is above 0, from {1 / FASTEST:g} to {FASTEST:g}: leave it "
                    "out, or give 0.5, say"
                )
        return self

    @property
    def N(self) -> int:
        """How many there are."""
        return len(self.speeds)

    @property
    def equal(self) -> bool:
        """Whether all are as fast as each other."""
        return len(set(self.speeds)) <= 1

    def __str__(self) -> str:
        return " ".join(f"{speed:g}" for speed in self.speeds)

    def fastest(self, N: int) -> "Devices":
        """The N fastest, in the order in which they were given."""
        chosen = sorted(range(self.N), key=lambda n: -self.speeds[n])[:N]
        return Devices(tuple(self.speeds[n] for n in sorted(chosen)))

    def split(self, shards: Shards) -> Shards:
        """The same tokens split over these devices; see `Shards.in_proportion` for what is raised."""
        return shards.in_proportion(self.speeds) if self.speeds else shards

    def seconds(self, work: Sequence[float], per_second: float) -> tuple[float, ...]:
        """In which each does its part of the work, of which a device of speed 1 does so much per second."""
        return tuple(n / (speed * per_second) for n, speed in zip(work, self.speeds, strict=True))
