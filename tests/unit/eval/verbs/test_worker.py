"""Who answers requests that come one after the other. That several hosts answer is in tests/multihost."""

import contextlib
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from astra_jax.errors import AstraError
from astra_jax.hosts.connection import Line
from astra_jax.report import Report
from eval.service import client
from eval.service.messages import Done, NoHostTimes, Piece
from eval.service.requests import Request, packed
from eval.verbs import worker

FINE = [*(Piece(0, token, "fine", None) for token in range(3)), NoHostTimes("done")]


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


class Loaded:
    """Stands for a service: says its prompt as a text, or fails as the prompt says. Is told to go on by `go`."""

    here = None

    def __init__(self):
        self.go, self.answered, self.said = threading.Event(), [], 0
        self.go.set()

    def smaller(self, request):
        return request

    def encode(self, request):
        if request.prompts == ("fail to read",):
            raise MemoryError("too much")
        return request.prompts

    def answer(self, read):
        _, inputs = read()
        self.go.wait(10)
        self.answered += inputs
        if inputs == ("fail",):
            raise RuntimeError("a bug\nof two lines")
        if inputs == ("refuse",):
            raise AstraError("takes pictures")
        for token in range(3):
            yield Piece(0, token, inputs[0], None)
            self.said += 1
            time.sleep(0.05)
        yield NoHostTimes("done")


@pytest.fixture
def serving(runtime, unchecked, monkeypatch):
    """An engine that is served at 127.0.0.1:7777, and who asks it."""
    monkeypatch.setattr(worker, "REQUEST_SECONDS", 1.0)
    monkeypatch.setattr(worker, "REPLY_SECONDS", 0.5)
    loaded = Loaded()
    threading.Thread(
        target=worker.serve, args=(loaded, Path("vit"), "127.0.0.1:7777", Report("worker")), daemon=True
    ).start()
    for _ in range(500):
        if client.socket_path("127.0.0.1:7777").exists():
            break
        time.sleep(0.01)

    def ask(prompt):
        return list(client.ask("127.0.0.1:7777", Path("vit"), Request(prompts=(prompt,))))

    return SimpleNamespace(loaded=loaded, ask=ask)


def connected():
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(client.socket_path("127.0.0.1:7777")))
    return connection


def test_whatever_fails_is_the_answer_and_the_next_is_answered(serving, capfd):
    for prompt, message in [
        ("fail", "the workers failed: RuntimeError: a bug of two lines"),
        ("refuse", "takes pictures"),
        ("fail to read", "the workers failed: MemoryError: too much"),
    ]:
        with pytest.raises(AstraError) as raised:
            serving.ask(prompt)
        assert str(raised.value) == message
        assert serving.ask("fine") == FINE
    assert "a bug" in capfd.readouterr().err, "who keeps the workers sees where it failed"


def test_what_is_no_request_is_answered_by_none_or_an_error(serving):
    for sent in [b"GET / HTTP/1.1\r\n\r\n", b"", b"{}\n", b'{"bytes": 999999999}\n', b"[" * 8000 + b"\n"]:
        with contextlib.closing(connected()) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            connection.settimeout(5)
            while connection.recv(1 << 16):
                pass
    with contextlib.closing(Line(connected())) as line:
        line.send(1.0, b"[" * 100_000, checkpoint=str(Path("vit").resolve()))
        message = line.receive(5.0, 1 << 20)
    assert message["kind"] == "Failed" and b"is not understood" in message["body"]
    assert serving.ask("fine") == FINE


def test_who_is_stopped_or_drips_holds_up_nobody(serving):
    """Neither while asking nor while reading; and is let go after a time."""
    stopped, dripping = connected(), connected()
    stopped.sendall(b'{"bytes"')
    dripping.sendall(b'{"checkpoint": "x", "bytes": 1000}\n')

    def drip():
        with contextlib.suppress(OSError):
            while True:
                dripping.sendall(b"x")
                time.sleep(0.1)

    threading.Thread(target=drip, daemon=True).start()
    deaf = Line(connected())
    deaf.send(1.0, packed(Request(prompts=("x" * 1_000_000,))), checkpoint=str(Path("vit").resolve()))
    start = time.monotonic()
    assert serving.ask("fine") == FINE
    assert time.monotonic() - start < 0.9
    time.sleep(1.5)
    for connection in (stopped, dripping):
        connection.settimeout(1)
        with contextlib.suppress(ConnectionError):
            assert connection.recv(1) == b"", "it is let go"


def test_requests_wait_for_each_other_and_nobody_for_who_is_gone(serving):
    serving.loaded.go.clear()
    found = []
    threads = [threading.Thread(target=lambda: found.append(serving.ask("fine"))) for _ in range(3)]
    threads[0].start()
    time.sleep(0.2)
    gone = Line(connected())
    gone.send(1.0, packed(Request(prompts=("nobody's",))), checkpoint=str(Path("vit").resolve()))
    time.sleep(0.2)
    gone.close()
    for thread in threads[1:]:
        thread.start()
    time.sleep(0.2)
    serving.loaded.go.set()
    for thread in threads:
        thread.join(10)
    assert len(found) == 3 and serving.loaded.answered == ["fine"] * 3


def test_an_answer_ends_where_who_asked_is_gone(serving):
    """A long text is not written for nobody."""
    line = Line(connected())
    line.send(1.0, packed(Request(prompts=("x" * 100_000,))), checkpoint=str(Path("vit").resolve()))
    line.receive(5.0, 1 << 20)
    line.close()
    assert serving.ask("fine") == FINE


@pytest.mark.usefixtures("unchecked")
def test_who_is_gone_is_told_no_more():
    """Not a piece more of a text, from when its connection has ended."""
    loaded, told = Loaded(), []
    client = SimpleNamespace(
        message={"checkpoint": str(Path("vit").resolve()), "body": packed(Request(prompts=("a",)))},
        gone=threading.Event(),
        tell=told.append,
    )
    client.gone.set()
    worker._answer(loaded, Path("vit"), client)
    assert told == [Done()] and loaded.said == 0
