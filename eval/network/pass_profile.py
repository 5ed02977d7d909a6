"""Where the time of one pass on several hosts went: every host's computing, sending and waiting, and its bytes.

XLA's own profiler says how long each collective took on each host. The host that came last waited for nobody, so that
the shortest of these times is what the exchange itself took; what a host's collective took longer, it waited for
others. What is left of the pass is computing. Only of CPU hosts: on others a pass is timed as a whole.

All this only tells about an answer: what cannot be measured is not known, and the answer is there all the same. So
nothing here writes to a disk, and hosts tell each other what they measured beside JAX's collectives, whose sizes must
not depend on it.
"""

import contextlib
import math
import re
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import psutil
from jax._src.lib import _profiler  # JAX's public way to a profile goes through a file
from jax.profiler import ProfileData, ProfileOptions

from astra_jax.hosts import runtime

# Names that XLA gives to what `astra_jax.mesh.collectives` calls.
_COLLECTIVE = re.compile(r"(all[-_]gather|psum|all[-_]reduce|all[-_]to[-_]all|permute)")
MOST_COLLECTIVES = 10_000  # of a pass, that are told one by one


class Pass(NamedTuple):
    """One pass as a host saw it.

    Attributes:
      seconds: from its begin on this host to its result.
      collectives: seconds of every collective, in an order that is the same on all hosts.
      sent, received: bytes on the interface that leads to the other hosts; nan where the system does not tell.
    """

    seconds: float
    collectives: tuple[float, ...]
    sent: float
    received: float


def interface_of(address: str) -> str | None:
    """The name of the interface with this IPv4 address; None where there is none."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(own.family == socket.AF_INET and own.address == address for own in addresses):
            return name
    return None


def counters(interface: str | None) -> tuple[float, float]:
    """Bytes (sent, received) by an interface so far, headers included; nan where it is not known."""
    with contextlib.suppress(OSError, KeyError):  # no file can be opened any more, say
        found = psutil.net_io_counters(pernic=True)[interface or ""]
        return float(found.bytes_sent), float(found.bytes_recv)
    return float("nan"), float("nan")


def collective_seconds(profile: bytes) -> tuple[float, ...]:
    """Seconds of all collectives in a profile, by name and then by time."""
    events = [
        (event.name, event.start_ns, event.duration_ns)
        for plane in ProfileData.from_serialized_xspace(profile).planes
        if plane.name == "/host:CPU"
        for line in plane.lines
        for event in line.events
        if _COLLECTIVE.match(event.name) and _runs(event)
    ]
    return tuple(nanoseconds / 1e9 for _, _, nanoseconds in sorted(events))


def _runs(event: Any) -> bool:
    """Whether it is an operation of a program that ran. XLA's passes over one that it compiles have like names."""
    return any(name == "hlo_op" for name, _ in event.stats)


def observe(call: Callable[[], Any]) -> tuple[Any, Pass]:
    """What `call` gives, which is one pass on all hosts, and how it went here."""
    interface, session = None, None
    with contextlib.suppress(Exception):
        here = runtime.membership()
        interface = interface_of(here.address) if here else None
    with contextlib.suppress(Exception):
        options = ProfileOptions()
        options.python_tracer_level = 0  # XLA's events alone
        session = _profiler.ProfilerSession(options) if jax.default_backend() == "cpu" else None
    before = counters(interface)
    start = time.perf_counter()
    try:
        result = jax.block_until_ready(call())
    finally:
        seconds = time.perf_counter() - start
        collectives: tuple[float, ...] = ()
        with contextlib.suppress(Exception):
            collectives = collective_seconds(session.stop()) if session else ()
    sent, received = (now - then for now, then in zip(counters(interface), before, strict=True))
    return result, Pass(seconds, collectives, sent, received)


def told(passed: Pass) -> list[Any]:
    """A pass as what JSON can say. Too many collectives are left out: then nothing is known of them."""
    collectives = passed.collectives if len(passed.collectives) <= MOST_COLLECTIVES else ()
    return [passed.seconds, passed.sent, passed.received, *collectives]


def heard(value: Any) -> Pass:
    """The inverse of `told`. Of anything else, nothing is known."""
    numbers = value if isinstance(value, list) and len(value) >= 3 else [math.nan] * 3
    seconds, sent, received, *collectives = (n if type(n) in (int, float) else math.nan for n in numbers)
    return Pass(seconds, tuple(collectives), sent, received)


def rows(passes: Sequence[Pass], predicted_bytes: float) -> list[dict[str, Any]]:
    """The table: a row per host. Where hosts saw different numbers of collectives, how long these took is not known."""
    all_known = all(math.isfinite(seconds) for passed in passes for seconds in passed.collectives)
    known = all_known and bool(passes[0].collectives) and len({len(passed.collectives) for passed in passes}) == 1
    exchange = sum(map(min, zip(*(p.collectives for p in passes), strict=True))) if known else 0.0
    return [
        {
            "host": host,
            "total ms": _or_none(1e3 * passed.seconds),
            "compute ms": _or_none(1e3 * (passed.seconds - sum(passed.collectives))) if known else None,
            "communication ms": _or_none(1e3 * exchange) if known else None,
            "waiting ms": _or_none(1e3 * (sum(passed.collectives) - exchange)) if known else None,
            "bytes sent": _or_none(passed.sent, int),
            "predicted": round(predicted_bytes),
            "bytes received": _or_none(passed.received, int),
        }
        for host, passed in enumerate(passes)
    ]


def _or_none(value: float, kind: Callable[[float], Any] = float) -> Any:
    return kind(value) if math.isfinite(value) else None
