"""Whether several hosts can work together, found out over plain TCP before JAX would only hang.

All connect to host 0, which asks them one after the other: each host tells about itself, and every pair measures the
way between them in both directions, one at a time. A message is a JSON object on a line. Nothing that comes from
elsewhere is trusted: lines, numbers and times have limits, texts are cut and made printable, and whoever does not speak
like a host of this check is ignored. Nothing is encrypted; every host listens at its own address alone.
"""

import contextlib
import dataclasses
import errno
import hashlib
import importlib.metadata
import ipaddress
import itertools
import json
import math
import os
import platform
import re
import secrets
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from astra_jax import __version__
from astra_jax.cluster import Hosts, check, own_address, parse_address
from astra_jax.console import progress
from astra_jax.errors import AstraError

RATE_SECONDS = 2.0  # of sending, in each direction of a pair
PINGS = 20  # round trips, of which the median counts

_LINE = 8192  # bytes of a message
_HELLO_SECONDS = 2.0  # a stranger who says nothing holds up the others for so long
_HASH_SECONDS = 600.0  # to read a checkpoint
_CONNECT_SECONDS = 5.0
_PING_SECONDS = 10.0
_MOST_RATE_SECONDS = 60.0
_MOST_RATE = 1e15  # bits per second
_ENOUGH = 64_000  # bytes: where fewer arrive in time, losses distort the rate
_STRETCH = 4  # times as long as it should take is the longest to wait for enough
_WARM_UP = 1 / 3  # of the time: TCP starts slowly, and a shaped link lets the first bytes pass at once
_PACKAGES = ("jax", "jaxlib", "flax")


@dataclasses.dataclass(frozen=True)
class About:
    """What a host tells about itself.

    Attributes:
      host, hosts: its number, and how many it expects.
      address: its own, on the way to the coordinator.
      name: its host name.
      resolves: the address that it finds under its own name, where gloo would listen by itself; empty for none.
      versions: what is installed, by name.
      digest: `folder_digest` of its checkpoint; None where it was given none.
    """

    host: int
    hosts: int
    address: str
    name: str
    resolves: str
    versions: Mapping[str, str]
    digest: str | None = None

    def __str__(self) -> str:
        return f"host {self.host} ({self.name}, {self.address})"


@dataclasses.dataclass(frozen=True)
class Way:
    """One direction between two hosts.

    Attributes:
      source, target: numbers of the hosts; the source connects and sends.
      round_trip: seconds of one byte there and back, the median of `PINGS`.
      rate: bits per second that arrived at the target.
      failure: why there is no round trip or rate; empty where all went well.
    """

    source: int
    target: int
    round_trip: float | None = None
    rate: float | None = None
    failure: str = ""


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two hosts, in both directions."""

    there: Way
    back: Way

    @property
    def round_trip(self) -> float | None:
        """Seconds: the shorter of both, as either may have waited for what was sent before it."""
        return min((way.round_trip for way in (self.there, self.back) if way.round_trip), default=None)

    @property
    def failure(self) -> str:
        """What went wrong; empty where all went well."""
        return "; ".join(way.failure for way in (self.there, self.back) if way.failure)


@dataclasses.dataclass(frozen=True)
class Findings:
    """What host 0 found; the other hosts learn of the problems alone.

    Attributes:
      hosts: those that came, by number.
      pairs: of these, the lower number first.
      notes: what is unusual, and no problem.
      problems: what to fix, each in a sentence.
    """

    hosts: tuple[About, ...] = ()
    pairs: tuple[Pair, ...] = ()
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def slowest(self) -> Way | None:
        """The way with the lowest rate; None where none was measured."""
        ways = [way for pair in self.pairs for way in (pair.there, pair.back) if way.rate]
        return min(ways, key=lambda way: way.rate or 0.0, default=None)

    @property
    def round_trip(self) -> float:
        """The longest of all pairs, in seconds; 0 where none was measured."""
        return max((pair.round_trip or 0.0 for pair in self.pairs), default=0.0)


def versions() -> dict[str, str]:
    """What has to be the same on all hosts: of Python, releases with the same first two numbers are."""
    installed = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"astra_jax": __version__, **installed, "Python": ".".join(platform.python_version_tuple()[:2])}


def folder_digest(folder: Path) -> str:
    """SHA-256 in hexadecimal of all files in a folder: of names, relative to it and sorted, lengths and contents."""
    found = hashlib.sha256()
    for path in sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.relative_to(folder).as_posix()):
        found.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    return found.hexdigest()


def check_hosts(hosts: Hosts, checkpoint: Path | None = None, rate_seconds: float = RATE_SECONDS) -> Findings:
    """Checks, on all hosts at once, that they reach each other and have the same versions and checkpoint.

    Args:
      hosts: which hosts, and which of them this is.
      checkpoint: a folder that should be the same everywhere.
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
    address, port = parse_address(hosts.coordinator, hosts.insecure_public)
    if hosts.host:
        return Findings(problems=_take_part(hosts, address, port, checkpoint))
    _server(address, port + 1).close()  # where JAX will listen
    with _server(address, port) as server:
        # Host 0 is measured as all others are.
        threading.Thread(target=_as_host_0, args=(hosts, address, port, checkpoint), daemon=True).start()
        return _coordinate(server, hosts.hosts, hosts.start_seconds, rate_seconds)


def _server(address: str, port: int) -> socket.socket:
    try:
        return socket.create_server((address, port))
    except OSError as error:
        why = f"host 0 cannot listen there ({_reason(error)}): give a port from 1024 to 65534"
        if error.errno == errno.EADDRINUSE:
            with socket.create_server((address, 0)) as free:
                other = free.getsockname()[1]
            why = f"the port is in use: end what uses it, or try --coordinator {address}:{other} on every host"
        elif error.errno == errno.EADDRNOTAVAIL:
            why = "it is not an address of this host: give that of host 0, and --host 0 on this host alone"
        raise AstraError(f"--coordinator: host 0 needs {address}:{port}, and {why}") from error


# Messages


class _Channel:
    """Messages from and to one other host. What goes wrong is an OSError, after which there are no more messages."""

    def __init__(self, connection: socket.socket):
        self._connection, self._read, self._lost = connection, b"", False

    def send(self, **message: Any) -> None:
        """Sends a message."""
        self._check()
        self._connection.settimeout(_CONNECT_SECONDS)
        self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float) -> dict[str, Any]:
        """The next message. Raises also for one that says that something has `failed` there, and may be heard again."""
        self._check()
        deadline = time.monotonic() + seconds
        try:
            while b"\n" not in self._read:
                if len(self._read) > _LINE:
                    raise ConnectionError("it sent a line that is too long")
                self._read += _some(self._connection, _LINE, deadline)
            line, _, self._read = self._read.partition(b"\n")
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                message = None
            if not isinstance(message, dict):
                raise ConnectionError("it sent what is no message")
        except OSError:
            self.close()
            raise
        if "failed" in message:
            raise ConnectionError(_text(message["failed"]))
        return message

    def close(self) -> None:
        """After an error: what comes later would answer an earlier question."""
        self._lost = True
        self._connection.close()

    def _check(self) -> None:
        if self._lost:
            raise ConnectionError("it is lost")


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


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _text(value: Any) -> str:
    """What another host says, fit to be printed, also in a table, where brackets have a meaning."""
    return "".join(c if c.isprintable() else " " for c in str(value)[:1000]).replace("[", "(")


def _word(value: Any) -> str:
    """A name or a version. Raises OSError for another type."""
    if not isinstance(value, str):
        raise ConnectionError(f"it sent {type(value).__name__} instead of text")
    return re.sub(r"[^\w.+-]", "?", value[:64], flags=re.ASCII)


def _number(value: Any, least: int | float, most: int | float) -> float:
    """A number within limits. Raises OSError for anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        raise ConnectionError("it sent what is no number, or is out of range")
    return float(value)


def _address(value: Any) -> str:
    """An IPv4 address. Raises OSError for anything else."""
    try:
        return str(ipaddress.IPv4Address(_word(value)))
    except ValueError:
        raise ConnectionError("it sent what is no address") from None


# The part of every host


def _take_part(hosts: Hosts, address: str, port: int, checkpoint: Path | None) -> tuple[str, ...]:
    """Does what host 0 says until it is done. Returns what it found to be wrong."""
    try:
        about = _about_this(hosts, own_address(address, port))
        with _reach(address, port, hosts.start_seconds) as connection:
            channel = _Channel(connection)
            told = dataclasses.asdict(about)
            del told["digest"]  # comes later: it can take long
            channel.send(**told)
            _answer(channel, lambda: {"digest": folder_digest(checkpoint) if checkpoint else None})
            patience = hosts.start_seconds + _HASH_SECONDS
            while (command := channel.receive(patience)).get("do") != "end":
                _do(channel, about.address, command, hosts.insecure_public)
                patience = 2 * _way_seconds(_MOST_RATE_SECONDS)
    except OSError as error:
        raise AstraError(
            f"host {hosts.host}: host 0 at {address}:{port} is lost ({_reason(error)}): see what it says there"
        ) from error
    why = _text(command.get("why", ""))
    return (why,) if why else ()


def _as_host_0(*args: Any) -> None:
    with contextlib.suppress(AstraError, OSError):  # the coordinator sees that it is lost
        _take_part(*args)


def _about_this(hosts: Hosts, address: str) -> About:
    assert hosts.host is not None and hosts.hosts is not None
    name = socket.gethostname()
    try:
        resolves = socket.gethostbyname(name)
    except OSError:
        resolves = ""
    return About(hosts.host, hosts.hosts, address, name, resolves, versions())


def _reach(address: str, port: int, seconds: float) -> socket.socket:
    """A connection to host 0, which may start later than this host."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((address, port), timeout=_CONNECT_SECONDS)
        except OSError as error:
            if time.monotonic() >= deadline:
                raise AstraError(
                    f"nothing answers at --coordinator {address}:{port} within {seconds:g} s ({_reason(error)}): start "
                    f"the same command there with --host 0, and let TCP to port {port} through its firewall"
                ) from error
            time.sleep(min(0.2, seconds))


def _answer(channel: _Channel, work: Callable[[], dict[str, Any]]) -> None:
    """Tells host 0 what `work` gives, or why it failed."""
    try:
        message = work()
    except OSError as error:
        message = {"failed": _reason(error)}
    channel.send(**message)


def _do(channel: _Channel, own: str, command: Mapping[str, Any], allow_public: bool) -> None:
    """One command of host 0; "wait" is none, and says only that it is still there."""
    if command.get("do") == "wait":
        return
    token, seconds = _word(command.get("token")).encode(), _number(command.get("seconds"), 0, _MOST_RATE_SECONDS)
    if command.get("do") == "listen":
        _answer(channel, lambda: {"rate": _measure_rate(channel, own, token, seconds)})
    elif command.get("do") == "call":
        target, port = _address(command.get("address")), int(_number(command.get("port"), 1, 65535))
        if ipaddress.ip_address(target).is_global and not allow_public:
            raise ConnectionError("it wants a connection to a public address")
        _answer(channel, lambda: {"round_trip": _measure_round_trip(target, port, token, seconds)})
    else:
        raise ConnectionError("it wants what is not known here")


# The measurement


def _way_seconds(seconds: float) -> float:
    """The longest that a way can take: to connect, while what was sent before may still drain from a slow link's queue;
    round trips; to send; and to answer."""
    return 2 * (_CONNECT_SECONDS + seconds) + _PING_SECONDS + _CONNECT_SECONDS + _STRETCH * seconds


def _tuned(data: socket.socket) -> socket.socket:
    """Sends single bytes at once; and to close it is to reset it, which throws away what waits to be sent, with which a
    slow link would be busy for long."""
    data.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    data.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return data


def _measure_round_trip(target: str, port: int, token: bytes, seconds: float) -> float:
    """The source of a way: seconds of a round trip. Then it sends until the target has had enough."""
    try:
        data = _tuned(socket.create_connection((target, port), timeout=_CONNECT_SECONDS + seconds))
    except OSError as error:
        raise ConnectionError(
            f"no connection to {target} ({_reason(error)}): let TCP to all its ports through the firewalls"
        ) from error
    with data:
        data.sendall(token)
        found, deadline = [], time.monotonic() + _PING_SECONDS
        for _ in range(PINGS):
            start = time.perf_counter()
            data.sendall(b"?")
            _exactly(data, 1, deadline)
            found.append(time.perf_counter() - start)
        block, deadline = os.urandom(1 << 16), time.monotonic() + _CONNECT_SECONDS + _STRETCH * seconds
        try:
            while (left := deadline - time.monotonic()) > 0:
                data.settimeout(left)
                data.send(block)
        except ConnectionError:
            return statistics.median(found)
    raise TimeoutError(f"{target} did not get enough of what was sent to it")


def _measure_rate(channel: _Channel, own: str, token: bytes, seconds: float) -> float:
    """The target of a way: bits per second that arrive."""
    with socket.create_server((own, 0)) as server:
        channel.send(port=server.getsockname()[1])
        with _accept(server, token, time.monotonic() + 1.2 * (_CONNECT_SECONDS + seconds)) as data:
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
            if _exactly(data, len(token), min(deadline, time.monotonic() + _HELLO_SECONDS)) == token:
                return data
        data.close()


def _arriving(data: socket.socket, seconds: float) -> float:
    """Bits per second over this time, or longer on a slow link, but for the first part; from one arrival to another."""
    _exactly(data, 1, time.monotonic() + _CONNECT_SECONDS)
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


@dataclasses.dataclass
class _Member:
    """A host, and how to talk to it."""

    about: About
    channel: _Channel


def _coordinate(server: socket.socket, N: int, start_seconds: float, rate_seconds: float) -> Findings:
    with contextlib.ExitStack() as stack:
        members, problems, notes = _meet(server, N, start_seconds, stack)
        problems += _hear_digests(members)
        abouts = [member.about for member in members]
        problems += _differences(abouts)
        pairs = []
        with progress("pairs", math.comb(len(members), 2)) as advance:
            for a, b in itertools.combinations(members, 2):
                for member in members:
                    with contextlib.suppress(OSError):  # it is lost, which its pairs will show
                        member.channel.send(do="wait")
                pairs.append(Pair(_measure(a, b, rate_seconds), _measure(b, a, rate_seconds)))
                advance(hosts=f"{a.about.host} - {b.about.host}")
        problems += _failures(pairs)
        for member in members:
            with contextlib.suppress(OSError):
                member.channel.send(do="end", why="; ".join(problems)[:1000])
    notes += [note for about in abouts if (note := _gloo_note(about))]
    return Findings(tuple(abouts), tuple(pairs), tuple(notes), tuple(problems))


def _meet(
    server: socket.socket, N: int, seconds: float, stack: contextlib.ExitStack
) -> tuple[list[_Member], list[str], list[str]]:
    """The hosts that come in time, by number, with problems and notes. Connections are closed by the stack."""
    there, refused, strangers = dict[int, _Member](), list[tuple[int, str]](), dict[str, None]()
    port, deadline = server.getsockname()[1], time.monotonic() + seconds
    while len(there) + len(refused) < N and (left := deadline - time.monotonic()) > 0:
        server.settimeout(left)
        try:
            connection, (address, _) = server.accept()
        except TimeoutError:
            break
        channel = _Channel(stack.enter_context(connection))
        try:
            about = _about(channel.receive(_HELLO_SECONDS))
        except OSError:
            channel.close()
            strangers[address] = None
            continue
        if why := _refusal(about, N, there):
            refused.append((about.host, why))
            with contextlib.suppress(OSError):
                channel.send(do="end", why=why)
        else:
            there[about.host] = _Member(about, channel)
    problems = [why for _, why in refused]
    if missing := sorted(set(range(N)) - set(there) - {host for host, _ in refused}):
        problems.append(
            f"{_hosts(missing)} did not come (--start-seconds is {seconds:g}): start the same command there with "
            f"{' and '.join(f'--host {host}' for host in missing[:3])}, and let TCP to port {port} of host 0 through"
        )
    notes = [f"something at {address} connected that is no `astra net check`: ignored" for address in strangers]
    return [there[host] for host in sorted(there)], problems, notes[:3]


def _about(message: Mapping[str, Any]) -> About:
    """What a host says of itself. Raises OSError for anything else."""
    hosts, found = int(_number(message.get("hosts"), 1, 1e6)), message.get("versions")
    if not isinstance(found, dict):
        raise ConnectionError("it sent no versions")
    return About(
        int(_number(message.get("host"), 0, hosts - 1)),
        hosts,
        _address(message.get("address")),
        _word(message.get("name")),
        _word(message.get("resolves")),
        {name: _word(found.get(name)) for name in versions()},
    )


def _refusal(about: About, N: int, there: Mapping[int, _Member]) -> str:
    """Why a host cannot take part; empty if it can."""
    if about.hosts != N:
        return f"{about} has --hosts {about.hosts}, and host 0 has {N}: give the same on every host"
    if about.host in there:
        return f"{there[about.host].about} and {about} have the same number: give each host another --host"
    return ""


def _hear_digests(members: Sequence[_Member]) -> list[str]:
    """Waits for the hosts to read their checkpoints. Returns what went wrong."""
    problems = []
    for member in members:
        try:
            said = member.channel.receive(_HASH_SECONDS).get("digest")
            member.about = dataclasses.replace(member.about, digest=None if said is None else _word(said))
        except OSError as error:
            problems.append(f"{member.about} has not read its checkpoint: {_reason(error)}")
    return problems


def _differences(abouts: Sequence[About]) -> list[str]:
    """What is not the same on all hosts, each in a sentence."""
    found = []
    for name in versions():
        found += _difference(f"{name} is", {about.host: about.versions[name] for about in abouts}, "install the same")
    digests = {about.host: (about.digest or "not given")[:12] for about in abouts}
    return found + _difference("the checkpoint's hash is", digests, "copy the folder of host 0 to the others")


def _failures(pairs: Sequence[Pair]) -> list[str]:
    """The first failure of all pairs, and how many more there are."""
    failed = [way for pair in pairs for way in (pair.there, pair.back) if way.failure]
    more = f" (and {len(failed) - 1} more: see the table)" if failed[1:] else ""
    return [f"from host {way.source} to host {way.target}: {way.failure}{more}" for way in failed[:1]]


def _difference(what: str, values: Mapping[int, str], fix: str) -> list[str]:
    groups: dict[str, list[int]] = {}
    for host, value in values.items():
        groups.setdefault(value, []).append(host)
    if len(groups) < 2:
        return []
    return [f"{what} {' and '.join(f'{value} on {_hosts(group)}' for value, group in groups.items())}: {fix}"]


def _hosts(numbers: Iterable[int]) -> str:
    """[2, 3] -> "hosts 2, 3"."""
    names = list(map(str, numbers))
    return f"host{'s' if names[1:] else ''} {', '.join(names)}"


def _gloo_note(about: About) -> str:
    """What is said where a host's name would lead gloo astray; empty where it does not."""
    if about.resolves and not about.resolves.startswith("127."):
        return ""
    if about.address.startswith("127."):
        return ""
    where = f"leads to {about.resolves}, which no other host reaches" if about.resolves else "is not known to itself"
    return f"{about}: its name {where}; gloo would listen there, but astra gives it {about.address}: nothing to do"


def _measure(source: _Member, target: _Member, seconds: float) -> Way:
    """One direction between two hosts."""
    token, failures = secrets.token_hex(16), list[str]()
    way, limit = Way(source.about.host, target.about.host), _way_seconds(seconds)

    def ask(member: _Member, field: str, most: int | float, **command: Any) -> float | None:
        try:
            if command:
                member.channel.send(**command, token=token, seconds=seconds)
            return _number(member.channel.receive(limit).get(field), 0, most)
        except OSError as error:
            failures.append(f"host {member.about.host}: {_reason(error)}")
            return None

    port = ask(target, "port", 65535, do="listen")
    if port is not None:
        address = target.about.address
        round_trip = ask(source, "round_trip", limit, do="call", address=address, port=int(port))
        way = dataclasses.replace(way, round_trip=round_trip, rate=ask(target, "rate", _MOST_RATE))
    return dataclasses.replace(way, failure=failures[0] if failures else "")
