"""How workers are asked, and how an answer travels back."""

import contextlib
import threading
from pathlib import Path

import pytest

from astra_jax.errors import AstraError
from astra_jax.hosts.control import Host0
from astra_jax.hosts.invitation import Invitation, new_secret
from eval.service import client, messages
from eval.service.requests import Request, unpacked


@pytest.fixture
def asked(monkeypatch):
    """Says what comes where the worker answers so, and what it was asked; `ends` says whether it ends after that."""
    monkeypatch.setattr(client, "digest", lambda checkpoint: str(checkpoint))
    with contextlib.ExitStack() as stack:

        def ask(*answer, ends=False):
            secret = new_secret()
            host0 = stack.enter_context(contextlib.closing(Host0("127.0.0.1", 0, secret)))
            requests = []

            def serve():
                event = host0.events.get()
                requests.append(event.message)
                for message in answer:
                    kind, body = messages.pack(message)
                    event.connection.send(body, kind=kind)
                if ends:
                    event.connection.close()

            threading.Thread(target=serve, daemon=True).start()
            invitation = Invitation("127.0.0.1", host0.port, secret)
            return list(client.ask(invitation, Path("vit"), Request(prompts=("a",)))), requests

        yield ask


EVERY = [
    messages.Quantized(5, 20),
    messages.ShortText(1, 4),
    messages.Table("classes", "vit", 4, [{"input": "a [b].png", "class": "cat", "probability": 0.5}]),
    messages.PassTime(0.012, 1.5, 2, 40, True),
    messages.TextBegins(9),
    messages.Piece(0, 17, "so [it] goes \U0001f600\n" * 2000, None),
    messages.Piece(0, 2, "", "eos"),
    messages.TextTime([3], 0.01, 0.0, 80.5, 12, 100, 800, 4),
    messages.HostTimes([{"host": 0, "compute ms": None}], None, 1.5),
    messages.NoHostTimes("why"),
    messages.Ways([{"hosts": "0 - 1", "Mbps there": None}], 2, 9.5e6, None),
    messages.Without(3, ["host 2"], 9),
]


def test_an_answer_arrives_as_it_was(asked):
    """Every kind of message, and the request."""
    assert {type(message) for message in EVERY} | set(messages.LAST) == set(messages.Message.__subclasses__())
    found, (request,) = asked(*EVERY, messages.Done())
    assert found == EVERY
    assert (request["role"], request["digest"]) == ("client", "vit")
    assert unpacked(request["body"]) == Request(prompts=("a",))


def test_an_error_of_the_workers_is_one_of_who_asked(asked):
    with pytest.raises(AstraError, match="takes pictures"):
        asked(messages.Failed("vit: takes pictures"))


def test_workers_that_end_are_noticed(asked):
    with pytest.raises(AstraError, match="ended before they answered"):
        asked(messages.Piece(0, 1, "half an ans", None), ends=True)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("kind", "body"), [("Nothing", b"{}"), (None, b"{}"), ("Done", b"[" * 100_000), ("Piece", b"{}"), ("Failed", b"[]")]
)
def test_what_is_no_message(kind, body):
    with pytest.raises(AstraError, match="what workers say is not understood"):
        messages.unpack(kind, body)
