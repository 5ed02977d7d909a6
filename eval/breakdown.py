"""Where the time of one pass on several hosts went: every host's computing, sending and waiting, and its bytes.

XLA's own profiler says how long each collective took on each host. The host that came last waited for nobody, so that
the shortest of these times is what the exchange itself took; what a host's collective took longer, it waited for
others. What is left of the pass is computing. Only of CPU hosts: on others a pass is timed as a whole.
"""

import glob
import os
import re
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.profiler import ProfileData, ProfileOptions

from astra_jax import cluster

# Names that XLA gives to what `astra_jax.collectives` calls.
_COLLECTIVE = re.compile(r"(all[-_]gather|psum|all[-_]reduce|all[-_]to[-_]all|permute)")
_SIOCGIFADDR = 0x8915  # Linux: the address of an interface


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
    """The name of the interface with this IPv4 address; None where the system does not tell."""
    if sys.platform != "linux":
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has none
                continue
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return None


def counters(interface: str | None) -> tuple[float, float]:
    """Bytes (sent, received) by an interface so far, headers included; nan where it is not known."""
    for line in Path("/proc/net/dev").read_text().splitlines() if interface else ():
        name, _, numbers = line.partition(":")
        if name.strip() == interface:
            fields = numbers.split()
            return float(fields[8]), float(fields[0])
    return float("nan"), float("nan")


def collective_seconds(folder: str) -> tuple[float, ...]:
    """Seconds of all collectives in a profile that JAX wrote, by name and then by time."""
    (path,) = glob.glob(os.path.join(folder, "**", "*.xplane.pb"), recursive=True)
    events = [
        (event.name, event.start_ns, event.duration_ns)
        for plane in ProfileData.from_file(path).planes
        if plane.name == "/host:CPU"
        for line in plane.lines
        for event in line.events
        if _COLLECTIVE.match(event.name)
    ]
    return tuple(nanoseconds / 1e9 for _, _, nanoseconds in sorted(events))


def observe(call: Callable[[], Any]) -> tuple[Any, Pass]:
    """What `call` gives, which is one pass on all hosts, and how it went here."""
    here = cluster.membership()
    interface = interface_of(here.address) if here else None
    options = ProfileOptions()
    options.python_tracer_level = 0  # XLA's events alone
    with tempfile.TemporaryDirectory(prefix="astra") as folder:
        before = counters(interface)
        jax.profiler.start_trace(folder, profiler_options=options)
        start = time.perf_counter()
        result = jax.block_until_ready(call())
        seconds = time.perf_counter() - start
        jax.profiler.stop_trace()
        sent, received = (now - then for now, then in zip(counters(interface), before, strict=True))
        collectives = collective_seconds(folder) if jax.default_backend() == "cpu" else ()
    return result, Pass(seconds, collectives, sent, received)


def from_all_hosts(passed: Pass) -> list[Pass]:
    """The same pass as every host saw it: on all hosts, by number."""
    numbers = np.array([passed.seconds, passed.sent, passed.received, *passed.collectives], np.float32)
    return [
        Pass(float(row[0]), tuple(map(float, row[3:])), float(row[1]), float(row[2]))
        for row in np.asarray(multihost_utils.process_allgather(numbers)).reshape(-1, len(numbers))
    ]


def rows(passes: Sequence[Pass], predicted_bytes: float) -> list[dict[str, Any]]:
    """The table: a row per host."""
    found = []
    for host, passed in enumerate(passes):
        exchange = sum(min(times) for times in zip(*(p.collectives for p in passes), strict=True))
        known = bool(passed.collectives)
        found.append(
            {
                "host": host,
                "total ms": 1e3 * passed.seconds,
                "compute ms": 1e3 * (passed.seconds - sum(passed.collectives)) if known else None,
                "communication ms": 1e3 * exchange if known else None,
                "waiting ms": 1e3 * (sum(passed.collectives) - exchange) if known else None,
                "bytes sent": None if np.isnan(passed.sent) else int(passed.sent),
                "predicted": round(predicted_bytes),
                "bytes received": None if np.isnan(passed.received) else int(passed.received),
            }
        )
    return found
