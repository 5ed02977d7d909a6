"""Knowing which hosts are alive: one TCP connection from every host to host 0, beside what JAX does.

JAX raises in some of its processes when a host is gone, in others not, and none of it says which host; where a link is
cut nothing happens at all. Here a killed process shows at once, because its connection ends, and a cut link after
`patience` seconds without a sign of life. Every host that is left then ends with one line that names host and cause.

Before anything is run, the hosts tell host 0 who they are, so that a host that is missing, or runs other versions, is
named, too. Lines of JSON; what comes is bounded in size and never trusted to be more than that.
"""

import contextlib
import json
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from astra_jax.errors import AstraError

BEAT_SECONDS = 1.0  # between two signs of life
LONGEST = 4096  # bytes of a line
Facts = Mapping[str, str]


def die(message: str) -> NoReturn:
    """Ends this process at once with one line and exit code 2. By itself JAX would wait for hosts that are gone."""
    sys.stdout.flush()
    stderr = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what other threads, also XLA's, say from now on is no last line
    os.write(stderr, f"astra: error: {' '.join(message.split())}\n".encode())
    os._exit(2)


class _Line:
    """A connection of lines of JSON objects."""

    def __init__(self, connection: socket.socket):
        self.socket, self._lock, self._rest = connection, threading.Lock(), b""
        connection.setblocking(True)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, **message: Any) -> None:
        """Sends one object; a connection that is broken is noticed by who reads."""
        with self._lock, contextlib.suppress(OSError):
            # A cut link fills the buffer: then there is nothing to be said, and nothing to wait for.
            if select.select([], [self.socket], [], 0)[1]:
                self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float) -> dict[str, Any]:
        """The next object. Raises TimeoutError after so many seconds, EOFError where the connection ended."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0 or len(self._rest) > LONGEST:
                raise TimeoutError
            if not select.select([self.socket], [], [], left)[0]:
                raise TimeoutError
            try:
                more = self.socket.recv(LONGEST)
            except OSError:
                raise EOFError from None
            if not more:
                raise EOFError
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise EOFError  # a stranger
        return message


class Lifeline:
    """This host's connections, and the threads that watch them.

    Args:
      address, port: where host 0 listens.
      hosts, host: how many there are, and which one this is.
      facts: what has to be the same everywhere, such as versions.
      start_seconds: how long hosts wait for each other at the start.
      patience: seconds without a sign of life after which a host counts as gone.
      on_failure: what to do with the line that says which host is gone and why; by default end the process.

    Raises:
      AstraError: the port is in use, not all hosts came in time, or their facts differ.
    """

    def __init__(
        self,
        address: str,
        port: int,
        hosts: int,
        host: int,
        facts: Facts,
        start_seconds: float = 60.0,
        patience: float = 30.0,
        on_failure: Callable[[str], Any] = die,
    ):
        self.hosts, self.host, self.patience, self.on_failure = hosts, host, patience, on_failure
        self._over = threading.Event()
        self._lines: dict[int, _Line] = {}
        self._done = {other: threading.Event() for other in (range(1, hosts) if host == 0 else (0,))}
        deadline = time.monotonic() + start_seconds
        if host == 0:
            self._listen(address, port, facts, deadline, start_seconds)
        else:
            self._call(address, port, facts, deadline, start_seconds)
        for other in self._lines:
            threading.Thread(target=self._watch, args=(other,), daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def _listen(self, address: str, port: int, facts: Facts, deadline: float, start_seconds: float) -> None:
        try:
            server = socket.create_server((address, port), backlog=self.hosts)
        except OSError as error:
            why = os.strerror(error.errno or 0)
            raise AstraError(
                f"host 0 cannot listen at {address}:{port} ({why}): give --coordinator another port, or an address of "
                "this host"
            ) from error
        with server:
            while len(self._lines) < self.hosts - 1:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    line = _Line(server.accept()[0])
                    hello = line.receive(2.0)
                except TimeoutError:
                    if time.monotonic() < deadline:
                        continue
                    missing = [str(n) for n in range(1, self.hosts) if n not in self._lines]
                    self._refuse(
                        f"host {' and '.join(missing)} did not come within {start_seconds:g} s: start the same command "
                        f"there with --host {missing[0]}, and look whether it reaches {address}:{port}"
                    )
                except EOFError:
                    continue  # a stranger
                number = hello.get("host")
                if not isinstance(number, int) or not 0 < number < self.hosts:
                    line.send(refused=f"host {number!r} is none of {self.hosts} hosts: correct --host or --hosts")
                    continue
                if number in self._lines:
                    line.send(refused=f"there are two hosts with --host {number}: give every host its own number")
                    self._refuse(f"there are two hosts with --host {number}: give every host its own number")
                self._lines[number] = line
                theirs = hello.get("facts")
                theirs = theirs if isinstance(theirs, dict) else {}
                differ = [name for name in facts if theirs.get(name) != facts[name]]
                if differ:
                    values = ", ".join(
                        f"{name} {str(theirs.get(name))[:80]} instead of {facts[name]}" for name in differ
                    )
                    self._refuse(f"host {number} has {values} on host 0: use the same on all hosts")
        for line in self._lines.values():
            line.send(go=True)

    def _refuse(self, message: str) -> NoReturn:
        for line in self._lines.values():
            line.send(refused=message)
        raise AstraError(message)

    def _call(self, address: str, port: int, facts: Facts, deadline: float, start_seconds: float) -> None:
        late = AstraError(
            f"host 0 did not answer at {address}:{port} within {start_seconds:g} s: start the same command there with "
            "--host 0, and look whether this host reaches it"
        )
        while True:
            try:
                line = _Line(socket.create_connection((address, port), timeout=max(0.01, deadline - time.monotonic())))
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise late from None
                time.sleep(0.2)
        line.send(host=self.host, facts=dict(facts))
        try:
            # Host 0 says no by itself when its own time is over.
            answer = line.receive(max(1.0, deadline - time.monotonic()) + 10)
        except TimeoutError:
            raise late from None
        except EOFError:
            raise AstraError("host 0 ended before all hosts were there: look what it says") from None
        if "refused" in answer:
            raise AstraError(str(answer["refused"]))
        self._lines[0] = line

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            for line in self._lines.values():
                line.send(alive=True)

    def _watch(self, other: int) -> None:
        while not self._over.is_set():
            try:
                message = self._lines[other].receive(self.patience)
            except TimeoutError:
                message = {"gone": f"host {other} has given no sign of life for {self.patience:g} s: is its link cut?"}
            except EOFError:
                message = {"gone": f"host {other} is gone: its process ended or was killed"}
            if "done" in message:
                self._done[other].set()
                if self.host:
                    return  # host 0 has nothing more to say
            if "failed" in message:
                message = {"gone": f"host {other} ended with an error: {message['failed']}"}
            if "gone" in message and not self._over.is_set():
                self.fail(str(message["gone"]))
                return

    def fail(self, message: str) -> None:
        """Tells the other hosts why this ends, and ends."""
        if self._over.is_set():
            return
        self._over.set()
        for line in self._lines.values():
            line.send(gone=message)
        self.on_failure(message)

    def abandon(self, message: str) -> None:
        """Tells the other hosts that this one ends with an error."""
        self._over.set()
        for line in self._lines.values():
            line.send(failed=message)

    def close(self, shutdown: Callable[[], Any]) -> None:
        """Ends the watch when all hosts are done. Host 0, without which the others cannot end in order, ends last.

        Args:
          shutdown: ends what else holds the hosts together.
        """
        if self.host:
            shutdown()
            self._lines[0].send(done=True)
        for done in self._done.values():
            while not done.wait(1.0) and not self._over.is_set():
                pass
        if self.host == 0:
            shutdown()
            for line in self._lines.values():
                line.send(done=True)
        self._over.set()
