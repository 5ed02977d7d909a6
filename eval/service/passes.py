"""The passes of an engine: what had to be compiled first, and how long they took."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

MOST_PROGRAMS = 64  # that are kept in memory, our choice; the compiled ones are on a disk, too

Result = TypeVar("Result")


class Passes:
    """Runs passes (`astra_jax.serving.engine.Passing`), one that compiles before one that is measured.

    Attributes:
      seconds, compile_seconds: of the last pass, and of the one before it that had to compile (0: none had to).
    """

    def __init__(self) -> None:
        self.seconds = self.compile_seconds = 0.0
        self._compiled = set[Any]()  # shapes of inputs, and what else needs a program of its own

    def __call__(
        self,
        inputs: Any,
        call: Callable[[], Result],
        compile_all: Callable[[], Any] | None = None,
        programs: Any = None,
    ) -> Result:
        """What `call` gives."""
        key, self.compile_seconds = (str(jax.tree.map(np.shape, inputs)), programs), 0.0
        if key not in self._compiled:
            if len(self._compiled) >= MOST_PROGRAMS:  # the same on all hosts
                jax.clear_caches()
                self._compiled.clear()
            _, self.compile_seconds = _timed(compile_all or call)
            self._compiled.add(key)
        result, self.seconds = _timed(call)
        return result


def _timed(call: Callable[[], Result]) -> tuple[Result, float]:
    begun = time.perf_counter()
    return jax.block_until_ready(call()), time.perf_counter() - begun
