"""Messages between two processes: a JSON object on a line, and after it, where it says so, some bytes.

What comes from elsewhere is not trusted: lines and bytes have limits, and whatever is no message ends the connection.
"""

import contextlib
import json
import math
import os
import select
import socket
import threading
import time
from typing import Any

LONGEST = 8192  # bytes of a line
MOST_BYTES = 1 << 28  # with a line, of a request
BEAT_SECONDS = 1.0  # between two signs of life
GONE = "is gone: its process ended or was killed"
CUT = "gives no sign of life: is its link cut?"


class Line:
    """A connection of messages. What goes wrong is an OSError, after which there are no more messages.

    One thread may read while others write.
    """

    def __init__(self, connection: socket.socket):
        self._connection, self._read = connection, b""
        self._lost: OSError | None = None
        self._writing = threading.Lock()
        connection.setblocking(True)
        if connection.family == socket.AF_INET:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, within: float = 5.0, body: bytes = b"", total: float = math.inf, **message: Any) -> None:
        """Sends a message, and bytes with it. Raises TimeoutError where nothing is taken within so many seconds, or not
        all within a total of seconds."""
        line = json.dumps(message | ({"bytes": len(body)} if body else {})).encode() + b"\n"
        with self._writing:
            self._write(line + body, within, time.monotonic() + total)

    def beat(self) -> None:
        """A sign of life; none where something is being sent, which is one, or where the link takes nothing."""
        if self._writing.acquire(blocking=False):
            try:
                self._write(b'{"alive": true}\n', 0.0, math.inf)
            except OSError:
                pass  # who reads will notice
            finally:
                self._writing.release()

    def receive(self, seconds: float, most: int = 0, total: float = math.inf) -> dict[str, Any]:
        """The next message; what came with it is its `body`.

        Args:
          seconds: how long it may take, and for the bytes how long nothing may come.
          most: how many bytes may come with it.
          total: how long all of it may take, also where it comes bit by bit.

        Raises:
          TimeoutError, ConnectionError: it took longer; the connection ended, or what came is no message.
        """
        self._check()
        try:
            end = time.monotonic() + total
            deadline = min(time.monotonic() + seconds, end)
            while b"\n" not in self._read:
                if len(self._read) > LONGEST:
                    raise ConnectionError("it sent a line that is too long")
                self._read += self._some(deadline)
            line, _, self._read = self._read.partition(b"\n")
            message = _parse(line)
            if "bytes" in message:
                message["body"] = self._body(message.pop("bytes"), seconds, most, end)
            return message
        except OSError as error:
            self._lost = error
            self.close()
            raise

    def limit_silence(self, seconds: float) -> None:
        """Lets the system end the connection after so long without a sign of the other one's system; 0 for never."""
        if self._connection.family == socket.AF_INET and hasattr(socket, "TCP_USER_TIMEOUT"):
            self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, seconds > 0)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
                self._connection.setsockopt(socket.IPPROTO_TCP, option, max(1, round(seconds / 10)))
            self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1e3 * seconds))

    def fate(self) -> str:
        """What became of the other side, in words; empty while it is there, as far as is known here."""
        if self._lost is None:
            poll = select.poll()
            poll.register(self._connection, getattr(select, "POLLRDHUP", 0))  # seen even before what is not read yet
            if not poll.poll(0):
                return ""
            error = self._connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            self._lost = OSError(error, os.strerror(error)) if error else ConnectionError("it closed the connection")
            self.close()
        return GONE if isinstance(self._lost, ConnectionError) else CUT

    def close(self) -> None:
        """Ends the connection, also for a thread that waits at it."""
        self._lost = self._lost or ConnectionError("it is lost")
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _ready(self, seconds: float, to_read: bool = False) -> bool:
        """Waits until something can be written, or read."""
        self._check()
        here = [self._connection]
        try:
            return any(select.select(here if to_read else [], [] if to_read else here, [], max(seconds, 0.0)))
        except (OSError, ValueError):
            raise ConnectionError("it is lost") from None  # closed meanwhile

    def _check(self) -> None:
        if self._lost:
            raise ConnectionError("it is lost")

    def _write(self, data: bytes, seconds: float, end: float) -> None:
        rest = memoryview(data)
        while rest:
            if not self._ready(min(seconds, end - time.monotonic())):
                raise TimeoutError("timed out")
            try:
                rest = rest[self._connection.send(rest, socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                continue

    def _some(self, deadline: float) -> bytes:
        if not self._ready(deadline - time.monotonic(), to_read=True):
            raise TimeoutError("timed out")
        self._check()  # or it was closed meanwhile
        if not (read := self._connection.recv(1 << 16)):
            raise ConnectionError("it closed the connection")
        return read

    def _body(self, size: Any, seconds: float, most: int, end: float) -> bytes:
        if not isinstance(size, int) or isinstance(size, bool) or not 0 < size <= most:
            raise ConnectionError("it sent more than is taken")
        parts, there = [self._read], len(self._read)
        while there < size:
            parts.append(self._some(min(time.monotonic() + seconds, end)))
            there += len(parts[-1])
        read = b"".join(parts)
        self._read = read[size:]
        return read[:size]


def _parse(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise ConnectionError("it sent what is no message")
    return message
