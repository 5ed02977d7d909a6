"""Asking workers: what they answer comes as the messages of a checkpoint that is loaded here would."""

import queue
from collections.abc import Iterator
from pathlib import Path

from astra_jax.errors import AstraError
from astra_jax.hosts.control import Message as Told
from astra_jax.hosts.control import connect
from astra_jax.hosts.invitation import Invitation
from eval.service.copying import digest
from eval.service.messages import Done, Failed, Message, Ways, unpack
from eval.service.requests import Request, packed

SILENCE_SECONDS = 600.0  # of workers that compile, or answer others first


def ask(invitation: Invitation, checkpoint: Path, request: Request) -> Iterator[Message]:
    """Lets workers answer.

    Raises:
      AstraError: there are none, they have another checkpoint, cannot answer this, or ended.
    """
    yield from _asked(invitation, {"digest": digest(checkpoint)}, packed(request))


def check(invitation: Invitation) -> Ways:
    """How fast the links between workers are.

    Raises:
      AstraError: there are none, or they ended.
    """
    (found,) = _asked(invitation, {"check": True})
    assert isinstance(found, Ways)
    return found


def _asked(invitation: Invitation, hello: Told, body: bytes = b"") -> Iterator[Message]:
    messages = queue.Queue[Told]()
    connection = connect(invitation, {"role": "client"} | hello, messages.put, body)
    try:
        while True:
            try:
                told = messages.get(timeout=SILENCE_SECONDS)
            except queue.Empty:
                raise AstraError(
                    f"the workers said nothing for {SILENCE_SECONDS:g} s: look at what host 0 prints"
                ) from None
            if not told:
                raise AstraError("the workers ended before they answered: look at what host 0 prints")
            if told.get("kind") == "busy":
                raise AstraError("the workers are busy, and many wait already: ask again later")
            said = unpack(told.get("kind"), told.get("body", b""))
            if isinstance(said, Failed):
                raise AstraError(said.why)
            if isinstance(said, Done):
                return
            yield said
    finally:
        connection.close()
