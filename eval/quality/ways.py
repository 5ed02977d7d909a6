"""How a checkpoint is run to see what it reaches: on a mesh, or simulated as virtual shards of one device.

Only what is simulated can have devices of unequal speeds, and only ASTRA's codes can be lost.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool

from astra_jax.codecs.config import AstraConfig
from astra_jax.hosts.distributed import have_read
from astra_jax.mesh.sharding import Shards, make_mesh
from astra_jax.serving.compile import STRATEGIES, parallelize
from astra_jax.strategies.base import Single
from astra_jax.strategies.coded import Astra
from eval.network.devices import Devices
from eval.network.packet_loss import PacketLoss, arrived

Run = Callable[[Any], Array]  # inputs -> outputs
Lost = Literal["masked", "predicted"]


# Every way has `runs(model)`: for every try what a progress bar has to show behind its label, and the function from
# inputs to outputs of a model: of the checkpoint's own, or of one around it. `shards(model, inputs)` is the split.


@dataclasses.dataclass(frozen=True)
class OnMesh:
    """A strategy on a mesh of `rows` times N devices.

    Attributes:
      strategy: its name in `STRATEGIES`.
      N: devices over the tokens.
      rows: D, batches at once.
    """

    strategy: str
    N: int
    rows: int = 1

    def shards(self, model: Any, inputs: Any = None) -> Shards:
        """How tokens are split; those of the longest inputs by default."""
        return model.shards(self.N, inputs)

    def runs(self, model: Any) -> Iterator[tuple[str, Run]]:
        """One try. Of several hosts, each does by itself what takes one device."""
        if self.N == 1 and jax.distributed.is_initialized():
            yield from Simulated(1).runs(model)
            return
        mesh, make = make_mesh(self.N, self.rows), STRATEGIES[self.strategy].of
        program, batch = parallelize(model, mesh, make), itertools.count(1)

        def together(inputs: Any) -> Array:
            have_read(f"batch {next(batch)} of the data", inputs)
            return program(inputs)

        yield "", together


@dataclasses.dataclass(frozen=True)
class Simulated:
    """ASTRA as N virtual shards of one device; the whole model where N is 1.

    Attributes:
      N: shards.
      devices: the N devices whose tokens these are; none where all are equal.
    """

    N: int
    devices: Devices = Devices()

    @property
    def strategy(self) -> str:
        """Its name in `STRATEGIES`."""
        return "astra" if self.N > 1 else "single"

    def shards(self, model: Any, inputs: Any = None) -> Shards:
        """How tokens are split; those of the longest inputs by default."""
        return self.devices.split(model.shards(self.N, inputs))

    def runs(self, model: Any) -> Iterator[tuple[str, Run]]:
        """One try."""
        graphdef, state = nnx.split(model)
        yield "", lambda inputs: run_virtual(graphdef, state, inputs, self.N, self.devices)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lossy(Simulated):
    """The same on links that lose packets, in a few tries.

    Attributes:
      packet_loss: of every link.
      codes: what is in the packets.
      lost: what becomes of tokens whose codes are lost.
      tries: how many.
    """

    packet_loss: PacketLoss
    codes: AstraConfig
    lost: Lost
    tries: int

    def runs(self, model: Any) -> Iterator[tuple[str, Run]]:
        """As many tries as there are; the number of a try and that of a batch decide what is lost."""
        graphdef, state = nnx.split(model)
        kinds = self.codes.kinds(model.config.num_hidden_layers)

        def run(inputs: Any, seed: int, batch: Iterator[int]) -> Array:
            shards, B = self.shards(model, inputs), jax.tree.leaves(inputs)[0].shape[0]
            rng = np.random.default_rng([seed, next(batch)])
            bits = self.codes.token_bits
            there = jnp.asarray(arrived(self.packet_loss, shards, bits, len(kinds), B, rng, kinds))
            return run_virtual(graphdef, state, inputs, self.N, self.devices, there, self.lost)

        for seed in range(self.tries):
            yield f", seed {seed}", partial(run, seed=seed, batch=itertools.count())


Way = OnMesh | Simulated


@partial(jax.jit, static_argnames=("graphdef", "N", "devices", "lost"))
def run_virtual(
    graphdef: Any,
    state: Any,
    inputs: Any,
    N: int,
    devices: Devices,
    there: Bool[Array, "L B N slots"] | None = None,
    lost: Lost = "predicted",
) -> Array:
    """Inputs -> outputs of a model on one device with N virtual shards, of which `there` tells what codes arrived.

    Jitted here, not where it is used, so that all tries under packet loss share one program.
    """
    model = nnx.merge(graphdef, state)
    tokens, shards = model.to_tokens(inputs), devices.split(model.shards(N, inputs))
    strategy = Astra.virtual(shards, there, lost=lost) if N > 1 else Single(shards)
    out = model(shards.scatter(tokens), strategy)[0]
    return shards.gather(out, tokens.shape[1]) if model.per_token else out


def mean_and_spread(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of every column over several tries, and behind it the standard deviation (of a sample; None of one try).

    Counts, which are whole numbers, are the same in all of them.
    """
    row: dict[str, Any] = {}
    for column, first in found[0].items():
        values = [metrics[column] for metrics in found]
        if isinstance(first, int):
            row[column] = first
        else:
            row[column] = float(np.mean(values))
            row[f"{column} sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return row
