"""The passes of an engine on several hosts: what had to be compiled first, what all agree on, and how long it took."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from astra_jax.hosts import runtime
from eval.network.pass_profile import Pass, heard, observe, told

MOST_PROGRAMS = 64  # that are kept in memory, our choice; the compiled ones are on a disk, too

Result = TypeVar("Result")


class Passes:
    """Runs passes (`astra_jax.serving.engine.Passing`), one that compiles before one that is measured.

    Attributes:
      seconds, compile_seconds: of the last pass, and of the one before it that had to compile (0: none had to).
      hosts: the last pass as each host saw it; empty where there is one.
    """

    def __init__(self) -> None:
        self.here = runtime.membership()
        self.seconds = self.compile_seconds = 0.0
        self.hosts: list[Pass] = []
        self._compiled = set[Any]()  # shapes of inputs, and what else needs a program of its own

    def __call__(
        self,
        inputs: Any,
        call: Callable[[], Result],
        compile_all: Callable[[], Any] | None = None,
        programs: Any = None,
    ) -> Result:
        """What `call` gives. After it host 0 needs no other host to answer.

        Raises:
          AstraError: on all hosts, where one of them cannot compute it. They can take another pass.
          Torn: see `astra_jax.hosts.runtime.agreed`.
        """
        key, self.compile_seconds = (str(jax.tree.map(np.shape, inputs)), programs), 0.0
        if key not in self._compiled:
            if len(self._compiled) >= MOST_PROGRAMS:  # the same on all hosts
                jax.clear_caches()
                self._compiled.clear()
            start = time.perf_counter()
            runtime.agreed(lambda: jax.block_until_ready((compile_all or call)()), exchanges=True)
            self.compile_seconds = time.perf_counter() - start
            self._compiled.add(key)
        if not self.here:
            start = time.perf_counter()
            result = jax.block_until_ready(call())
            self.seconds = time.perf_counter() - start
            return result
        (result, passed), all_told = runtime.agreed(lambda: observe(call), True, lambda found: told(found[1]))
        self.hosts, self.seconds = list(map(heard, all_told)), passed.seconds
        runtime.need(False)
        return result
