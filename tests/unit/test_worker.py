"""How a request travels to the workers and an answer back. That several hosts answer is in tests/multihost."""

import socket
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astra_jax.console import Report
from astra_jax.errors import AstraError
from astra_jax.generate import Sampling
from astra_jax.line import Line
from eval import worker
from eval.answer import Request, Wishes

SAMPLING = {"temperature": st.floats(0, 2), "top_k": st.integers(0, 9), "seed": st.integers(0, 9)}
STOPS = st.lists(st.text(), max_size=3)
PICTURES = st.lists(st.tuples(st.text(), st.binary()), max_size=4)


@given(PICTURES, st.lists(st.text(), max_size=4), st.fixed_dictionaries(SAMPLING), STOPS, st.none() | st.integers(0, 9))
def test_a_request_arrives_as_it_was(pictures, prompts, sampling, stop, new_tokens):
    """With any names, any contents (also with line ends in them), any texts."""
    wishes = Wishes(3, new_tokens, Sampling(**sampling), tuple(stop))
    names, files = (tuple(column) for column in zip(*pictures, strict=True)) if pictures else ((), ())
    request = Request(names, files, tuple(prompts), wishes)
    assert worker.unpacked(worker.packed(request)) == request


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b'{"files": [1], "wishes": {}}', b"\xff"], ids=repr)
def test_what_is_no_request(body):
    with pytest.raises(AstraError, match="is not understood"):
        worker.unpacked(body)


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


def test_the_socket_is_in_a_folder_of_the_user_alone(runtime):
    path = worker.socket_path("127.0.0.1:7777")
    assert path == worker.socket_path("localhost:7777") and path.name == "127.0.0.1-7777"
    assert path.parent.parent == runtime and path.parent.stat().st_mode & 0o777 == 0o700
    path.parent.chmod(0o755)
    with pytest.raises(AstraError, match="must be a folder of yours that nobody else can open"):
        worker.socket_path("127.0.0.1:7777")
    path.parent.rmdir()
    path.parent.symlink_to(runtime)
    with pytest.raises(AstraError, match="must be a folder of yours"):
        worker.socket_path("127.0.0.1:7777")


def test_without_a_worker_the_line_says_how_to_start_one(runtime):
    with pytest.raises(AstraError, match=r"no worker of 127.0.0.1:7777 answers on this host: start `astra worker`"):
        worker.ask("127.0.0.1:7777", Path("vit"), Request(), Report("run"))


def asked(runtime, *answers):
    """What is reported where the worker gives these answers, one per connection, and what it was asked."""
    path, requests, report = worker.socket_path("127.0.0.1:7777"), [], Report("run")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()

    def serve():
        for answer in answers:
            line = Line(server.accept()[0])
            requests.append(line.receive(5.0, 1 << 20))
            answer(worker._Reply(line))
            line.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        worker.ask("127.0.0.1:7777", Path("vit"), Request(prompts=("a",)), report)
        return report.data, requests
    finally:
        thread.join(5)
        server.close()


def test_an_answer_is_reported_as_if_it_was_from_here(runtime, capsys):
    text = "so [it] goes\n" * 200

    def answer(reply):
        reply.show(text)
        reply.table("classes", "title", [{"class": "cat", "probability": 0.5}])
        reply.say("12 ms", seconds=0.012)
        reply._send(done=True)

    data, (request,) = asked(runtime, answer)
    assert data == {"verb": "run", "classes": [{"class": "cat", "probability": 0.5}], "seconds": 0.012}
    assert request["checkpoint"] == str(Path("vit").resolve())
    assert worker.unpacked(request["body"]) == Request(prompts=("a",))
    out = capsys.readouterr().out
    assert out.startswith(text) and "cat" in out and out.endswith("12 ms\n")


def test_an_error_of_the_worker_is_one_of_who_asked(runtime):
    with pytest.raises(AstraError, match="takes pictures"):
        asked(runtime, lambda reply: reply._send(error="vit: takes pictures"))


def test_workers_that_end_are_noticed(runtime):
    with pytest.raises(AstraError, match="ended before it answered"):
        asked(runtime, lambda reply: reply.show("half an ans"))
    worker.socket_path("127.0.0.1:7777").unlink()
    with pytest.raises(AstraError, match="host 1 is gone"):
        asked(runtime, lambda reply: reply.farewell("host 1 is gone", goes_on=False))


def test_workers_that_begin_anew_are_asked_again(runtime, capsys):
    again = lambda reply: reply.farewell("host 1 is gone", goes_on=True)  # noqa: E731
    data, requests = asked(runtime, again, lambda reply: [reply.say("2 ms", seconds=2), reply._send(done=True)])
    assert data["seconds"] == 2 and requests[0] == requests[1]
    assert capsys.readouterr().err == "astra: host 1 is gone: asking again those that are left\n"
