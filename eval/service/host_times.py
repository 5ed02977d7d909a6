"""Where the time of a pass went, host by host, and what one device alone would have taken."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from astra_jax.hosts import runtime
from astra_jax.mesh.sharding import DATA, SEQ, hosts_of
from astra_jax.serving.compile import make_for
from astra_jax.serving.engine import Engine
from eval.cost.flops import flops
from eval.cost.timing import share
from eval.cost.traffic import abstract
from eval.network.model import volume
from eval.network.pass_profile import Pass, rows
from eval.service.messages import HostTimes, NoHostTimes

MOST_COUNTED = 128  # shapes of inputs whose operations are kept, our choice


def sent_bytes(engine: Engine, inputs: Any) -> int:
    """Bytes that every device gives to the collectives of all blocks, for one image or text of this batch."""
    N = engine.mesh.shape[SEQ]
    return engine.make(engine.model, N, inputs).wire_bits(engine.model) // 8 if N > 1 else 0


def ways_out(hosts: Int[np.ndarray, "data seq"]) -> list[int]:
    """From how many of its devices each host sends to another one, where a row of the mesh is a ring."""
    out = hosts != np.roll(hosts, -1, axis=1)
    return [int(np.sum(out & (hosts == host))) for host in range(hosts.max() + 1)]


class TimeTable:
    """The table of an engine's passes. The answer is there already, so that what fails here is no failure of it.

    Args:
      engine: whose passes.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._counted = dict[tuple[str, int], int]()

    def of(self, passes: list[Pass], inputs: Any, B: int) -> HostTimes | NoHostTimes:
        """What each host did in a pass, for a batch of B."""
        try:
            return self._table(passes, inputs, B)
        except Exception as error:
            return NoHostTimes(runtime.reason(error))

    def _table(self, passes: list[Pass], inputs: Any, B: int) -> HostTimes:
        engine, N = self.engine, self.engine.mesh.shape[SEQ]
        hosts = hosts_of(engine.mesh)
        rows_each, devices_each = -(-B // engine.mesh.shape[DATA]), int(np.sum(hosts == 0))
        strategy = make_for(engine.mesh, engine.make)(engine.model, N, inputs)
        messages = strategy.messages(engine.model) * rows_each
        # A host's devices compute and exchange at the same time.
        passes = [p._replace(collectives=tuple(s / devices_each for s in p.collectives)) for p in passes]
        table = rows(passes, volume(messages, N, "each")[0] / 8)
        for row, ways in zip(table, ways_out(hosts), strict=True):
            row["predicted"] *= ways
        computed, here = table[0]["compute ms"], table[0]["total ms"]
        if computed is None or here is None:
            return HostTimes(table, None, None)
        of_all, of_one = (self.operations(inputs, n) for n in (1, N))
        alone = computed * of_all * B / (of_one * rows_each * devices_each)
        return HostTimes(table, alone, alone / here)

    def operations(self, inputs: Any, N: int) -> int:
        """Of one of N devices in a pass, counted once for every shape of inputs."""
        key = (str(jax.tree.map(np.shape, inputs)), N)
        if key not in self._counted:
            if len(self._counted) >= MOST_COUNTED:
                self._counted.clear()
            engine = self.engine
            mine = share(abstract(engine.model), N, inputs, engine.make)
            self._counted[key] = flops(mine.run, *mine.arguments)
        return self._counted[key]
