"""Connections of all hosts to host 0: who is there, what is to be done, and answers. TLS, between who knows the secret.

Whoever does not know it gets no further than the handshake, for which there are two seconds and a bounded number of
places: nothing of what he says is read. Messages are a JSON object on a line, and after it, where it says so, bytes.
"""

import asyncio
import concurrent.futures
import contextlib
import json
import queue
import random
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, Literal, NamedTuple, TypeVar

from astra_jax.errors import AstraError
from astra_jax.hosts.invitation import Invitation, written
from astra_jax.hosts.keys import context
from astra_jax.hosts.sockets import listening

LONGEST = 1 << 20  # bytes of a line
MOST_BYTES = 1 << 28  # with a line
HANDSHAKE_SECONDS = 2.0
HELLO_SECONDS = 10.0
CONNECT_SECONDS = 10.0
MOST_STRANGERS = 256  # in handshakes at once
MOST_STRANGERS_EACH = 128  # of one address
MOST_CONNECTIONS = 1000
MOST_WAITING = 2 * MOST_BYTES  # bytes that a slow reader may leave unread

Message = dict[str, Any]
Result = TypeVar("Result")


class Event(NamedTuple):
    """What happened at a connection: it `joined` (its first message), `said` something, or `left`."""

    kind: Literal["joined", "said", "left"]
    connection: "Connection"
    message: Message


class _Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(lambda loop, what: None)  # of strangers; ours raise where they are waited for
        threading.Thread(target=self.loop.run_forever, daemon=True, name="control").start()

    def run(self, work: Coroutine[Any, Any, Result], seconds: float | None = None) -> Result:
        """What it gives, waited for. Raises TimeoutError where that takes longer."""
        waiting = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return waiting.result(seconds)
        except concurrent.futures.TimeoutError:
            waiting.cancel()
            raise TimeoutError("timed out") from None

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)


class Connection:
    """One end of a connection, from any thread.

    Attributes:
      address: of the other end.
      note: whatever its owner wants to know of it.
    """

    def __init__(self, loop: _Loop, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._loop, self._reader, self._writer = loop, reader, writer
        self.address: str = writer.get_extra_info("peername")[0]
        self.note: Any = None
        self.open = True

    def send(self, body: bytes = b"", **message: Any) -> None:
        """Sends a message, and bytes with it. Waits for nothing, and does not tell whether it comes."""
        line = json.dumps(message | ({"bytes": len(body)} if body else {})).encode() + b"\n"
        self._loop.loop.call_soon_threadsafe(self._write, line + body)

    def close(self) -> None:
        """Ends it, once all is sent."""
        self._loop.loop.call_soon_threadsafe(self._end)

    def _write(self, data: bytes) -> None:
        if not self.open:
            return
        self._writer.write(data)
        if self._writer.transport.get_write_buffer_size() > MOST_WAITING:
            self._writer.transport.abort()  # it reads nothing

    def _end(self) -> None:
        self.open = False
        self._writer.close()

    async def receive(self) -> Message:
        """The next message; what came with it is its `body`. Raises ConnectionError where there is none, or no such."""
        try:
            message = json.loads(await self._reader.readuntil(b"\n"))
            if not isinstance(message, dict):
                raise ValueError("no object")
            size = message.pop("bytes", 0)
            if type(size) is not int or not 0 <= size <= MOST_BYTES:
                raise ValueError("more than is taken")
            message["body"] = await self._reader.readexactly(size) if size else b""
            return message
        except (ValueError, RecursionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError) as error:
            raise ConnectionError(str(error)) from None


class Host0:
    """Listens for other hosts and for who asks.

    Args:
      address, port: where; port 0 for any.
      secret: what they all know.

    Attributes:
      port: the one that is listened at.
      events: what happened, in order.
      strangers: how many came, and did not know the secret.

    Raises:
      AstraError: the port is in use, or the address is not this host's.
    """

    def __init__(self, address: str, port: int, secret: bytes):
        self._socket = listening(socket.SOCK_STREAM, address, port)
        self._socket.listen(128)
        self._socket.setblocking(False)
        self.port: int = self._socket.getsockname()[1]
        self.events = queue.Queue[Event]()
        self.strangers = 0
        self._tls, self._loop = context(secret, "host 0"), _Loop()
        self._greeting, self._open = Counter[str](), 0
        self._tasks = set[asyncio.Task[None]]()
        self._listener = asyncio.run_coroutine_threadsafe(self._listen(), self._loop.loop)

    def close(self) -> None:
        """Ends all connections."""
        with contextlib.suppress(TimeoutError):
            self._loop.run(self._end(), 5.0)
        self._loop.stop()

    async def _end(self) -> None:
        self._listener.cancel()
        self._socket.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, (address, *_) = await loop.sock_accept(self._socket)
            except OSError:  # no more files may be open
                await asyncio.sleep(0.1)
                continue
            full = sum(self._greeting.values()) >= MOST_STRANGERS or self._greeting[address] >= MOST_STRANGERS_EACH
            if full or self._open >= MOST_CONNECTIONS:
                connection.close()
                continue
            self._greeting[address] += 1
            task = loop.create_task(self._serve(connection, address))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, accepted: socket.socket, address: str) -> None:
        self._open += 1
        try:
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = await self._greet(accepted, address)
            if connection is None:
                return
            try:
                hello = await asyncio.wait_for(connection.receive(), HELLO_SECONDS)
                self.events.put(Event("joined", connection, hello))
                while True:
                    self.events.put(Event("said", connection, await connection.receive()))
            except (ConnectionError, TimeoutError):
                pass
            finally:
                connection._end()
            self.events.put(Event("left", connection, {}))
        finally:
            self._open -= 1

    async def _greet(self, accepted: socket.socket, address: str) -> Connection | None:
        """A connection with somebody who knows the secret; None of anybody else."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(LONGEST)
        protocol = asyncio.StreamReaderProtocol(reader)
        try:
            transport, _ = await loop.connect_accepted_socket(
                lambda: protocol, accepted, ssl=self._tls, ssl_handshake_timeout=HANDSHAKE_SECONDS
            )
            return Connection(self._loop, reader, asyncio.StreamWriter(transport, protocol, reader, loop))
        except (OSError, ValueError, TimeoutError):
            self.strangers += 1
            accepted.close()
            return None
        finally:
            self._greeting[address] -= 1
            if not self._greeting[address]:
                del self._greeting[address]


def connect(invitation: Invitation, hello: Message, heard: Callable[[Message], None], body: bytes = b"") -> Connection:
    """Connects with host 0, and says hello.

    Args:
      hello, body: the first message, and what comes with it.
      heard: is called with every message, in another thread; with {} once the connection has ended.

    Raises:
      AstraError: nobody is there, or it is not who sent the invitation.
    """
    loop, deadline = _Loop(), time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            connection = loop.run(_connect(loop, invitation), CONNECT_SECONDS)
            break
        except OSError as error:
            # Too many came at once, or ended before they were heard.
            busy = isinstance(error, ConnectionResetError | BrokenPipeError | ConnectionAbortedError)
            if busy and time.monotonic() < deadline:
                time.sleep(random.uniform(0.05, 0.3))
                continue
            loop.stop()
            raise _no_way(invitation, error) from None

    async def listen() -> None:
        try:
            while True:
                heard(await connection.receive())
        except ConnectionError:
            connection._end()
            heard({})
        with contextlib.suppress(OSError, TimeoutError):
            await asyncio.wait_for(connection._writer.wait_closed(), CONNECT_SECONDS)  # what was sent last
        loop.stop()

    connection.send(body, **hello)
    connection.note = asyncio.run_coroutine_threadsafe(listen(), loop.loop)
    return connection


async def _connect(loop: _Loop, invitation: Invitation) -> Connection:
    reader, writer = await asyncio.open_connection(
        invitation.address,
        invitation.port,
        ssl=context(invitation.secret, "other"),
        ssl_handshake_timeout=CONNECT_SECONDS,
        limit=LONGEST,
    )
    writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Connection(loop, reader, writer)


class Unreachable(AstraError):
    """Nothing answers: the link may be cut."""


def _no_way(invitation: Invitation, error: Exception) -> AstraError:
    where = written(invitation.address, invitation.port)
    if isinstance(error, ssl.SSLError):
        return AstraError(f"{where}: who answers does not know the secret: take the invitation that it prints now")
    if isinstance(error, socket.gaierror):
        return AstraError(f"the host {invitation.address!r} is not known here: give its IP address")
    if isinstance(error, ConnectionRefusedError):
        return AstraError(f"nobody listens at {where}: start `astra worker CHECKPOINT` there first")
    return Unreachable(f"{where} does not answer ({error}): is a firewall between, or another network?")


def quietly(text: Any, most: int = 200) -> str:
    """What another host said, as it may be printed."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:most])
