"""Whether several hosts can work together, found out over plain TCP before JAX would only hang.

All connect to host 0, which asks them one after the other: each host tells about itself, and every pair measures the
way between them in both directions, one at a time. A message is a JSON object on a line. Nothing that comes from
elsewhere is trusted: lines, numbers and times have limits, texts are cut and made printable, and whoever does not speak
like a host of this check is ignored. Nothing is encrypted; every host listens at its own address alone.
"""

import contextlib
import dataclasses
import ipaddress
import itertools
import json
import math
import os
import secrets
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from astra_jax.errors import AstraError
from astra_jax.hosts.agreement import Same, digest, settings, versions
from astra_jax.hosts.connection import Line
from astra_jax.hosts.findings import Findings, Pair, Way
from astra_jax.hosts.options import Hosts, check, own_address, parse_address
from astra_jax.hosts.rendezvous import (
    CONNECT_SECONDS,
    HELLO_SECONDS,
    MOST_TOLD,
    SILENCE_SECONDS,
    About,
    Member,
    about_this,
    differences,
    ip_address,
    listen,
    meet,
    number,
    reach,
    reason,
    text,
    told,
    word,
)
from astra_jax.report import progress

RATE_SECONDS = 2.0  # of sending, in each direction of a pair
BRIEFLY = 0.2  # the same, before a command
PINGS = 20  # round trips, of which the median counts

_FIND_SECONDS = 60.0  # to read what a command was given, such as pictures
_HASH_SECONDS = 600.0  # to read a checkpoint
_PING_SECONDS = 10.0
_MOST_RATE_SECONDS = 60.0
_MOST_RATE = 1e15  # bits per second
_ENOUGH = 64_000  # bytes: where fewer arrive in time, losses distort the rate
_STRETCH = 4  # times as long as it should take is the longest to wait for enough
_VERDICTS = ("end", "go", "again")
_WARM_UP = 1 / 3  # of the time: TCP starts slowly, and a shaped link lets the first bytes pass at once


def check_hosts(hosts: Hosts, checkpoints: Sequence[Path] = (), rate_seconds: float = RATE_SECONDS) -> Findings:
    """Checks, on all hosts at once, that they reach each other and have the same code, settings and checkpoints.

    Args:
      hosts: which hosts, and which of them this is.
      checkpoints: folders that should be the same everywhere.
      rate_seconds: how long each direction of a pair is measured; host 0 says it for all.

    Returns:
      What host 0 found. What is wrong between hosts is in its `problems`, and no error.

    Raises:
      AstraError: this host cannot take part; the message says why.
    """
    check(hosts)
    if hosts.coordinator is None or hosts.hosts is None:
        raise AstraError("hosts are checked by --coordinator ADDRESS:PORT, --hosts N and --host I: give all three")
    if hosts.hosts < 2:
        raise AstraError("--hosts is 1; there is nothing between hosts to check: give at least 2")
    if not 0 < rate_seconds <= _MOST_RATE_SECONDS:
        raise AstraError(
            f"--rate-seconds is {rate_seconds:g}; it must be above 0 and at most {_MOST_RATE_SECONDS:g}: "
            f"try {RATE_SECONDS:g}"
        )
    if hosts.host:
        line, verdict = take_part(hosts, checkpoints)
        line.close()
        return Findings(problems=(verdict["why"],) if verdict["why"] else ())
    gathered = gather(hosts, checkpoints, rate_seconds, measure_all=True)
    gathered.tell(do="end", why="; ".join(gathered.findings.problems))
    for member in gathered.members:
        member.line.close()
    return gathered.findings


@dataclasses.dataclass(frozen=True)
class Gathered:
    """What host 0 found, and its connections to the hosts that came, which wait for a verdict.

    Attributes:
      absent: those of the problems that are no more than that hosts did not come, or are gone.
    """

    findings: Findings
    members: Sequence[Member]
    absent: Sequence[str]

    def tell(self, do: str, why: str = "", **more: Any) -> None:
        """Tells the verdict to all hosts: `end` (with the reason in `why`; empty where all is well), or `go`."""
        for member in self.members:
            with contextlib.suppress(OSError):
                member.line.send(do=do, why=why[:1000], **more)


def gather(
    hosts: Hosts, checkpoints: Sequence[Path], rate_seconds: float, same: Same = dict, measure_all: bool = False
) -> Gathered:
    """Waits on host 0 for all hosts, compares them, and measures every pair.

    Args:
      same: see `take_part`.
      measure_all: also where something is wrong already.

    Raises:
      AstraError: a port is in use, or the address is none of this host.
    """
    assert hosts.coordinator is not None and hosts.hosts is not None
    address, port = parse_address(hosts.coordinator, hosts.insecure_public)
    versions()  # found out before the time runs in which hosts have to come
    # All come to the port where JAX will listen, too, which takes no more than to be let in.
    with listen(address, port) as server, listen(address, port + 1):
        # Host 0 is measured as all others are.
        threading.Thread(target=_as_host_0, args=(hosts, checkpoints, same), daemon=True).start()
        came, absent, problems, notes = meet(server, hosts.hosts, hosts.start_seconds)
        problems += _hear_same(came)
    if not (problems or (absent and not measure_all) or differences([member.about for member in came])):
        problems += _hear_digests(came)
    wrong = problems or absent or differences([member.about for member in came])
    pairs = _measure_pairs(came, rate_seconds) if measure_all or not wrong else []
    gone = [f"host {member.about.host} {fate}" for member in came if (fate := member.line.fate())]
    members = [member for member in came if not member.line.fate()]
    abouts = [member.about for member in members]
    absent += gone
    problems += absent + differences(abouts) + ([] if gone else _failures(pairs))
    notes += [note for about in abouts if (note := _gloo_note(about))]
    return Gathered(Findings(tuple(abouts), tuple(pairs), tuple(notes), tuple(problems)), members, absent)


def take_part(hosts: Hosts, checkpoints: Sequence[Path], same: Same = dict) -> tuple[Line, dict[str, Any]]:
    """Goes to host 0 and does what it says, up to its verdict.

    Args:
      same: options and inputs that have to be the same on all hosts, beside code and settings.

    Returns:
      The connection, and the verdict: what to `do`, and `why`.

    Raises:
      AstraError: host 0 does not answer, or is lost.
    """
    assert hosts.coordinator is not None
    address, port = parse_address(hosts.coordinator, hosts.insecure_public)
    try:
        about = about_this(hosts, own_address(address, port))
        line = Line(reach(address, port, hosts.start_seconds))
        line.limit_silence(SILENCE_SECONDS)
        hello = dataclasses.asdict(about)
        del hello["digest"], hello["same"]
        line.send(**hello)
        _answer(line, lambda: {"body": json.dumps(settings() | dict(_found(address, port + 1, same))).encode()})
        patience = hosts.start_seconds  # or else something else listens there
        while (command := line.receive(patience)).get("do") not in _VERDICTS:
            _do(line, about.address, command, hosts.insecure_public, checkpoints)
            patience = hosts.start_seconds + max(_HASH_SECONDS, 2 * _way_seconds(_MOST_RATE_SECONDS))
    except OSError as error:
        raise AstraError(
            f"host {hosts.host}: host 0 at {address}:{port} is lost ({reason(error)}): see what it says there"
        ) from error
    return line, command | {"why": text(command.get("why", ""))}


def _some(connection: socket.socket, most: int, deadline: float) -> bytes:
    """One byte or more. Raises OSError where none comes in time, or at the end."""
    connection.settimeout(max(deadline - time.monotonic(), 1e-3))
    if not (read := connection.recv(most)):
        raise ConnectionError("it closed the connection")
    return read


def _exactly(connection: socket.socket, count: int, deadline: float) -> bytes:
    """So many bytes. Raises OSError where they do not come in time."""
    read = b""
    while len(read) < count:
        read += _some(connection, count - len(read), deadline)
    return read


# The part of every host


def _as_host_0(*args: Any) -> None:
    with contextlib.suppress(AstraError):  # the others are told of what is wrong with it
        take_part(*args)[0].close()


def _found(address: str, port: int, same: Same) -> Mapping[str, str]:
    """What has to be the same, of a host that reaches JAX's port of host 0."""
    try:
        socket.create_connection((address, port), CONNECT_SECONDS).close()
    except OSError as error:
        why = f"no connection to host 0 at {address}:{port} ({reason(error)})"
        raise AstraError(f"{why}: let TCP to this port through its firewall, too") from error
    return same()


def _answer(line: Line, work: Callable[[], dict[str, Any]]) -> None:
    """Tells host 0 what `work` gives, or why it failed."""
    try:
        message = work()
    except AstraError as error:
        message = {"failed": str(error)[:1000]}
    except OSError as error:
        message = {"failed": reason(error)}
    line.send(**message)


def _do(line: Line, own: str, command: Mapping[str, Any], allow_public: bool, checkpoints: Sequence[Path] = ()) -> None:
    """One command of host 0; "wait" is none, and says only that it is still there."""
    if command.get("do") == "wait":
        return
    if command.get("do") == "digest":
        _answer(line, lambda: {"digest": digest(checkpoints)})
        return
    token, seconds = word(command.get("token")).encode(), number(command.get("seconds"), 0, _MOST_RATE_SECONDS)
    if command.get("do") == "listen":
        _answer(line, lambda: {"rate": _measure_rate(line, own, token, seconds)})
    elif command.get("do") == "call":
        target, port = ip_address(command.get("address")), int(number(command.get("port"), 1, 65535))
        if ipaddress.ip_address(target).is_global and not allow_public:
            raise ConnectionError("it wants a connection to a public address")
        _answer(line, lambda: {"round_trip": _measure_round_trip(target, port, token, seconds)})
    else:
        raise ConnectionError("it wants what is not known here")


# The measurement


def _way_seconds(seconds: float) -> float:
    """The longest that a way can take: to connect, while what was sent before may still drain from a slow link's queue;
    round trips; to send; and to answer."""
    return 2 * (CONNECT_SECONDS + seconds) + _PING_SECONDS + CONNECT_SECONDS + _STRETCH * seconds


def _tuned(data: socket.socket) -> socket.socket:
    """Sends single bytes at once; and to close it is to reset it, which throws away what waits to be sent, with which a
    slow link would be busy for long."""
    data.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    data.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return data


def _measure_round_trip(target: str, port: int, token: bytes, seconds: float) -> float:
    """The source of a way: seconds of a round trip. Then it sends until the target has had enough."""
    try:
        data = _tuned(socket.create_connection((target, port), timeout=CONNECT_SECONDS + seconds))
    except OSError as error:
        raise ConnectionError(
            f"no connection to {target} ({reason(error)}): let TCP to all its ports through the firewalls"
        ) from error
    with data:
        data.sendall(token)
        found, deadline = [], time.monotonic() + _PING_SECONDS
        for _ in range(PINGS):
            start = time.perf_counter()
            data.sendall(b"?")
            _exactly(data, 1, deadline)
            found.append(time.perf_counter() - start)
        block, deadline = os.urandom(1 << 16), time.monotonic() + CONNECT_SECONDS + _STRETCH * seconds
        try:
            while (left := deadline - time.monotonic()) > 0:
                data.settimeout(left)
                data.send(block)
        except ConnectionError:
            return statistics.median(found)
    raise TimeoutError(f"{target} did not get enough of what was sent to it")


def _measure_rate(line: Line, own: str, token: bytes, seconds: float) -> float:
    """The target of a way: bits per second that arrive."""
    with socket.create_server((own, 0)) as server:
        line.send(port=server.getsockname()[1])
        with _accept(server, token, time.monotonic() + 1.2 * (CONNECT_SECONDS + seconds)) as data:
            deadline = time.monotonic() + _PING_SECONDS
            for _ in range(PINGS):
                data.sendall(_exactly(data, 1, deadline))
            return _arriving(data, seconds)


def _accept(server: socket.socket, token: bytes, deadline: float) -> socket.socket:
    """The first connection that begins with the token."""
    while True:
        server.settimeout(max(deadline - time.monotonic(), 1e-3))
        data = _tuned(server.accept()[0])
        with contextlib.suppress(OSError):
            if _exactly(data, len(token), min(deadline, time.monotonic() + HELLO_SECONDS)) == token:
                return data
        data.close()


def _arriving(data: socket.socket, seconds: float) -> float:
    """Bits per second over this time, or longer on a slow link, but for the first part; from one arrival to another."""
    _exactly(data, 1, time.monotonic() + CONNECT_SECONDS)
    start = time.monotonic()
    counted, since, last, room = 0, math.inf, start, bytearray(1 << 18)
    while last < start + seconds or counted < _ENOUGH:
        data.settimeout(max(start + _STRETCH * seconds - time.monotonic(), 1e-3))
        try:
            size = data.recv_into(room)
        except TimeoutError:
            break
        if not size:
            raise ConnectionError("it closed the connection")
        last = time.monotonic()
        if since < math.inf:
            counted += size
        elif last >= start + _WARM_UP * seconds:
            since = last
    if not counted:
        raise TimeoutError(f"less than two packets came in {_STRETCH * seconds:g} s: try a larger --rate-seconds")
    return 8 * counted / (last - since)


# The part of host 0


def _hear(line: Line, seconds: float, most: int = 0) -> dict[str, Any]:
    """The next message. Raises OSError also for one that says that something has `failed` there."""
    message = line.receive(seconds, most)
    if "failed" in message:
        raise ConnectionError(text(message["failed"]))
    return message


def _hear_same(members: Sequence[Member]) -> list[str]:
    """Waits for the hosts to find out what has to be the same. Returns what went wrong."""
    problems = []
    for member in members:
        try:
            same = told(_hear(member.line, _FIND_SECONDS, MOST_TOLD).get("body", b"{}"))
            member.about = dataclasses.replace(member.about, same=same)
        except OSError as error:
            member.about = dataclasses.replace(member.about, same=None)
            if not member.line.fate():
                problems.append(f"{member.about}: {reason(error)}")
    return problems


def _hear_digests(members: Sequence[Member]) -> list[str]:
    """Lets the hosts read their checkpoints, all at once. Returns what went wrong."""
    problems = []
    for member in members:
        with contextlib.suppress(OSError):  # it is lost, which shows soon
            member.line.send(do="digest")
    for member in members:
        try:
            said = _hear(member.line, _HASH_SECONDS).get("digest")
            member.about = dataclasses.replace(member.about, digest=None if said is None else word(said))
        except OSError as error:
            if not member.line.fate():
                problems.append(f"{member.about} has not read its checkpoint: {reason(error)}")
    return problems


def _measure_pairs(members: Sequence[Member], seconds: float) -> list[Pair]:
    """One pair after the other, up to where a host is gone."""
    pairs = []
    with progress("pairs", math.comb(len(members), 2)) as advance:
        for a, b in itertools.combinations(members, 2):
            if any(member.line.fate() for member in members):
                break
            for member in members:
                with contextlib.suppress(OSError):
                    member.line.send(do="wait")
            pairs.append(Pair(_measure(a, b, seconds), _measure(b, a, seconds)))
            advance(hosts=f"{a.about.host} - {b.about.host}")
    return pairs


def _failures(pairs: Sequence[Pair]) -> list[str]:
    """The first failure of all pairs, and how many more there are."""
    failed = [way for pair in pairs for way in (pair.there, pair.back) if way.failure]
    more = f" (and {len(failed) - 1} more: see the table)" if failed[1:] else ""
    return [f"from host {way.source} to host {way.target}: {way.failure}{more}" for way in failed[:1]]


def _gloo_note(about: About) -> str:
    """What is said where a host's name would lead gloo astray; empty where it does not."""
    if about.resolves and not about.resolves.startswith("127."):
        return ""
    if about.address.startswith("127."):
        return ""
    where = f"leads to {about.resolves}, which no other host reaches" if about.resolves else "is not known to itself"
    return f"{about}: its name {where}; gloo would listen there, but astra gives it {about.address}: nothing to do"


def _measure(source: Member, target: Member, seconds: float) -> Way:
    """One direction between two hosts."""
    token, failures = secrets.token_hex(16), list[str]()
    way, limit = Way(source.about.host, target.about.host), _way_seconds(seconds)

    def ask(member: Member, field: str, most: int | float, **command: Any) -> float | None:
        try:
            if command:
                member.line.send(**command, token=token, seconds=seconds)
            return number(_hear(member.line, limit).get(field), 0, most)
        except OSError as error:
            failures.append(f"host {member.about.host}: {reason(error)}")
            return None

    port = ask(target, "port", 65535, do="listen")
    if port is not None:
        address = target.about.address
        round_trip = ask(source, "round_trip", limit, do="call", address=address, port=int(port))
        way = dataclasses.replace(way, round_trip=round_trip, rate=ask(target, "rate", _MOST_RATE))
    return dataclasses.replace(way, failure=failures[0] if failures else "")
