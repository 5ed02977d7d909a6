"""A host that is with host 0: it does what that says, pass after pass."""

import contextlib
import json
import queue
import socket
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol, runtime_checkable

from astra_jax.errors import AstraError, first_line
from astra_jax.hosts import ways
from astra_jax.hosts.company import TOLD_OF_TALLY, UDP_SECONDS, Seat, about
from astra_jax.hosts.control import Connection, Message, Unreachable, connect, quietly
from astra_jax.hosts.datagrams import Datagrams
from astra_jax.hosts.invitation import Invitation, written
from astra_jax.hosts.remote import Peer

LONG_SECONDS = 600.0  # that a long request may take to come
SILENCE_SECONDS = 30.0  # of host 0, after which others come again
AGAIN_SECONDS = 600.0  # for which they try, while nothing answers


@runtime_checkable
class Work(Protocol):
    """What a host does for a pass."""

    def read(self, body: bytes) -> None:
        """Reads what passes are for."""

    def run(self, seat: Seat) -> None:
        """Takes part in one."""

    def forget(self) -> None:
        """Drops programs that are kept in memory."""


class Fellow:
    """This host as one of those that are with host 0.

    Args:
      invitation: where host 0 is, and the secret.
      same: what has to be the same there, by name.
      address, port: where to get datagrams; by default where host 0 is reached from, at any port.

    Attributes:
      number: of this host.
      told: what host 0 tells every host.
      link: of this host's programs.

    Raises:
      AstraError: host 0 is not there, or does not take this host.
    """

    _connection: Connection

    def __init__(self, invitation: Invitation, same: Mapping[str, str], address: str | None = None, port: int = 0):
        self._invitation, self._same = invitation, same
        self.link = Datagrams(address or own_address(invitation), port)
        try:
            self._join()
        except AstraError:
            self.link.close()
            raise

    def _join(self) -> None:
        """Comes to host 0, for the first time or again, with nothing left of the time before."""
        messages, bodies = queue.Queue[Message](), queue.Queue[bytes]()
        self._messages, self._bodies = messages, bodies
        heard = partial(self._heard, messages, bodies)
        self._connection = connect(self._invitation, about(self._same, self.link.port), heard)
        try:
            first = messages.get(timeout=SILENCE_SECONDS)
            if first.get("kind") != "welcome":
                raise AstraError(quietly(first.get("why", "host 0 ended the connection: start it again"), 1000))
        except queue.Empty:
            self._connection.close()
            raise AstraError(f"host 0 at {self._where} says nothing: is it stopped?") from None
        except AstraError:
            self._connection.close()
            raise
        self.number, self.told = int(first["number"]), first["told"]
        self.link.late, self.link.adapts = first["late"], bool(first["adapts"])
        self._port = int(first["port"])
        self.link.told = self._told
        self.link.enter(self.number, first["body"])
        self._meet({})

    def close(self) -> None:
        """Leaves host 0."""
        self._connection.close()
        self.link.close()

    def stay(self, work: Work, say: Callable[[str], Any]) -> None:
        """Does what host 0 says, as `serve` does, and comes again where it was let go or its link was cut.

        Args:
          say: is told in a line that this happens.

        Raises:
          AstraError: host 0 is gone, or has another checkpoint now.
        """
        while True:
            try:
                self.serve(work)
            except AstraError as error:
                why = str(error)
            say(f"{why}; this host tries to take part again")
            self._connection.close()
            self._come_again(why)
            say(f"host {self.number}: ready again")

    def _come_again(self, why: str) -> None:
        """Raises AstraError with the reason for which this host has to, and why it cannot."""
        told, deadline = self.told, time.monotonic() + AGAIN_SECONDS
        while True:
            try:
                self._join()
                self.ready()
                break
            except Unreachable as error:
                if time.monotonic() > deadline:
                    raise AstraError(f"{why}; {error}") from error
                time.sleep(2.0)
            except AstraError as error:
                raise AstraError(f"{why}; {error}") from error
        if self.told != told:
            raise AstraError("host 0 has loaded something else now: start this host again")

    def _meet(self, peers: Mapping[str, Any]) -> None:
        """Learns where others are. One that host 0 reaches within itself is reached where host 0 is."""
        found = {0: Peer(self._connection.address, self._port)}
        for number, (address, port) in peers.items():
            local = address.startswith("127.") or address == "::1"
            found[int(number)] = Peer(self._connection.address if local else str(address), int(port))
        self.link.meet(found)

    def _heard(self, messages: queue.Queue[Message], bodies: queue.Queue[bytes], message: Message) -> None:
        if messages is not self._messages:
            return  # of a connection before this one
        if message.get("kind") == "gone":
            self.link.gone(int(message["number"]))
        elif message.get("kind") == "body":
            bodies.put(message["body"])
        else:
            if not message:
                self.link.gone(0)
            messages.put(message)

    def _told(self, number: int, content: bytes) -> None:
        """What host 0 tells in packets."""
        if number == 0:
            line, _, body = content.partition(b"\n")
            message = json.loads(line) | {"body": body}
            if message["kind"] == "skip":
                self.link.skip(int(message["pass"]), message["hosts"])
            else:
                self._messages.put(message)

    def ready(self) -> None:
        """This host can take part from now on. Raises AstraError where no packet goes to host 0 and back."""
        if self.link.round_trip(0, UDP_SECONDS) is None:
            self._connection.close()
            raise Unreachable(
                f"no UDP packet goes to host 0, port {self._port}, and back to port {self.link.port} of this host: let "
                "both in, where a firewall is between them"
            )
        self._connection.send(kind="ready")

    def serve(self, work: Work) -> None:
        """Does what host 0 says, until it is gone.

        Raises:
          AstraError: it is.
        """
        failed = ""
        does: dict[str, Callable[[Message], None]] = {
            "meet": lambda message: self._meet(message["peers"]),
            "measure": self._measure,
            "rehearse": lambda message: self._rehearse(message, work, failed),
            "run": lambda message: self._run(message, work, failed),
            "forget": lambda message: work.forget(),
        }
        while True:
            message = self._next()
            kind = message.get("kind")
            if kind is None:
                raise AstraError(f"host 0 at {self._where} is gone")
            if kind == "let go":
                raise AstraError(quietly(message["why"], 1000))
            if kind == "read":
                failed = _tried(lambda: work.read(self._body(message)))  # noqa: B023
            elif kind in does:
                does[kind](message)

    def _body(self, message: Message) -> bytes:
        """What comes with a message, or beside it where it is long."""
        if not message["long"]:
            return bytes(message["body"])
        try:
            return self._bodies.get(timeout=LONG_SECONDS)
        except queue.Empty:
            raise AstraError(f"a long request did not come within {LONG_SECONDS:g} s") from None

    def _next(self) -> Message:
        """The next message of host 0. Raises AstraError where it is silent for long."""
        heard = time.monotonic()
        while True:
            with contextlib.suppress(queue.Empty):
                return self._messages.get(timeout=1.0)
            now = time.monotonic()
            heard = heard if 0 in self.link.lost() else now
            if now - heard > SILENCE_SECONDS:
                raise AstraError(f"host 0 at {self._where} gives no sign of life: is its link cut?")

    @property
    def _where(self) -> str:
        return written(self._invitation.address, self._invitation.port)

    def _seat(self, message: Message) -> Seat:
        order, parts = tuple(message["order"]), message["parts"]
        return Seat(order, order.index(self.number), parts and tuple(parts))

    def _measure(self, message: Message) -> None:
        order, way, found = tuple(message["order"]), message["way"], None
        self.link.begin(message["pass"], order)
        if way is None:
            self.link.silent(order, UDP_SECONDS)
        else:
            sender, receiver = way
            if order[sender] == self.number:
                ways.send(self.link, receiver)
            if order[receiver] != self.number:
                return
            found = ways.hear(self.link, order, sender, receiver)
        self._connection.send(kind="measured", **{"pass": message["pass"]}, way=found)

    def _rehearse(self, message: Message, work: Work, failed: str) -> None:
        seat = self._seat(message)
        self.link.begin(message["pass"], seat.order, rehearsing=True)
        silent = self.link.silent(seat.order, UDP_SECONDS)
        failed = failed or _tried(lambda: work.run(seat))
        self._connection.send(kind="rehearsed", **{"pass": message["pass"]}, silent=silent, failed=failed)

    def _run(self, message: Message, work: Work, failed: str) -> None:
        seat = self._seat(message)
        self.link.begin(message["pass"], seat.order)
        begun = time.perf_counter()
        failed = failed or _tried(lambda: work.run(seat))
        tally = {name: getattr(self.link.tally, name) for name in TOLD_OF_TALLY}
        seconds = time.perf_counter() - begun
        self._connection.send(kind="done", **{"pass": message["pass"]}, seconds=seconds, failed=failed, **tally)


def _tried(call: Callable[[], Any]) -> str:
    """How it failed, in a line; empty where it did not."""
    try:
        call()
        return ""
    except AstraError as error:
        return str(error)
    except Exception as error:
        return first_line(error)


def own_address(invitation: Invitation) -> str:
    """The address of this host on the way to host 0. Sends nothing. Raises AstraError where there is no way."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(invitation.address, invitation.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)
            return str(probe.getsockname()[0])
    except socket.gaierror:
        raise AstraError(f"the host {invitation.address!r} is not known here: give its IP address") from None
    except OSError as error:
        raise AstraError(f"there is no way to {invitation.address} ({error.strerror}): is the network up?") from None
