"""Asking workers on this host: what they answer comes as the messages of a checkpoint that is loaded here would."""

import os
import socket
import stat
import time
from collections.abc import Generator, Iterator
from pathlib import Path

from astra_jax.errors import AstraError
from astra_jax.hosts.connection import Line
from astra_jax.hosts.options import parse_address
from eval.service.messages import AskAgain, Done, Failed, Message, unpack
from eval.service.requests import Request, packed

START_SECONDS = 60.0  # for workers that begin anew
SILENCE_SECONDS = 24 * 3600.0  # a request may wait for others, and for a slow link
MOST_ANSWER_BYTES = 1 << 28  # of one message
REQUEST_SECONDS = 30.0  # for a whole request to come, on one machine


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


def beginning(path: Path) -> Path:
    """The file that is there while workers begin anew, for which it is worth to wait."""
    return path.with_name(f"{path.name}-beginning")


def ask(coordinator: str, checkpoint: Path, request: Request) -> Iterator[Message]:
    """Lets the workers of this host answer. Where they begin anew, `AskAgain` comes, and then a whole answer.

    Raises:
      AstraError: there are none, they have another checkpoint, cannot answer this, or ended.
    """
    path, body = socket_path(coordinator), packed(request)
    deadline = time.monotonic() + (START_SECONDS if beginning(path).exists() else 0)
    while True:
        line = call(path, coordinator, deadline)
        try:
            line.send(SILENCE_SECONDS, body, checkpoint=str(checkpoint.resolve()))
            again = yield from _heard(line)
        except OSError:
            if not beginning(path).exists():
                raise AstraError(
                    f"the worker of {coordinator} on this host ended before it answered, or did not wait for a request "
                    f"that took more than {REQUEST_SECONDS:g} s to come"
                ) from None
            again = AskAgain("the workers begin anew")
        finally:
            line.close()
        if again is None:
            return
        yield again
        deadline = time.monotonic() + START_SECONDS


def call(path: Path, coordinator: str, deadline: float) -> Line:
    """Connects with the worker at a socket. Raises AstraError where there is none until the deadline."""
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


def _heard(line: Line) -> Generator[Message, None, AskAgain | None]:
    """What the worker says, and at the end why it has to be asked again; None where it is done."""
    while True:
        message = line.receive(SILENCE_SECONDS, MOST_ANSWER_BYTES)
        said = unpack(message.get("kind"), message.get("body", b""))
        if isinstance(said, Failed):
            raise AstraError(said.why)
        if isinstance(said, AskAgain):
            return said
        if isinstance(said, Done):
            return None
        yield said
