"""Hosts that compute together, each with a program of its own: who takes part, and one pass after the other.

Host 0 is where the user is: it takes in other hosts, says what is to be read, has all compile what is new, and lets a
pass begin. A host that is gone is not waited for: the pass goes on without its tokens, and the next one is split over
those that are left. A host that comes takes part from the next pass on.
"""

import dataclasses
import itertools
import json
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from astra_jax.errors import AstraError
from astra_jax.hosts import ways
from astra_jax.hosts.agreement import differences
from astra_jax.hosts.control import Connection, Event, Host0, Message, quietly
from astra_jax.hosts.datagrams import MOST_TOLD, Datagrams, Late, Tally
from astra_jax.hosts.invitation import Invitation
from astra_jax.hosts.remote import Peer
from astra_jax.hosts.split import Parts, Split

UDP_SECONDS = 15.0  # until two hosts hear each other, or a firewall is between them
COMPILE_SECONDS = 1800.0
MOST_BODY = MOST_TOLD - (1 << 16)  # bytes of a request that go in packets
MOST_ASKED = 256  # who wait for an answer at once
DONE_SECONDS = 1.0  # that others may take to say how a pass was for them
TOLD_OF_TALLY = ("sent", "received", "again", "missing", "left_out", "waited", "dropped")

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Seat:
    """One host's place in a pass.

    Attributes:
      order: numbers of the hosts, in the order of their shards; the last is host 0.
      index: which of these is here.
      parts: of the tokens, that each has; None where all get as many.
    """

    order: tuple[int, ...]
    index: int
    parts: Parts | None = None


class Taken(NamedTuple):
    """How a pass was for one host."""

    host: int
    seconds: float
    tally: Tally


class Passed(NamedTuple):
    """How a pass was.

    Attributes:
      here: for this host.
      all: for all hosts, this one first; what others say is waited for.
    """

    here: Taken
    all: Callable[[], list[Taken]]


@dataclasses.dataclass
class Member:
    """Another host: its number, which is never another one's, its name, where its datagrams come from, its connection,
    and whether it has loaded what it needs."""

    number: int
    name: str
    where: Peer
    connection: Connection
    ready: bool = False

    def __str__(self) -> str:
        return f"host {self.number} ({self.name}, {self.where.address})"


@runtime_checkable
class Offer(Protocol):
    """What is given to hosts that come for a copy. What cannot be given ends the connection of who asked."""

    def listing(self) -> bytes:
        """What there is."""

    def piece(self, asked: Message) -> bytes:
        """A part of it."""


class Client(NamedTuple):
    """Who asks for an answer, and what it said."""

    connection: Connection
    message: Message


def about(same: Mapping[str, str], port: int = 0) -> Message:
    """What a host says of itself when it comes.

    Args:
      same: what has to be the same on all hosts, by name.
      port: where it gets datagrams.
    """
    return {"role": "host", "name": socket.gethostname(), "same": dict(same), "port": port}


class Company:
    """Host 0, and who is with it.

    Args:
      address, port: where to listen, by TCP and UDP; port 0 for any.
      secret: what all hosts know.
      same: what has to be the same on all of them, by name.
      welcome: what every host is told when it comes.
      late: what becomes of codes that are late.
      adapts: whether fewer groups of codes are sent where more would be late.
      offer: what is given to hosts that come for a copy; None for nothing.
      told: is told in a line who comes and goes.

    Attributes:
      link: of this host's programs.
      asked: who asks for an answer; whoever is too many is told that hosts are busy.

    Raises:
      AstraError: a port is in use, or the address is not this host's.
    """

    def __init__(
        self,
        address: str,
        port: int,
        secret: bytes,
        same: Mapping[str, str],
        welcome: Message,
        late: Late = "wait",
        adapts: bool = False,
        offer: Offer | None = None,
        told: Callable[[str], Any] = lambda line: None,
    ):
        self._host0 = Host0(address, port, secret)
        try:
            self.link = _same_port(address, self._host0.port, late, any_other=not port)
        except AstraError:
            self._host0.close()
            raise
        self._same, self._welcome, self._told, self._late, self._offer = dict(same), welcome, told, late, offer
        self._key = secrets.token_bytes(32)
        self.link.adapts = adapts
        self.link.enter(0, self._key)
        self.invitation = Invitation(address, self._host0.port, secret)
        self.asked = queue.Queue[Client](MOST_ASKED)
        self._members: dict[int, Member] = {}
        self._changed = threading.Condition()
        self._replies: dict[tuple[str, int, int], Message] = {}  # (kind, pass, host)
        self._count = self._passes = 0
        self._split = Split()
        threading.Thread(target=self._listen, daemon=True, name="company").start()

    def close(self) -> None:
        """Ends it for all."""
        self._host0.close()
        self.link.close()

    @property
    def members(self) -> list[Member]:
        """The other hosts that can take part."""
        with self._changed:
            return [member for member in self._members.values() if member.ready]

    @property
    def strangers(self) -> int:
        """How many connected, and did not know the secret."""
        return self._host0.strangers

    # Who comes and goes

    def _listen(self) -> None:
        while True:
            event = self._host0.events.get()
            try:
                self._happened(event)
            except (KeyError, TypeError, ValueError, OSError):  # an odd message ends its own connection alone
                event.connection.close()

    def _happened(self, event: Event) -> None:
        connection, message, member = event.connection, event.message, event.connection.note
        if event.kind == "joined":
            self._joined(connection, message)
        elif isinstance(member, Member):
            if event.kind == "said":
                self._said(member, message)
            else:
                self._left(member)
        elif connection.note is self._offer and self._offer and event.kind == "said":
            connection.send(self._offer.piece(message), kind="piece")

    def _joined(self, connection: Connection, hello: Message) -> None:
        role = hello.get("role")
        if role == "host":
            self._take_in(connection, hello)
        elif role == "copy" and self._offer:
            connection.note = self._offer
            connection.send(self._offer.listing(), kind="files")
        elif role != "client":
            connection.close()
        else:
            try:
                self.asked.put_nowait(Client(connection, hello))
            except queue.Full:
                connection.send(kind="busy")
                connection.close()

    def _said(self, member: Member, message: Message) -> None:
        if message["kind"] == "ready":
            with self._changed:
                member.ready = True
                self._changed.notify_all()
            self._told(f"{member} takes part")
            return
        if message["kind"] == "done" and message["failed"]:
            self._skip(int(message["pass"]), member.number)
            self._told(f"{member}: {quietly(message['failed'], 1000)}")
        with self._changed:
            self._replies[str(message["kind"]), int(message["pass"]), member.number] = message
            self._changed.notify_all()

    def _take_in(self, connection: Connection, hello: Message) -> None:
        if wrong := differences(self._same, hello.get("same")):
            connection.send(kind="refused", why=f"host 0 does not take this host: {wrong}")
            connection.close()
            self._told(f"{quietly(hello.get('name'))} ({connection.address}) is not taken: {wrong}")
            return
        port = hello["port"]
        if type(port) is not int or not 0 < port < 65536:
            raise ValueError("no port")
        with self._changed:
            self._count += 1
            member = Member(self._count, quietly(hello.get("name"), 64), Peer(connection.address, port), connection)
            connection.note = member
            connection.send(
                self._key,
                kind="welcome",
                number=member.number,
                late=self._late,
                adapts=self.link.adapts,
                told=self._welcome,
                port=self.link.port,
            )
            self._members[member.number] = member
            self.link.meet(self._where())

    def _left(self, member: Member) -> None:
        with self._changed:
            if self._members.pop(member.number, None) is None:
                return
            self.link.gone(member.number)
            for other in self._members.values():
                other.connection.send(kind="gone", number=member.number)
            self._changed.notify_all()
        if member.ready:
            self._told(f"{member} is gone")

    def _let_go(self, member: Member) -> None:
        """Does without a host of which nothing is heard any more, and tells it so, for when it hears again."""
        self._left(member)
        member.connection.send(kind="let go", why=f"host 0 heard nothing of {member} any more, and does without it")
        member.connection.close()

    def _skip(self, number: int, host: int) -> None:
        """A host takes no part in what is left of a pass."""
        self.link.skip(number, [host])
        self._all([member.number for member in self.members], {"kind": "skip", "pass": number, "hosts": [host]})

    def _where(self) -> dict[int, Peer]:
        return {member.number: member.where for member in self._members.values()}

    # Passes

    def order(self) -> tuple[int, ...]:
        """The hosts of the next pass, in the order of their shards. Those of which nothing is heard are let go."""
        lost = self.link.lost()
        for member in self.members:
            if member.number in lost:
                self._let_go(member)
        return (*(member.number for member in self.members), 0)

    def seat(self) -> Seat:
        """This host's place in the next pass."""
        order = self.order()
        return Seat(order, len(order) - 1, self._split.of(order))

    def learn(self, seat: Seat, taken: Sequence[Taken]) -> None:
        """What a pass says of how fast hosts are; the next ones may be split otherwise."""
        computed = {one.host: one.seconds - one.tally.waited for one in taken}
        if set(computed) == set(seat.order):
            self._split.learn(seat.order, seat.parts, [computed[number] for number in seat.order])

    def _all(self, to: Sequence[int], message: Message, body: bytes = b"") -> None:
        """Tells hosts something: in packets, which losses hold up less than a connection, or what is long by that."""
        long = len(body) > MOST_BODY
        content = json.dumps(message | {"long": long}).encode() + b"\n" + (b"" if long else body)
        for member in self.members:
            if member.number in to:
                if long:
                    member.connection.send(body, kind="body")
                self.link.tell(member.number, content)

    def measure(self) -> list[ways.Way]:
        """How fast every host's packets get to every other one, one way after the other."""
        order, found = self.order(), list[ways.Way]()
        self._meet(order)
        self._measured(order, None, order[:-1], UDP_SECONDS)()  # who has not met a host drops what comes from there
        for sender, receiver in itertools.permutations(range(len(order)), 2):
            here = receiver == len(order) - 1
            told = self._measured(order, (sender, receiver), () if here else [order[receiver]], ways.SECONDS)
            if sender == len(order) - 1:
                ways.send(self.link, receiver)
            if here:
                found.append(ways.hear(self.link, order, sender, receiver))
            found += [ways.Way(*way) for way in told().values()]
        return found

    def _measured(
        self, order: Sequence[int], way: tuple[int, int] | None, replies: Sequence[int], seconds: float
    ) -> Callable[[], dict[int, Any]]:
        """Has a way between two shards' hosts measured, or with None all hear each other; gives what is replied."""
        self._passes += 1
        number = self._passes
        self._all(order, {"kind": "measure", "pass": number, "order": order, "way": way})
        self.link.begin(number, order)
        return lambda: {
            host: reply["way"] for host, reply in self._wait("measured", number, replies, seconds + 1).items()
        }

    def forget(self) -> None:
        """Has other hosts drop the programs that they keep in memory."""
        self._all([member.number for member in self.members], {"kind": "forget"})

    def ask(self, order: Sequence[int], body: bytes) -> None:
        """Has other hosts read what the next passes are for."""
        self._meet(order)
        self._all(order, {"kind": "read"}, body)

    def _meet(self, order: Sequence[int]) -> None:
        """Tells hosts where the others are."""
        peers = {str(member.number): list(member.where) for member in self.members if member.number in order}
        self._all(order, {"kind": "meet", "peers": peers})

    def rehearse(self, seat: Seat, call: Callable[[], Result]) -> Result:
        """Has all hosts compile what a pass needs, and hear each other.

        Args:
          call: that of this host.

        Raises:
          AstraError: a host cannot compute it, or two of them do not hear each other.
        """
        self._passes += 1
        number = self._passes
        self._all(seat.order, _told_of(seat, number, "rehearse"))
        self.link.begin(number, seat.order, rehearsing=True)
        silent = self.link.silent(seat.order, UDP_SECONDS)
        result = call()
        if gone := [member for member in self.members if member.number in silent]:
            for member in gone:
                self._let_go(member)
            raise AstraError(f"{' and '.join(map(str, gone))} did not say anything any more: ask again")
        replies = self._wait("rehearsed", number, seat.order, COMPILE_SECONDS)
        for host, reply in sorted(replies.items()):
            if others := set(reply["silent"]) & set(self._members):
                raise AstraError(
                    f"UDP packets of host {min(others)} do not come to host {host}: let in the ports that both "
                    "printed, where a firewall is between them"
                )
            if reply.get("failed"):
                raise AstraError(f"host {host}: {quietly(reply['failed'], 1000)}")
        return result

    def run(self, seat: Seat, call: Callable[[], Result]) -> tuple[Result, Passed]:
        """A pass of all hosts, which have rehearsed it: what it gives here, and how it was."""
        self._passes += 1
        number = self._passes
        self._all(seat.order, _told_of(seat, number, "run"))
        self.link.begin(number, seat.order)
        begun = time.perf_counter()
        try:
            result = call()
        except BaseException:
            self._all(seat.order, {"kind": "skip", "pass": number, "hosts": seat.order})  # nobody waits for anybody
            raise
        seconds = time.perf_counter() - begun
        here = Taken(0, seconds, self.link.tally)
        for host in here.tally.gone & self.link.lost():  # what is not heard of any more is not asked again
            if member := self._members.get(host):
                self._let_go(member)
        return result, Passed(here, lambda: self._taken(number, seat, here))

    def _taken(self, number: int, seat: Seat, here: Taken) -> list[Taken]:
        taken = [here]
        replies = self._wait("done", number, [n for n in seat.order if n not in here.tally.gone], DONE_SECONDS)
        for host, reply in sorted(replies.items()):
            tally = Tally(**{name: reply[name] for name in TOLD_OF_TALLY})
            taken.append(Taken(host, float(reply["seconds"]), tally))
        return taken

    def _wait(self, kind: str, number: int, order: Sequence[int], seconds: float) -> dict[int, Message]:
        """What the hosts that are left replied."""
        with self._changed:
            due = lambda: {  # noqa: E731
                host for host in order if host in self._members and (kind, number, host) not in self._replies
            }
            self._changed.wait_for(lambda: not due(), seconds)
            found = {key[2]: reply for key, reply in self._replies.items() if key[:2] == (kind, number)}
            self._replies = {key: reply for key, reply in self._replies.items() if key[1] > number}
            return found


def _told_of(seat: Seat, number: int, kind: str) -> Message:
    return {"kind": kind, "pass": number, "order": seat.order, "parts": seat.parts}


def _same_port(address: str, port: int, late: Late, any_other: bool) -> Datagrams:
    """The port of this number, or if it is in use maybe another one."""
    try:
        return Datagrams(address, port, late)
    except AstraError:
        if not any_other:
            raise
        return Datagrams(address, 0, late)
