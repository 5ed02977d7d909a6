"""How workers are asked, and how an answer travels back."""

import socket
import threading
from pathlib import Path

import pytest

from astra_jax.errors import AstraError
from astra_jax.hosts.connection import Line
from eval.service import client, messages
from eval.service.requests import Request, unpacked


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


def test_the_socket_is_in_a_folder_of_the_user_alone(runtime):
    path = client.socket_path("127.0.0.1:7777")
    assert path == client.socket_path("localhost:7777") and path.name == "127.0.0.1-7777"
    assert path.parent.parent == runtime and path.parent.stat().st_mode & 0o777 == 0o700
    path.parent.chmod(0o755)
    with pytest.raises(AstraError, match="must be a folder of yours that nobody else can open"):
        client.socket_path("127.0.0.1:7777")
    path.parent.rmdir()
    path.parent.symlink_to(runtime)
    with pytest.raises(AstraError, match="must be a folder of yours"):
        client.socket_path("127.0.0.1:7777")


def test_without_a_worker_the_line_says_how_to_start_one(runtime):
    with pytest.raises(AstraError, match=r"no worker of 127.0.0.1:7777 answers on this host: start `astra worker`"):
        list(client.ask("127.0.0.1:7777", Path("vit"), Request()))


def asked(runtime, *answers):
    """What comes where the worker gives these answers, one per connection, and what it was asked."""
    path, requests = client.socket_path("127.0.0.1:7777"), []
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()

    def serve():
        for answer in answers:
            line = Line(server.accept()[0])
            requests.append(line.receive(5.0, 1 << 20))
            for message in answer:
                kind, body = messages.pack(message)
                line.send(5.0, body, kind=kind)
            line.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        return list(client.ask("127.0.0.1:7777", Path("vit"), Request(prompts=("a",)))), requests
    finally:
        thread.join(5)
        server.close()


EVERY = [
    messages.Pairs([{"hosts": "0-1", "rate": 1e6}]),
    messages.Quantized(5, 20),
    messages.BeganAnew("10.0.0.1:7777", 2, 0, 3, "host 1 is gone"),
    messages.ShortText(1, 4),
    messages.Table("classes", "vit", 4, [{"input": "a [b].png", "class": "cat", "probability": 0.5}]),
    messages.PassTime(0.012, 1.5, 2, 40, True),
    messages.TextBegins(9),
    messages.Piece(0, 17, "so [it] goes \U0001f600\n" * 2000, None),
    messages.Piece(0, 2, "", "eos"),
    messages.TextTime([3], 0.01, 0.0, 80.5, 12, 100, 800, 4),
    messages.HostTimes([{"host": 0, "compute ms": None}], None, 1.5),
    messages.NoHostTimes("why"),
]


def test_an_answer_arrives_as_it_was(runtime):
    """Every kind of message, and the request."""
    assert {type(message) for message in EVERY} | set(messages.LAST) == set(messages.Message.__subclasses__())
    found, (request,) = asked(runtime, [*EVERY, messages.Done()])
    assert found == EVERY
    assert request["checkpoint"] == str(Path("vit").resolve())
    assert unpacked(request["body"]) == Request(prompts=("a",))


def test_an_error_of_the_worker_is_one_of_who_asked(runtime):
    with pytest.raises(AstraError, match="takes pictures"):
        asked(runtime, [messages.Failed("vit: takes pictures")])


def test_workers_that_end_are_noticed(runtime):
    with pytest.raises(AstraError, match="ended before it answered"):
        asked(runtime, [messages.Piece(0, 1, "half an ans", None)])
    client.socket_path("127.0.0.1:7777").unlink()
    with pytest.raises(AstraError, match="host 1 is gone"):
        asked(runtime, [messages.Failed("host 1 is gone")])


def test_workers_that_begin_anew_are_asked_again(runtime):
    again = messages.AskAgain("host 1 is gone")
    found, requests = asked(runtime, [messages.TextBegins(2), again], [messages.TextBegins(3), messages.Done()])
    assert found == [messages.TextBegins(2), again, messages.TextBegins(3)] and requests[0] == requests[1]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("kind", "body"), [("Nothing", b"{}"), (None, b"{}"), ("Done", b"[" * 100_000), ("Piece", b"{}"), ("Failed", b"[]")]
)
def test_what_is_no_message(kind, body):
    with pytest.raises(AstraError, match="what workers say is not understood"):
        messages.unpack(kind, body)
