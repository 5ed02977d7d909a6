"""Who comes when several hosts meet at host 0, and whether all have what has to be the same.

Every host connects to host 0 and tells about itself, over plain TCP, before anything of JAX is started. Nothing that
comes from elsewhere is trusted: numbers have limits, texts are cut and made printable, and whoever does not speak like
a host is ignored.
"""

import contextlib
import dataclasses
import errno
import ipaddress
import json
import re
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from astra_jax.errors import AstraError
from astra_jax.hosts.agreement import NOT_GIVEN, versions
from astra_jax.hosts.connection import Line
from astra_jax.hosts.options import Hosts

HELLO_SECONDS = 2.0  # a stranger who says nothing holds up the others for so long
CONNECT_SECONDS = 5.0
SILENCE_SECONDS = 15.0  # of a host's system, until the lifeline watches; a slow link's full queue takes 5
MOST_TOLD = 1 << 18  # bytes of settings, options and inputs that a host may tell
_MOST_NAMES = 1000
_MOST_SAID = 3  # differences in one line


@dataclasses.dataclass(frozen=True)
class About:
    """What a host tells about itself.

    Attributes:
      host, hosts: its number, and how many it expects.
      address: its own, on the way to the coordinator.
      name: its host name.
      resolves: the address that it finds under its own name, where gloo would listen by itself; empty for none.
      versions: what is installed, by name.
      digest: `astra_jax.hosts.agreement.digest` of its checkpoints; None where it was given none.
      same: settings, options and inputs that have to be the same; None where they could not be found out.
    """

    host: int
    hosts: int
    address: str
    name: str
    resolves: str
    versions: Mapping[str, str]
    digest: str | None = None
    same: Mapping[str, str] | None = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return f"host {self.host} ({self.name}, {self.address})"


@dataclasses.dataclass
class Member:
    """A host, and how to talk to it."""

    about: About
    line: Line


class Meeting(NamedTuple):
    """Who came.

    Attributes:
      members: the hosts that came, by number.
      absent: who did not, in a sentence; empty where all did.
      problems: why hosts cannot take part, each in a sentence.
      notes: what is unusual, and no problem.
    """

    members: list[Member]
    absent: list[str]
    problems: list[str]
    notes: list[str]


def listen(address: str, port: int) -> socket.socket:
    """A socket of host 0 at this address. Raises AstraError where it cannot be had."""
    try:
        return socket.create_server((address, port))
    except OSError as error:
        why = f"host 0 cannot listen there ({reason(error)}): give a port from 1024 to 65534"
        if error.errno == errno.EADDRINUSE:
            with socket.create_server((address, 0)) as free:
                other = free.getsockname()[1]
            why = f"the port is in use: end what uses it, or try --coordinator {address}:{other} on every host"
        elif error.errno == errno.EADDRNOTAVAIL:
            why = "it is not an address of this host: give that of host 0, and --host 0 on this host alone"
        raise AstraError(f"--coordinator: host 0 needs {address}:{port}, and {why}") from error


def reach(address: str, port: int, seconds: float) -> socket.socket:
    """A connection to host 0, which may start later than this host."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((address, port), timeout=CONNECT_SECONDS)
        except OSError as error:
            if time.monotonic() >= deadline:
                raise AstraError(
                    f"nothing answers at --coordinator {address}:{port} within {seconds:g} s ({reason(error)}): start "
                    f"the same command there with --host 0, and let TCP to port {port} through its firewall"
                ) from error
            time.sleep(min(0.2, seconds))


def about_this(hosts: Hosts, address: str) -> About:
    """What this host tells about itself at first; what takes longer comes later."""
    assert hosts.host is not None and hosts.hosts is not None
    name = socket.gethostname()
    try:
        resolves = socket.gethostbyname(name)
    except OSError:
        resolves = ""
    return About(hosts.host, hosts.hosts, address, name, resolves, versions())


def meet(server: socket.socket, N: int, seconds: float) -> Meeting:
    """Waits at host 0 for N hosts, itself included."""
    there, refused, strangers = dict[int, Member](), list[tuple[int, str]](), dict[str, None]()
    port, deadline = server.getsockname()[1], time.monotonic() + seconds
    while len(there) + len(refused) < N and (left := deadline - time.monotonic()) > 0:
        server.settimeout(left)
        try:
            connection, (address, _) = server.accept()
        except TimeoutError:
            break
        line = Line(connection)
        line.limit_silence(SILENCE_SECONDS)
        there = {host: member for host, member in there.items() if not member.line.fate()}  # they may come again
        try:
            about = _about(line.receive(HELLO_SECONDS))
            line.send(do="wait")
        except OSError:
            line.close()
            strangers[address] = None
            continue
        if why := _refusal(about, N, there):
            refused.append((about.host, why))
            with contextlib.suppress(OSError):
                line.send(do="end", why=why)
            line.close()
        else:
            there[about.host] = Member(about, line)
    absent = []
    if missing := sorted(set(range(N)) - set(there) - {host for host, _ in refused}):
        absent.append(
            f"{names_of(missing)} did not come (--start-seconds is {seconds:g}): start the same command there with "
            f"{' and '.join(f'--host {host}' for host in missing[:3])}, and let TCP to port {port} of host 0 through"
        )
    notes = [f"something at {address} connected that is no host of this command: ignored" for address in strangers]
    return Meeting([there[host] for host in sorted(there)], absent, [why for _, why in refused], notes[:3])


def _about(message: Mapping[str, Any]) -> About:
    """What a host says of itself. Raises OSError for anything else."""
    hosts, found = int(number(message.get("hosts"), 1, 1e6)), message.get("versions")
    if not isinstance(found, dict):
        raise ConnectionError("it sent no versions")
    word(found.get("astra_jax"))  # earlier versions know fewer others
    return About(
        int(number(message.get("host"), 0, hosts - 1)),
        hosts,
        ip_address(message.get("address")),
        word(message.get("name")),
        word(message.get("resolves")),
        {name: word(found.get(name, "none")) for name in versions()},
    )


def told(body: bytes) -> dict[str, str]:
    """What a host tells that has to be the same. Raises OSError for anything else."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or len(found) > _MOST_NAMES:
        raise ConnectionError("it sent what is no table of names and values")
    return {text(name)[:100]: text(value)[:200] for name, value in found.items()}


def _refusal(about: About, N: int, there: Mapping[int, Member]) -> str:
    """Why a host cannot take part; empty if it can."""
    if about.hosts != N:
        return f"{about} has --hosts {about.hosts}, and host 0 has {N}: give the same on every host"
    if about.host in there:
        return f"{there[about.host].about} and {about} have the same number: give each host another --host"
    return ""


def differences(abouts: Sequence[About]) -> list[str]:
    """What is not the same on all hosts, each in a sentence; after a few of them, how many more there are."""
    found, sure = list[str](), [about for about in abouts if about.same is not None]
    for name in versions():
        found += _difference(f"{name} is", {about.host: about.versions[name] for about in abouts}, "install the same")
    for name in dict.fromkeys(name for about in sure for name in about.same or ()):
        values = {about.host: (about.same or {}).get(name, NOT_GIVEN) for about in sure}
        found += _difference(f"{name} is", values, "give the same on every host")
    digests = {about.host: (about.digest or NOT_GIVEN)[:12] for about in sure}
    found += _difference("the checkpoint's hash is", digests, "copy the folder of host 0 to the others")
    more = len(found) - _MOST_SAID
    return [*found[:_MOST_SAID], *[f"and {more} more difference{'s' * (more > 1)}"] * (more > 0)]


def _difference(what: str, values: Mapping[int, str], fix: str) -> list[str]:
    groups: dict[str, list[int]] = {}
    for host, value in values.items():
        groups.setdefault(value, []).append(host)
    if len(groups) < 2:
        return []
    return [f"{what} {' and '.join(f'{value} on {names_of(group)}' for value, group in groups.items())}: {fix}"]


# What comes from elsewhere


def reason(error: OSError) -> str:
    """Why something failed, in a few words."""
    return error.strerror or str(error)


def text(value: Any) -> str:
    """What another host says, fit to be printed, also in a table, where brackets have a meaning."""
    return "".join(c if c.isprintable() else " " for c in str(value)[:1000]).replace("[", "(")


def word(value: Any) -> str:
    """A name or a version. Raises OSError for another type."""
    if not isinstance(value, str):
        raise ConnectionError(f"it sent {type(value).__name__} instead of text")
    return re.sub(r"[^\w.+-]", "?", value[:64], flags=re.ASCII)


def number(value: Any, least: int | float, most: int | float) -> float:
    """A number within limits. Raises OSError for anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        raise ConnectionError("it sent what is no number, or is out of range")
    return float(value)


def ip_address(value: Any) -> str:
    """An IPv4 address. Raises OSError for anything else."""
    try:
        return str(ipaddress.IPv4Address(word(value)))
    except ValueError:
        raise ConnectionError("it sent what is no address") from None


def names_of(numbers: Iterable[int]) -> str:
    """[2, 3] -> "hosts 2, 3"."""
    names = list(map(str, numbers))
    return f"host{'s' if names[1:] else ''} {', '.join(names)}"
