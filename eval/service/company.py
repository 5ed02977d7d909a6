"""A checkpoint on several hosts that each have a program of their own: as host 0, which answers, and as another one."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from astra_jax.errors import AstraError
from astra_jax.hosts import ways
from astra_jax.hosts.agreement import settings, versions
from astra_jax.hosts.company import Company, Passed, Seat
from astra_jax.hosts.datagrams import Datagrams
from astra_jax.mesh.sharding import make_mesh
from astra_jax.serving.engine import Engine
from astra_jax.strategies.coded import Astra, OnHosts
from eval.cost.flops import flops
from eval.cost.timing import share
from eval.cost.traffic import abstract
from eval.service.copying import digest
from eval.service.messages import HostTimes, Message, NoHostTimes, Ways, Without
from eval.service.requests import packed, unpacked
from eval.service.service import Loading, Service

MOST_PROGRAMS = 64  # that are kept in memory, our choice

Result = TypeVar("Result")


def same() -> dict[str, str]:
    """What has to be the same on all hosts, besides the checkpoint: what computes, and how it is set."""
    return versions() | settings()


class Passes:
    """Runs passes (`astra_jax.serving.engine.Passing`) of all hosts that are there: a rehearsal where something is new
    to one of them, and then what is measured.

    Attributes:
      seat: this host's place in the next pass.
      seconds, compile_seconds: of the last pass, and of its rehearsal (0: there was none).
      passed: how the last pass was.
    """

    def __init__(self, company: Company):
        self.company, self.seat = company, Seat((0,), 0)
        self.seconds = self.compile_seconds = 0.0
        self.passed: Passed | None = None
        self._rehearsed = set[Any]()

    def __call__(
        self,
        inputs: Any,
        call: Callable[[], Result],
        compile_all: Callable[[], Any] | None = None,
        programs: Any = None,
    ) -> Result:
        """What `call` gives. Raises AstraError where a host cannot compute it, or two do not hear each other."""
        key, self.compile_seconds = (str(jax.tree.map(np.shape, inputs)), programs, self.seat), 0.0
        if key not in self._rehearsed:
            if len(self._rehearsed) >= MOST_PROGRAMS:
                self.company.forget()
                jax.clear_caches()
                self._rehearsed.clear()
            begun = time.perf_counter()
            self.company.rehearse(self.seat, lambda: jax.block_until_ready((compile_all or call)()))
            self.compile_seconds = time.perf_counter() - begun
            self._rehearsed.add(key)
        result, self.passed = self.company.run(self.seat, lambda: jax.block_until_ready(call()))
        self.seconds = self.passed.here.seconds
        return result


class _OnOneOfSeveral(Service):
    """A checkpoint on one device of a host, with a strategy for every place that it may have among others."""

    def __init__(self, checkpoint: Path, how: Loading, link: Datagrams, passing: Any):
        self.name, self.codes, self.notes = str(checkpoint), True, list[Message]()
        mesh, make = make_mesh(1), OnHosts(link, 2, 1)
        self.checkpoint = self._load(checkpoint, how, mesh, Astra.of)
        self.engine = self._first = Engine(self.checkpoint, mesh, make=make, passing=passing)
        self.link, self._engines = link, dict[Any, Engine]()

    def sit(self, seat: Seat) -> Engine:
        """The engine for a place, whoever has the others; it is the service's from now on."""
        key = (len(seat.order), seat.index, seat.parts)
        if key not in self._engines:
            if len(self._engines) >= MOST_PROGRAMS:
                self._engines.clear()
            self._engines[key] = self._first.like(OnHosts(self.link, *key))
        self.engine = self._engines[key]
        return self.engine


class Host0(_OnOneOfSeveral):
    """Host 0: answers requests, with the hosts that are there."""

    def __init__(self, checkpoint: Path, how: Loading, company: Company):
        self.company, self.passes = company, Passes(company)
        super().__init__(checkpoint, how, company.link, self.passes)
        self._counted = dict[Any, int]()

    @property
    def N(self) -> int:
        """Hosts of the pass."""
        return len(self.passes.seat.order)

    @property
    def devices(self) -> int:
        """Hosts of the pass, each of which has one device."""
        return self.N

    def sent_bytes(self, inputs: Any) -> int:
        """Bytes of codes that this host's shard has in all blocks, for one image or text: to each of the others."""
        if self.N == 1:
            return 0
        return Astra.of(self.engine.model, self.N, inputs).wire_bits(self.engine.model) // 8

    def answer_one(self, body: bytes) -> Iterator[Message]:
        """The answer to a request.

        Raises:
          AstraError: it is none, or cannot be answered.
        """
        request = self.smaller(unpacked(body))
        seat = self.company.seat()
        if len(seat.order) > 1:  # they read it while this host does
            self.company.ask(seat.order, packed(request))
        inputs = self.encode(request)
        self.passes.seat = seat
        self.sit(seat)
        yield from self.answer(request, inputs)
        if self.N > 1:
            yield self._host_times(inputs)

    def check(self) -> Ways:
        """How fast the links between the hosts that are there are."""
        found = self.company.measure()
        slowest, trips = ways.slowest(found), [way.round_trip for way in found if way.round_trip]
        hosts = len(self.company.order())
        return Ways(ways.rows(found), hosts, slowest and slowest.rate, max(trips, default=None))

    def _preface(self, inputs: Any) -> Iterator[Message]:
        yield from super()._preface(inputs)
        tally = self.passes.passed.here.tally
        if tally.missing or tally.gone or tally.left_out:
            yield Without(tally.missing, [f"host {number}" for number in sorted(tally.gone)], tally.left_out)

    def _host_times(self, inputs: Any) -> Message:
        """Where the time of the last pass went."""
        seat, taken = self.passes.seat, self.passes.passed.all()
        self.company.learn(seat, taken)
        part = dict(zip(seat.order, seat.parts or [1] * len(seat.order), strict=True))
        rows = [
            {
                "host": one.host,
                "tokens %": 100 * part[one.host] / sum(part.values()),
                "total ms": 1e3 * one.seconds,
                "waited ms": 1e3 * one.tally.waited,
                "sent bytes": one.tally.sent,
                "sent again": one.tally.again,
                "missing": one.tally.missing,
                "left out": one.tally.left_out,
                "dropped": one.tally.dropped,
            }
            for one in sorted(taken, key=lambda one: one.host)
        ]
        try:
            here = taken[0]
            of_all, of_one = (self._operations(inputs, n) for n in (1, self.N))
            # Of this host's share, which may be larger or smaller than that of one of N, as between one of N and all.
            more = (part[0] / sum(part.values()) - 1 / self.N) / (1 - 1 / self.N)
            alone = 1e3 * (here.seconds - here.tally.waited) * of_all / (of_one + more * (of_all - of_one))
            return HostTimes(rows, alone, alone / (1e3 * here.seconds))
        except Exception as error:  # the answer is there already
            return NoHostTimes(f"{type(error).__name__}: {error}")

    def _operations(self, inputs: Any, N: int) -> int:
        key = (str(jax.tree.map(np.shape, inputs)), N)
        if key not in self._counted:
            mine = share(abstract(self.engine.model), N, inputs, Astra.of)
            self._counted[key] = flops(mine.run, *mine.arguments)
        return self._counted[key]


class Other(_OnOneOfSeveral):
    """A host that is with host 0 (`astra_jax.hosts.fellow.Work`)."""

    def __init__(self, checkpoint: Path, how: Loading, link: Datagrams):
        super().__init__(checkpoint, how, link, lambda inputs, call, compile_all=None, programs=None: call())
        self._inputs: Any = None

    def read(self, body: bytes) -> None:
        """Reads what passes are for."""
        self._inputs = self.encode(unpacked(body))

    def run(self, seat: Seat) -> None:
        """Takes part in one."""
        self.sit(seat).take_part(self._inputs)

    def forget(self) -> None:
        """Drops programs that are kept in memory."""
        jax.clear_caches()


def told(checkpoint: Path, how: Loading) -> dict[str, Any]:
    """What other hosts have to know of what is loaded."""
    return {"checkpoint": str(checkpoint.resolve()), "digest": digest(checkpoint), "how": dataclasses.asdict(how)}


def heard(told: dict[str, Any], checkpoint: Path) -> Loading:
    """How host 0 loads the checkpoint.

    Raises:
      AstraError: it is another one than is here.
    """
    if digest(checkpoint) != told["digest"]:
        raise AstraError(
            f"{checkpoint} is not what host 0 has at {told['checkpoint']}: leave it out, and that one is copied here"
        )
    return Loading(**told["how"])
