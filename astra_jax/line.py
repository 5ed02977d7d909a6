"""Messages between two processes: a JSON object on a line, and after it, where it says so, some bytes.

What comes from elsewhere is not trusted: lines and bytes have limits, and whatever is no message ends the connection.
"""

import contextlib
import json
import select
import socket
import threading
import time
from typing import Any

LONGEST = 8192  # bytes of a line


class Line:
    """A connection of messages. What goes wrong is an OSError, after which there are no more messages.

    One thread may read while others write.
    """

    def __init__(self, connection: socket.socket):
        self._connection, self._read, self._lost = connection, b"", False
        self._writing = threading.Lock()
        connection.setblocking(True)
        if connection.family == socket.AF_INET:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, within: float = 5.0, body: bytes = b"", **message: Any) -> None:
        """Sends a message, and bytes with it. Raises TimeoutError where nothing is taken within so many seconds."""
        with self._writing:
            self._write(json.dumps(message | ({"bytes": len(body)} if body else {})).encode() + b"\n" + body, within)

    def beat(self) -> None:
        """A sign of life; none where something is being sent, which is one, or where the link takes nothing."""
        if self._writing.acquire(blocking=False):
            try:
                self._write(b'{"alive": true}\n', 0.0)
            except OSError:
                pass  # who reads will notice
            finally:
                self._writing.release()

    def receive(self, seconds: float, most: int = 0) -> dict[str, Any]:
        """The next message; what came with it is its `body`.

        Args:
          seconds: how long it may take, and for the bytes how long nothing may come.
          most: how many bytes may come with it.

        Raises:
          TimeoutError, ConnectionError: it took longer; the connection ended, or what came is no message.
        """
        self._check()
        try:
            deadline = time.monotonic() + seconds
            while b"\n" not in self._read:
                if len(self._read) > LONGEST:
                    raise ConnectionError("it sent a line that is too long")
                self._read += self._some(deadline)
            line, _, self._read = self._read.partition(b"\n")
            message = _parse(line)
            if "bytes" in message:
                message["body"] = self._body(message.pop("bytes"), seconds, most)
            return message
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Ends the connection, also for a thread that waits at it."""
        self._lost = True
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

    def _write(self, data: bytes, seconds: float) -> None:
        rest = memoryview(data)
        while rest:
            if not self._ready(seconds):
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

    def _body(self, size: Any, seconds: float, most: int) -> bytes:
        if not isinstance(size, int) or isinstance(size, bool) or not 0 < size <= most:
            raise ConnectionError("it sent more than is taken")
        parts, there = [self._read], len(self._read)
        while there < size:
            parts.append(self._some(time.monotonic() + seconds))
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
