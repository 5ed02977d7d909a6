"""Keep a checkpoint loaded on several hosts, and answer any number of requests with it.

    astra worker CHECKPOINT --coordinator 10.0.0.1:7777 --hosts 4 --host 1

The same on every host, with another --host. Then, on host 0: `astra run CHECKPOINT --image cat.png --workers
10.0.0.1:7777`. Nothing is loaded or compiled anew (but for inputs of another shape), and nobody has to go to the other
hosts: host 0 sends them what is to be read. Requests are answered one after the other. They come by a socket in the
file system of host 0, which is open to the user of the worker alone.
"""

import contextlib
import dataclasses
import json
import os
import socket
import stat
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import tyro

from astra_jax.console import Report
from astra_jax.errors import AstraError
from astra_jax.generate import Sampling
from astra_jax.hosts import parse_address
from astra_jax.lifeline import MOST_BYTES
from astra_jax.line import Line
from eval.answer import Answerer, Request, Setup, Wishes

START_SECONDS = 60.0  # for workers that begin anew
SILENCE_SECONDS = 24 * 3600.0  # a request may wait for others, and for a slow link


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
    folder = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"astra-{os.getuid()}"
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
    """A request as a line of JSON, and the pictures one after the other."""
    fields = dataclasses.asdict(request) | {"files": [len(file) for file in request.files]}
    return json.dumps(fields).encode() + b"\n" + b"".join(request.files)


def unpacked(body: bytes) -> Request:
    """The inverse of `packed`. Raises AstraError for anything else."""
    head, _, rest = body.partition(b"\n")
    try:
        fields, files = json.loads(head), []
        for size in fields["files"]:
            files.append(rest[:size])
            rest = rest[size:]
        wishes = fields["wishes"]
        wishes = Wishes(**wishes | {"sampling": Sampling(**wishes["sampling"]), "stop": tuple(wishes["stop"])})
        return Request(tuple(fields["names"]), tuple(files), tuple(fields["prompts"]), wishes)
    except (ValueError, TypeError, KeyError) as error:
        raise AstraError("what was asked is not understood: use the same version of astra for both") from error


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
            raise AstraError(f"the worker of {coordinator} on this host ended before it answered") from None
        finally:
            line.close()
        if again is None:
            return
        print(f"astra: {again}: asking again those that are left", file=sys.stderr, flush=True)
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
        if "show" in message:
            report.show(message["show"])
        elif "say" in message:
            said = json.loads(message["body"])
            report.say(said["text"], **said["values"])
        elif "table" in message:
            table = json.loads(message["body"])
            report.table(message["table"], table["title"], table["rows"])
        elif "error" in message:
            raise AstraError(str(message["error"]))
        elif "again" in message:
            return str(message["again"])
        elif "done" in message:
            return None


# Who answers


class _Reply(Report):
    """What is reported goes to who asked; if that is gone, to nobody."""

    def __init__(self, line: Line):
        super().__init__("run")
        self._line = line

    def _send(self, values: Any = None, **message: Any) -> None:
        with contextlib.suppress(OSError):
            self._line.send(5.0, b"" if values is None else json.dumps(values).encode(), **message)

    def farewell(self, why: str, goes_on: bool) -> None:
        """Tells who asked that the workers end, or begin anew."""
        self._send(**{"again" if goes_on else "error": why})

    def show(self, text: str) -> None:
        for start in range(0, len(text), 1000):  # a line is limited
            self._send(show=text[start : start + 1000])

    def say(self, text: str, **values: Any) -> None:
        self._send({"text": text, "values": values}, say=True)

    def table(self, name: str, title: str, rows: Any) -> None:
        self._send({"title": title, "rows": list(rows)}, table=name)


def serve(answerer: Answerer, checkpoint: Path, coordinator: str, report: Report) -> None:
    """Host 0: answers who asks at its socket, without end."""
    path = socket_path(coordinator)
    asking: list[_Reply] = []  # the last one

    def farewell(why: str, goes_on: bool) -> None:
        if goes_on:
            _beginning(path).touch()
        path.unlink(missing_ok=True)  # first: who is told to ask again must not come here
        for reply in asking:
            reply.farewell(why, goes_on)

    if answerer.here:
        answerer.here.lifeline.farewell = farewell
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        _beginning(path).unlink(missing_ok=True)
        report.say(f"ready: astra run {checkpoint} --workers {coordinator} (on this host)")
        try:
            while True:
                line = Line(server.accept()[0])
                asking[:] = [_Reply(line)]
                with contextlib.suppress(OSError):  # who asked is gone, or no `astra run`
                    _answer(answerer, checkpoint, line.receive(5.0, MOST_BYTES), asking[0])
                line.close()
        finally:
            path.unlink(missing_ok=True)


def _answer(answerer: Answerer, checkpoint: Path, asked: dict[str, Any], reply: _Reply) -> None:
    here = answerer.here
    try:
        if asked.get("checkpoint") != str(checkpoint.resolve()):
            raise AstraError(f"the workers have loaded {checkpoint.resolve()}: ask for it, or start others")
        request = answerer.shrink(unpacked(asked.get("body", b"")))
        inputs = answerer.inputs(request)
        if here:
            here.lifeline.ask(packed(request))
        answerer.answer(request, inputs, reply)
    except AstraError as error:
        reply._send(error=str(error))
    else:
        reply._send(done=True)
    finally:
        if here:
            here.lifeline.need(True)


def main(args: Args) -> None:
    """Runs `astra worker`."""
    setup, report = args.setup, Report("worker")
    answerer = Answerer(setup, report)
    here = answerer.here
    if here and here.lifeline.host:
        print(f"host {here.lifeline.host}: ready", flush=True)
        while True:
            request = unpacked(here.lifeline.requests.get())
            answerer.answer(request, answerer.inputs(request), report)
    coordinator = here.coordinator if here else setup.several.coordinator
    if not coordinator:
        raise AstraError("a worker is one of several hosts: give --coordinator, --hosts and --host")
    serve(answerer, setup.checkpoint, coordinator, report)
