"""How a training step is made to fit: what of it is split over devices, and what is computed again."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from astra_jax.codecs.config import Kind
from astra_jax.errors import AstraError
from astra_jax.mesh.sharding import DATA, make_mesh
from astra_jax.models.blocks import in_blocks
from astra_jax.models.interface import Step
from astra_jax.strategies.base import Single

FSDP = "fsdp"  # large arrays are split over this axis, too, and gathered where they are used
LEAST_SPLIT = 2**22  # bytes of an array from which it is split: a smaller one costs more time than memory (our choice)

Remat = Literal["none", "block"]


def training_mesh(fsdp: int, data: int = 1) -> Mesh:
    """A (data, fsdp) mesh: a batch is split over all its devices, large arrays over `fsdp` of them.

    Raises:
      AstraError: there are fewer devices; see `astra_jax.make_mesh`.
    """
    return mesh_of(make_mesh(fsdp, data).devices)


def mesh_of(devices: Any) -> Mesh:
    """The same of devices [data,fsdp]."""
    return Mesh(devices, (DATA, FSDP), axis_types=(AxisType.Auto,) * 2)


def split(state: Any, mesh: Mesh) -> Any:
    """Where every array of a state goes: parameters, gradients, an optimizer's moments, codebooks and statistics.

    One rule for all (our choice): an array of 4 MiB and more is split along its longest axis that `fsdp` divides, the
    others are on every device. A stack of blocks is not split along the blocks.

    Args:
      state: arrays, their shapes, or tracers of a step.

    Returns:
      a tree of `NamedSharding`s.
    """

    def one(path: Any, a: Any) -> NamedSharding:
        axes: list[str | None] = [None] * len(a.shape)
        least = 1 if in_blocks(path) else 0
        fitting = [n for n in range(least, len(axes)) if a.shape[n] % mesh.shape[FSDP] == 0]
        if a.size * a.dtype.itemsize >= LEAST_SPLIT and fitting:
            axes[max(fitting, key=lambda n: a.shape[n])] = FSDP
        return NamedSharding(mesh, P(*axes))

    return jax.tree_util.tree_map_with_path(one, state)


@dataclasses.dataclass(frozen=True)
class Memory:
    """What a step saves memory with. None of it changes what is computed, but for rounding.

    Attributes:
      mesh: the devices (`training_mesh`); None for one.
      dtype: what kernels of blocks are multiplied in, and so gathered in.
      remat: "block" keeps the input of every block for the backward pass and computes the block again.
    """

    mesh: Mesh | None = None
    remat: Remat = "none"
    dtype: Any = jnp.float32

    @property
    def devices(self) -> int:
        """How many there are."""
        return self.mesh.size if self.mesh else 1

    def batch(self, arrays: Any) -> Any:
        """Puts a batch on the devices, split along its first axis."""
        return jax.device_put(arrays, NamedSharding(self.mesh, P((DATA, FSDP))) if self.mesh else None)

    def spread(self, state: Any) -> Any:
        """Arrays where `split` has them: puts them there, or within a step says that they are made there."""
        if self.mesh is None:
            return state
        where = split(state, self.mesh)
        if any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(state)):
            return jax.lax.with_sharding_constraint(state, where)
        return jax.device_put(state, where)

    def whole(self, state: Any, *, but_blocks: bool = False) -> Any:
        """Arrays of a state gathered, within a step; or those that are in no stack, which is gathered as it is run."""
        if self.mesh is None:
            return state
        everywhere = NamedSharding(self.mesh, P())

        def one(path: Any, a: Any) -> Any:
            return a if but_blocks and in_blocks(path) else jax.lax.with_sharding_constraint(a, everywhere)

        return jax.tree_util.tree_map_with_path(one, state)

    def by_batch(self, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        """What goes from block to block stays with its part of the batch: x [B,S,D] and estimates [*N,N,B,S,W]."""
        mesh = self.mesh
        if mesh is None:
            return carry

        def one(a: Any, axis: int) -> Any:
            return jax.lax.with_sharding_constraint(a, NamedSharding(mesh, P(*[None] * axis, (DATA, FSDP))))

        x, estimate = carry
        return one(x, 0), jax.tree.map(lambda a: one(a, a.ndim - 3), estimate)

    def check(self, batch_size: int) -> None:
        """Raises AstraError for a batch that the devices cannot share."""
        if batch_size % self.devices:
            raise AstraError(f"--batch-size is {batch_size}; it must be a multiple of the {self.devices} devices")

    def run_block(self, run: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """A block, (carry, weights) -> (carry, report), that has its weights gathered, and leaves little behind."""

        def gathered(carry: Any, weights: Any) -> Any:
            return run(self.by_batch(carry), self.whole(self._cast(weights)))

        if self.remat == "block":
            return jax.checkpoint(gathered)
        return run if self.mesh is None else jax.checkpoint(gathered, policy=_all_but_gathered)

    def _cast(self, weights: Any) -> Any:
        def one(path: Any, a: Any) -> Any:
            return a.astype(self.dtype) if "kernel" in jax.tree_util.keystr(path) else a

        return jax.tree_util.tree_map_with_path(one, weights)


def _all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """What a backward pass keeps of a block: all but weights that were gathered, which would be those of all blocks."""
    return primitive.name != "sharding_constraint"


ONE_DEVICE = Memory()


@dataclasses.dataclass(frozen=True)
class Frugal:
    """What a strategy becomes in training: it runs every block as `memory` says."""

    memory: Memory = dataclasses.field(default=ONE_DEVICE, kw_only=True)

    def run_blocks(self, step: Step, kinds: Sequence[Kind], carry: Any, xs: Any) -> Any:
        def frugal(strategy: Any, kind: Kind, carry: Any, xs: Any) -> Any:
            return self.memory.run_block(lambda carry, xs: step(strategy, kind, carry, xs))(carry, xs)

        return super().run_blocks(frugal, kinds, carry, xs)  # type: ignore[misc]  # of the strategy it is mixed into


@dataclasses.dataclass(frozen=True)
class FrugalSingle(Frugal, Single):
    """One device, in training."""
