"""Keep a checkpoint loaded on several hosts, and answer any number of requests with it.

    astra worker CHECKPOINT --coordinator 10.0.0.1:7777 --hosts 4 --host 1

The same on every host, with another --host. Then, on host 0: `astra run CHECKPOINT --image cat.png --workers
10.0.0.1:7777`. Nothing is loaded or compiled anew (but for inputs of another shape), and nobody has to go to the other
hosts: host 0 sends them what is to be read. Requests are answered one after the other. They come by a socket in the
file system of host 0, which is open to the user of the worker alone. A request that fails is answered with the reason,
and the workers take the next one.
"""

import contextlib
import dataclasses
import queue
import socket
import threading
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from astra_jax.errors import AstraError
from astra_jax.hosts import runtime
from astra_jax.hosts.connection import MOST_BYTES, Line
from astra_jax.report import Report
from astra_jax.terminal import write
from eval.service.client import REQUEST_SECONDS, beginning, socket_path
from eval.service.messages import LAST, AskAgain, Done, Failed, Message, Piece, pack
from eval.service.requests import Request, packed, unpacked
from eval.service.screen import Screen
from eval.service.service import Service, Setup

REPLY_SECONDS = 5.0  # for who asked to read something of the answer
FAREWELL_SECONDS = 1.0  # for all who asked to be told that the workers end
MOST_CLIENTS = 32  # that are read or wait at once; others wait before the door


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of `astra worker`."""

    setup: Annotated[Setup, tyro.conf.arg(name="")]


class _Client:
    """Who asks. A thread reads the request and sends the answer, so that nobody else waits for who is slow.

    Args:
      line: the connection.
      asked: takes this client, once it has asked.
      left: is called when it is done.

    Attributes:
      message: what it asked; empty before it has.
      gone: whether it is, or has its whole answer.
    """

    def __init__(self, line: Line, asked: "queue.Queue[_Client]", left: Any):
        self.line, self.message, self._asked, self._left = line, dict[str, Any](), asked, left
        self._outbox = queue.SimpleQueue[Message]()
        self.gone = threading.Event()

    def tell(self, message: Message) -> None:
        """Sends a message, after those before it. Waits for nothing."""
        self._outbox.put(message)

    def serve(self) -> None:
        """Reads the request, and sends the answer as it comes."""
        try:
            self.message = self.line.receive(REQUEST_SECONDS, MOST_BYTES, REQUEST_SECONDS)
            self._asked.put(self)
            said: Message | None = None
            while not isinstance(said, LAST):
                said = self._outbox.get()
                kind, body = pack(said)
                self.line.send(REPLY_SECONDS, body, 2 * REPLY_SECONDS, kind=kind)
        except OSError:  # it is gone, too slow, or no `astra run`
            pass
        finally:
            self.line.close()
            self.gone.set()
            self._left(self)


class _Clients:
    """All who ask, by a socket that is listened at."""

    def __init__(self, server: socket.socket):
        self.asked = queue.Queue[_Client]()
        self._server, self._here, self._room = server, set[_Client](), threading.Semaphore(MOST_CLIENTS)
        threading.Thread(target=self._accept, daemon=True).start()

    def farewell(self, why: str, goes_on: bool) -> None:
        """Tells all who wait that the workers end, or begin anew."""
        here, deadline = list(self._here), time.monotonic() + FAREWELL_SECONDS
        for client in here:
            if client.message:
                client.tell(AskAgain(why) if goes_on else Failed(why))
        for client in here:
            if client.message:
                client.gone.wait(deadline - time.monotonic())

    def _accept(self) -> None:
        while self._server.fileno() >= 0:
            self._room.acquire()
            try:
                line = Line(self._server.accept()[0])
            except OSError:  # no more files may be open
                self._room.release()
                time.sleep(0.1)
                continue
            client = _Client(line, self.asked, self._leave)
            self._here.add(client)
            threading.Thread(target=client.serve, daemon=True).start()

    def _leave(self, client: _Client) -> None:
        self._here.discard(client)
        self._room.release()


def serve(service: Service, checkpoint: Path, coordinator: str, report: Report) -> None:
    """Host 0: answers who asks at its socket, without end."""
    path = socket_path(coordinator)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        clients = _Clients(server)

        def farewell(why: str, goes_on: bool) -> None:
            with contextlib.suppress(OSError):
                if goes_on:
                    beginning(path).touch()
                path.unlink(missing_ok=True)  # first: who is told to ask again must not come here
            clients.farewell(why, goes_on)

        if service.here:
            service.here.lifeline.farewell = farewell
        beginning(path).unlink(missing_ok=True)
        report.say(f"ready: astra run {checkpoint} --workers {coordinator} (on this host)")
        try:
            while True:
                client = clients.asked.get()
                if not client.line.fate():
                    _answer(service, checkpoint, client)
        finally:
            path.unlink(missing_ok=True)


def _answer(service: Service, checkpoint: Path, client: _Client) -> None:
    """Answers one request. Whatever fails is the answer, unless other hosts are left behind in a collective."""
    here, begun, asked = service.here, False, client.message
    try:
        if asked.get("checkpoint") != str(checkpoint.resolve()):
            raise AstraError(f"the workers have loaded {checkpoint.resolve()}: ask for it, or start others")
        request = service.smaller(unpacked(asked.get("body", b"")))
        inputs = service.encode(request)
        if here:
            body = packed(request)
            begun = True
            here.lifeline.ask(body)
        for message in service.answer(lambda: (request, inputs)):
            if isinstance(message, Piece) and client.gone.is_set():
                break  # host 0 goes on alone with a text, and the rest of it is for nobody
            client.tell(message)
        client.tell(Done())
    except AstraError as error:  # on several hosts, all agree on it
        client.tell(Failed(str(error)))
    except Exception as error:
        client.tell(Failed(f"the workers failed: {runtime.reason(error)}"))
        if here and begun and here.lifeline.needs:
            raise
        traceback.print_exc()
    finally:
        if here:
            here.lifeline.need(True)


def _read(service: Service, body: bytes) -> tuple[Request, Any]:
    request = unpacked(body)
    return request, service.encode(request)


def main(args: Args) -> None:
    """Runs `astra worker`."""
    setup, report = args.setup, Report("worker")
    service = Service(setup)
    here = service.here
    if here and here.lifeline.host:
        write(f"host {here.lifeline.host}: ready\n")
        while True:
            body = here.lifeline.requests.get()
            with contextlib.suppress(AstraError):  # all hosts agree on it, and host 0 tells who asked
                list(service.answer(partial(_read, service, body)))
    screen = Screen(report, ())
    for note in service.notes:
        screen.print(note)
    coordinator = here.coordinator if here else setup.several.coordinator
    if not coordinator:
        raise AstraError("a worker is one of several hosts: give --coordinator, --hosts and --host")
    serve(service, setup.checkpoint, coordinator, report)
