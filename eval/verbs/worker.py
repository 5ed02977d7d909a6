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
import json
import os
import queue
import socket
import stat
import threading
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from astra_jax.errors import AstraError
from astra_jax.hosts import runtime
from astra_jax.hosts.connection import Line
from astra_jax.hosts.heartbeat import MOST_BYTES
from astra_jax.hosts.options import parse_address
from astra_jax.report import Report
from astra_jax.serving.generate import Sampling, is_whole
from astra_jax.terminal import complain, one_line, write
from eval.verbs.answer import Answerer, Request, Setup, Wishes

START_SECONDS = 60.0  # for workers that begin anew
SILENCE_SECONDS = 24 * 3600.0  # a request may wait for others, and for a slow link
REQUEST_SECONDS = 30.0  # for a whole request to come, on one machine
REPLY_SECONDS = 5.0  # for who asked to read something of the answer
FAREWELL_SECONDS = 1.0  # for all who asked to be told that the workers end
MOST_CLIENTS = 32  # that are read or wait at once; others wait before the door
MOST_INPUTS = 1024  # pictures or texts of a request


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of `astra worker`."""

    setup: Annotated[Setup, tyro.conf.arg(name="")]


def socket_path(coordinator: str) -> Path:
    """Where the workers of this coordinator are asked, on host 0. The folder is the user's alone.

    Raises:
      AstraError: the folder belongs to somebody else, or the coordinator is no address.
    """
    address, port = parse_address(coordinator, allow_public=True)
    # Not `tempfile.gettempdir()`, which is another folder where the disk of this one is full.
    places = map(os.environ.get, ("XDG_RUNTIME_DIR", "TMPDIR", "TEMP", "TMP"))
    folder = Path(next(filter(None, places), "/tmp")) / f"astra-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o077:
        raise AstraError(f"{folder}: must be a folder of yours that nobody else can open: remove it")
    return folder / f"{address}-{port}"


def _beginning(path: Path) -> Path:
    """The file that is there while workers begin anew, for which it is worth to wait."""
    return path.with_name(f"{path.name}-beginning")


# A request as a message


def packed(request: Request) -> bytes:
    """A request as a line of JSON, and the pictures one after the other.

    Raises:
      AstraError: it is more than workers take.
    """
    count, size = max(len(request.files), len(request.prompts)), sum(map(len, request.files))
    if count > MOST_INPUTS:
        raise AstraError(f"{count:,} inputs are more than workers take at once, {MOST_INPUTS:,}: ask for fewer")
    fields = dataclasses.asdict(request) | {"files": [len(file) for file in request.files]}
    head = json.dumps(fields).encode() + b"\n"
    if len(head) + size > MOST_BYTES:
        raise AstraError(
            f"the request has {len(head) + size:,} bytes, {size:,} of them pictures; workers take at most "
            f"{MOST_BYTES:,}: ask for fewer at once, or smaller ones"
        )
    return head + b"".join(request.files)


def unpacked(body: bytes) -> Request:
    """The inverse of `packed`. Raises AstraError for anything else, and for values that no request may have."""
    head, _, rest = body.partition(b"\n")
    try:
        fields, files = json.loads(head), []
        for size in _list(fields["files"], MOST_INPUTS):
            if not is_whole(size) or not 0 <= size <= len(rest):
                raise ValueError("a size that is none")
            files.append(rest[:size])
            rest = rest[size:]
        names, prompts = _list(fields["names"], MOST_INPUTS), _list(fields["prompts"], MOST_INPUTS)
        if rest or len(names) != len(files) or not all(isinstance(name, str) for name in names):
            raise ValueError("names and files that do not fit")
        given = fields["wishes"]
        sampling, stop = Sampling(**given["sampling"]), _list(given["stop"], MOST_INPUTS)
        wishes = Wishes(**given | {"sampling": sampling, "stop": tuple(stop)})
        return Request(tuple(names), tuple(files), tuple(prompts), wishes)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise AstraError("what was asked is not understood: use the same version of astra for both") from error


def _list(value: Any, most: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        raise ValueError("no list, or a longer one than is taken")
    return value


# Who asks


def ask(coordinator: str, checkpoint: Path, request: Request, report: Report) -> None:
    """Lets the workers of this host answer, and reports what they say. Where they begin anew, they are asked again.

    Raises:
      AstraError: there are none, they have another checkpoint, cannot answer this, or ended.
    """
    path, body = socket_path(coordinator), packed(request)
    deadline = time.monotonic() + (START_SECONDS if _beginning(path).exists() else 0)
    while True:
        line = _call(path, coordinator, deadline)
        try:
            line.send(SILENCE_SECONDS, body, checkpoint=str(checkpoint.resolve()))
            again = _listen(line, report)
        except OSError:
            if not _beginning(path).exists():
                raise AstraError(
                    f"the worker of {coordinator} on this host ended before it answered, or did not wait for a request "
                    f"that took more than {REQUEST_SECONDS:g} s to come"
                ) from None
            again = "the workers begin anew"
        finally:
            line.close()
        if again is None:
            return
        complain(f"astra: {one_line(again)}: asking again those that are left")
        deadline = time.monotonic() + START_SECONDS


def _call(path: Path, coordinator: str, deadline: float) -> Line:
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(path))
            return Line(connection)
        except OSError:
            connection.close()
            if time.monotonic() >= deadline:
                raise AstraError(
                    f"no worker of {coordinator} answers on this host: start `astra worker` on all hosts, here with "
                    "--host 0, and wait until it is ready"
                ) from None
            time.sleep(0.2)


def _listen(line: Line, report: Report) -> str | None:
    """Reports what the worker says. Returns why it has to be asked again; None where it is done."""
    while True:
        message = line.receive(SILENCE_SECONDS, MOST_BYTES)
        kind, said = message.get("kind"), json.loads(message.get("body", b"null"))
        if kind == "show":
            report.show(said)
        elif kind == "say":
            report.say(said["text"], **said["values"])
        elif kind == "table":
            report.table(said["name"], said["title"], said["rows"])
        elif kind == "error":
            raise AstraError(said)
        elif kind == "again":
            return str(said)
        elif kind == "done":
            return None


# Who answers


class _Gone(Exception):
    """Who asked is gone, and the rest of the answer is for nobody."""


class _Reply(Report):
    """What is reported goes to who asked.

    Args:
      outbox: takes what is to be sent: its kind, and JSON. The last one is of a kind of `LAST`.
    """

    LAST = ("done", "error", "again")

    def __init__(self, outbox: "queue.SimpleQueue[tuple[str, bytes]]"):
        super().__init__("run")
        self._outbox = outbox
        self.gone = threading.Event()  # who asked

    def send(self, kind: str, said: Any = None) -> None:
        self._outbox.put((kind, json.dumps(said).encode()))

    def show(self, text: str) -> None:
        if self.gone.is_set():
            raise _Gone
        if text:
            self.send("show", text)

    def say(self, text: str, **values: Any) -> None:
        self.send("say", {"text": text, "values": values})

    def table(self, name: str, title: str, rows: Any) -> None:
        self.send("table", {"name": name, "title": title, "rows": list(rows)})


class _Client:
    """Who asks. A thread reads the request and sends the answer, so that nobody else waits for who is slow.

    Args:
      line: the connection.
      asked: takes this client, once it has asked.
      left: is called when it is done.
    """

    def __init__(self, line: Line, asked: "queue.Queue[_Client]", left: Any):
        self.line, self.message, self._asked, self._left = line, dict[str, Any](), asked, left
        self._outbox = queue.SimpleQueue[tuple[str, bytes]]()
        self.reply = _Reply(self._outbox)

    def serve(self) -> None:
        """Reads the request, and sends the answer as it comes."""
        try:
            self.message = self.line.receive(REQUEST_SECONDS, MOST_BYTES, REQUEST_SECONDS)
            self._asked.put(self)
            kind = ""
            while kind not in _Reply.LAST:
                kind, said = self._outbox.get()
                self.line.send(REPLY_SECONDS, said, 2 * REPLY_SECONDS, kind=kind)
        except OSError:  # it is gone, too slow, or no `astra run`
            pass
        finally:
            self.line.close()
            self.reply.gone.set()
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
                client.reply.send("again" if goes_on else "error", why)
        for client in here:
            if client.message:
                client.reply.gone.wait(deadline - time.monotonic())

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


def serve(answerer: Answerer, checkpoint: Path, coordinator: str, report: Report) -> None:
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
                    _beginning(path).touch()
                path.unlink(missing_ok=True)  # first: who is told to ask again must not come here
            clients.farewell(why, goes_on)

        if answerer.here:
            answerer.here.lifeline.farewell = farewell
        _beginning(path).unlink(missing_ok=True)
        report.say(f"ready: astra run {checkpoint} --workers {coordinator} (on this host)")
        try:
            while True:
                client = clients.asked.get()
                if not client.line.fate():
                    _answer(answerer, checkpoint, client.message, client.reply)
        finally:
            path.unlink(missing_ok=True)


def _answer(answerer: Answerer, checkpoint: Path, asked: dict[str, Any], reply: _Reply) -> None:
    """Answers one request. Whatever fails is the answer, unless other hosts are left behind in a collective."""
    here, begun = answerer.here, False
    try:
        if asked.get("checkpoint") != str(checkpoint.resolve()):
            raise AstraError(f"the workers have loaded {checkpoint.resolve()}: ask for it, or start others")
        request = answerer.shrink(unpacked(asked.get("body", b"")))
        inputs = answerer.inputs(request)
        if here:
            body = packed(request)
            begun = True
            here.lifeline.ask(body)
        answerer.answer(lambda: (request, inputs), reply)
        reply.send("done")
    except AstraError as error:  # on several hosts, all agree on it
        reply.send("error", str(error))
    except _Gone:  # only while host 0 goes on alone with a text
        reply.send("done")
    except Exception as error:
        reply.send("error", f"the workers failed: {runtime.reason(error)}")
        if here and begun and here.lifeline.needs:
            raise
        traceback.print_exc()
    finally:
        if here:
            here.lifeline.need(True)


def _read(answerer: Answerer, body: bytes) -> tuple[Request, Any]:
    request = unpacked(body)
    return request, answerer.inputs(request)


def main(args: Args) -> None:
    """Runs `astra worker`."""
    setup, report = args.setup, Report("worker")
    answerer = Answerer(setup, report)
    here = answerer.here
    if here and here.lifeline.host:
        write(f"host {here.lifeline.host}: ready\n")
        while True:
            body = here.lifeline.requests.get()
            with contextlib.suppress(AstraError):  # all hosts agree on it, and host 0 tells who asked
                answerer.answer(partial(_read, answerer, body), report)
    coordinator = here.coordinator if here else setup.several.coordinator
    if not coordinator:
        raise AstraError("a worker is one of several hosts: give --coordinator, --hosts and --host")
    serve(answerer, setup.checkpoint, coordinator, report)
