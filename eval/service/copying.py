"""A checkpoint from host 0 to a host that has none: file by file, in pieces, into a cache that knows it by its content.

What crosses the network goes over the control connection, so nobody else can read or change it. The host that copies
asks for every piece, so that a slow link holds up nothing but itself, and goes on where it was cut off before.
"""

import json
import queue
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import checkpoints
from astra_jax.cli.compilation_cache import folder as cache_folder
from astra_jax.errors import AstraError
from astra_jax.hosts.control import Connection, Message, connect
from astra_jax.hosts.invitation import Invitation
from astra_jax.report import progress
from checkpoints.lock import alone, waiting

PIECE = 1 << 20  # bytes that are asked for at once
SILENCE_SECONDS = 120.0  # of host 0
MOST_FILES = 100_000
MOST_SIZE = 1 << 42  # of a file
_NAME = re.compile(r"(astra\.json|(weights|tokenizer)-\d{4,}(/[\w.+-]+){1,6})", re.ASCII)


class Offer:
    """What host 0 gives to hosts that have no checkpoint: its own.

    Args:
      checkpoint: its folder.
    """

    def __init__(self, checkpoint: Path):
        self._files = checkpoints.files(checkpoint)
        self._digest = digest(checkpoint)

    def listing(self) -> bytes:
        """What there is: names and sizes."""
        sizes = {name: path.stat().st_size for name, path in self._files.items()}
        return json.dumps({"digest": self._digest, "files": sizes}).encode()

    def piece(self, asked: Message) -> bytes:
        """A part of a file. Raises KeyError, TypeError, ValueError or OSError where there is none."""
        with self._files[asked["name"]].open("rb") as file:
            file.seek(asked["offset"])
            return file.read(PIECE)


def digest(checkpoint: Path) -> str:
    """What a checkpoint is known by. Raises AstraError where nothing knows it."""
    found = checkpoints.read_meta(checkpoint).digest
    if found is None:
        raise AstraError(f"{checkpoint}: has no checksums, so that hosts cannot compare it: convert it again")
    return str(found)


def fetch(invitation: Invitation, say: Callable[[str], Any], cache: Path | None = None) -> Path:
    """The checkpoint that host 0 has loaded, copied here unless it is here already.

    Args:
      say: is told in a line what is copied, and where to.
      cache: where copies are kept, a folder for each; by default the user's cache.

    Raises:
      AstraError: host 0 is not there, or ended; there is no room; what came is no such checkpoint.
    """
    cache = cache or (cache_folder() or Path(".")) / "checkpoints"
    messages = queue.Queue[Message]()
    connection = connect(invitation, {"role": "copy"}, messages.put)
    try:
        wanted, sizes = _checked(_next(messages))
        with alone(cache / f".{wanted}.lock", waiting(cache / wanted)):
            if not (cache / wanted).is_dir():
                say(f"copying the checkpoint of host 0, {sum(sizes.values()):,} bytes, to {cache / wanted}")
                _copy(connection, messages, sizes, cache / f".{wanted}.part")
                _keep(cache / f".{wanted}.part", cache / wanted)
        return cache / wanted
    finally:
        connection.close()


def _next(messages: queue.Queue[Message]) -> bytes:
    try:
        return bytes(messages.get(timeout=SILENCE_SECONDS)["body"])
    except (queue.Empty, KeyError):
        raise AstraError("host 0 ended, or says nothing: start this host again, it goes on with the copy") from None


def _checked(listing: bytes) -> tuple[str, dict[str, int]]:
    """The digest of a checkpoint, and sizes of its files. Raises AstraError for what none has."""
    try:
        told = json.loads(listing)
        wanted, sizes = told["digest"], told["files"]
        fine = re.fullmatch(r"[0-9a-f]{64}", wanted) and "astra.json" in sizes and len(sizes) <= MOST_FILES
        parts = [part for name in sizes for part in name.split("/")]
        fine = fine and all(map(_NAME.fullmatch, sizes)) and not {".", ".."} & set(parts)
        if not fine or not all(type(size) is int and 0 <= size <= MOST_SIZE for size in sizes.values()):
            raise ValueError("no checkpoint")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise AstraError("what host 0 offers is no checkpoint: use the same version of astra on both") from None
    return wanted, sizes


def _copy(connection: Connection, messages: queue.Queue[Message], sizes: Mapping[str, int], to: Path) -> None:
    there = {name: (to / name).stat().st_size if (to / name).is_file() else 0 for name in sizes}
    there = {name: size if size <= sizes[name] else 0 for name, size in there.items()}
    missing = sum(sizes.values()) - sum(there.values())
    to.mkdir(parents=True, exist_ok=True)
    if (room := shutil.disk_usage(to).free) < missing:
        raise AstraError(f"{to}: there are {room:,} bytes free, and {missing:,} are needed: make room")
    with progress("bytes of the checkpoint", sum(sizes.values()), sum(there.values())) as advance:
        for name, size in sizes.items():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            with (to / name).open("r+b" if there[name] else "wb") as file:
                file.seek(there[name])
                while file.tell() < size:
                    connection.send(kind="piece", name=name, offset=file.tell())
                    content = _next(messages)
                    if not 0 < len(content) <= size - file.tell():
                        raise AstraError(f"the checkpoint of host 0 changed while it was copied ({name}): ask again")
                    file.write(content)
                    advance(len(content))


def _keep(part: Path, whole: Path) -> None:
    """Makes a copy that is complete one that is used. Its parts are verified whenever it is loaded."""
    try:
        found = digest(part)
        if found != whole.name:
            raise AstraError("it has another digest")
    except AstraError as error:
        shutil.rmtree(part)
        raise AstraError(f"what came is not the checkpoint of host 0 ({error}): ask again") from error
    part.rename(whole)
