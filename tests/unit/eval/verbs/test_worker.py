"""How a request travels to the workers and an answer back. That several hosts answer is in tests/multihost."""

import contextlib
import dataclasses
import json
import queue
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astra_jax.errors import AstraError
from astra_jax.hosts.connection import Line
from astra_jax.report import Report
from astra_jax.serving.generate import Sampling
from eval.verbs import worker
from eval.verbs.answer import Request, Wishes

SAMPLING = {"temperature": st.just(0.0) | st.floats(0.1, 2), "top_k": st.integers(0, 9), "seed": st.integers(0, 9)}
STOPS = st.lists(st.text(min_size=1), max_size=3)
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


GOOD = {"names": ["a"], "files": [1], "prompts": [], "wishes": dataclasses.asdict(Wishes())}
SAMPLED = dataclasses.asdict(Sampling())


@pytest.mark.parametrize(
    "wrong",
    [
        {"names": "a"},
        {"names": [1]},
        {"names": ["a", "b"]},
        {"names": None},
        {"files": [2]},
        {"files": [-1]},
        {"files": [True]},
        {"files": [0]},
        {"files": [1.0]},
        {"files": 1},
        {"files": [1e400]},
        {"prompts": "text"},
        {"prompts": [1]},
        {"prompts": [["a"]]},
        {"prompts": ["\udce9"]},
        {"prompts": ["a" * 5_000_000]},
        {"prompts": ["a"] * 1025},
        {"wishes": None},
        {"wishes": []},
        {"wishes": {"top": 1}},
        {"wishes": GOOD["wishes"] | {"top": 0}},
        {"wishes": GOOD["wishes"] | {"top": "5"}},
        {"wishes": GOOD["wishes"] | {"top": 1.5}},
        {"wishes": GOOD["wishes"] | {"max_new_tokens": "5"}},
        {"wishes": GOOD["wishes"] | {"max_new_tokens": True}},
        {"wishes": GOOD["wishes"] | {"stop": "word"}},
        {"wishes": GOOD["wishes"] | {"stop": [""]}},
        {"wishes": GOOD["wishes"] | {"stop": [5]}},
        {"wishes": GOOD["wishes"] | {"stop": ["\ud800"]}},
        {"wishes": GOOD["wishes"] | {"sampling": None}},
        {"wishes": GOOD["wishes"] | {"sampling": SAMPLED | {"heat": 1}}},
        {"wishes": GOOD["wishes"] | {"sampling": SAMPLED | {"temperature": float("nan")}}},
        {"wishes": GOOD["wishes"] | {"sampling": SAMPLED | {"temperature": [1]}}},
        {"wishes": GOOD["wishes"] | {"sampling": SAMPLED | {"top_k": 0.5}}},
        {"wishes": GOOD["wishes"] | {"sampling": SAMPLED | {"top_p": None}}},
        {"wishes": GOOD["wishes"] | {"sampling": SAMPLED | {"seed": 2**32}}},
    ],
    ids=lambda wrong: str(wrong)[:60],
)
def test_every_field_of_a_request_has_a_type_and_a_range(unchecked, wrong):
    """Before it comes to anything that all hosts do together."""
    assert worker.unpacked(json.dumps(GOOD).encode() + b"\nx") == Request(("a",), (b"x",))
    with pytest.raises(AstraError):
        worker.unpacked(json.dumps(GOOD | wrong).encode() + b"\nx")


@pytest.mark.parametrize(
    "deep", [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 100_000], ids=["lists", "objects", "digits"]
)
def test_a_request_that_is_deep(deep):
    with pytest.raises(AstraError, match="is not understood"):
        worker.unpacked(deep)


def test_a_request_that_is_too_large_says_so_before_it_is_sent():
    half = bytes(150_000_000)
    with pytest.raises(
        AstraError, match=r"300,000,000 of them pictures; workers take at most 268,435,456: ask for fewer"
    ):
        worker.packed(Request(("a", "b"), (half, half)))
    with pytest.raises(AstraError, match="1,025 inputs are more than workers take at once, 1,024"):
        worker.packed(Request(prompts=("a",) * 1025))


def test_a_prompt_that_is_no_utf_8():
    """As Python reads `--prompt caf\\xe9` where the terminal has latin-1."""
    with pytest.raises(
        AstraError, match=r"--prompt: its character 4 is '\\udce9', which is none: give the text in UTF-8"
    ):
        Request(prompts=("fine", b"caf\xe9".decode(errors="surrogateescape")))


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
            box = queue.SimpleQueue()
            answer(worker._Reply(box))
            while not box.empty():
                kind, said = box.get()
                line.send(5.0, said, kind=kind)
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
    text = "so [it] goes \U0001f600\n" * 2000

    def answer(reply):
        reply.show(text)
        reply.table("classes", "title", [{"class": "cat", "probability": 0.5}])
        reply.say("12 ms", seconds=0.012)
        reply.send("done")

    data, (request,) = asked(runtime, answer)
    assert data == {"verb": "run", "classes": [{"class": "cat", "probability": 0.5}], "seconds": 0.012}
    assert request["checkpoint"] == str(Path("vit").resolve())
    assert worker.unpacked(request["body"]) == Request(prompts=("a",))
    out = capsys.readouterr().out
    assert out.startswith(text) and "cat" in out and out.endswith("12 ms\n")


def test_an_error_of_the_worker_is_one_of_who_asked(runtime):
    with pytest.raises(AstraError, match="takes pictures"):
        asked(runtime, lambda reply: reply.send("error", "vit: takes pictures"))


def test_workers_that_end_are_noticed(runtime):
    with pytest.raises(AstraError, match="ended before it answered"):
        asked(runtime, lambda reply: reply.show("half an ans"))
    worker.socket_path("127.0.0.1:7777").unlink()
    with pytest.raises(AstraError, match="host 1 is gone"):
        asked(runtime, lambda reply: reply.send("error", "host 1 is gone"))


def test_workers_that_begin_anew_are_asked_again(runtime, capsys):
    again = lambda reply: reply.send("again", "host 1 is gone")  # noqa: E731
    data, requests = asked(runtime, again, lambda reply: [reply.say("2 ms", seconds=2), reply.send("done")])
    assert data["seconds"] == 2 and requests[0] == requests[1]
    assert capsys.readouterr().err == "astra: host 1 is gone: asking again those that are left\n"


# Who answers


class Engine:
    """Stands for a loaded checkpoint: shows its prompt, or fails as the prompt says. Is told to go on by `go`."""

    here = None

    def __init__(self):
        self.go, self.answered = threading.Event(), []
        self.go.set()

    def shrink(self, request):
        return request

    def inputs(self, request):
        if request.prompts == ("fail to read",):
            raise MemoryError("too much")
        return request.prompts

    def answer(self, read, report):
        _, inputs = read()
        self.go.wait(10)
        self.answered += inputs
        if inputs == ("fail",):
            raise RuntimeError("a bug\nof two lines")
        if inputs == ("refuse",):
            raise AstraError("takes pictures")
        for _ in range(3):
            report.show(inputs[0])
            time.sleep(0.05)
        report.say("done", values=[1])


@pytest.fixture
def serving(runtime, unchecked, monkeypatch):
    """An engine that is served at 127.0.0.1:7777, and who asks it."""
    monkeypatch.setattr(worker, "REQUEST_SECONDS", 1.0)
    monkeypatch.setattr(worker, "REPLY_SECONDS", 0.5)
    engine = Engine()
    threading.Thread(
        target=worker.serve, args=(engine, Path("vit"), "127.0.0.1:7777", Report("worker")), daemon=True
    ).start()
    for _ in range(500):
        if worker.socket_path("127.0.0.1:7777").exists():
            break
        time.sleep(0.01)

    def ask(prompt):
        report = Report("run")
        worker.ask("127.0.0.1:7777", Path("vit"), Request(prompts=(prompt,)), report)
        return report.data

    return SimpleNamespace(engine=engine, ask=ask)


def connected():
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(worker.socket_path("127.0.0.1:7777")))
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
        assert serving.ask("fine")["values"] == [1]
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
    assert message["kind"] == "error" and b"is not understood" in message["body"]
    assert serving.ask("fine")["values"] == [1]


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
    deaf.send(1.0, worker.packed(Request(prompts=("x" * 1_000_000,))), checkpoint=str(Path("vit").resolve()))
    start = time.monotonic()
    assert serving.ask("fine")["values"] == [1]
    assert time.monotonic() - start < 0.9
    time.sleep(1.5)
    for connection in (stopped, dripping):
        connection.settimeout(1)
        with contextlib.suppress(ConnectionError):
            assert connection.recv(1) == b"", "it is let go"


def test_requests_wait_for_each_other_and_nobody_for_who_is_gone(serving):
    serving.engine.go.clear()
    found = []
    threads = [threading.Thread(target=lambda: found.append(serving.ask("fine"))) for _ in range(3)]
    threads[0].start()
    time.sleep(0.2)
    gone = Line(connected())
    gone.send(1.0, worker.packed(Request(prompts=("nobody's",))), checkpoint=str(Path("vit").resolve()))
    time.sleep(0.2)
    gone.close()
    for thread in threads[1:]:
        thread.start()
    time.sleep(0.2)
    serving.engine.go.set()
    for thread in threads:
        thread.join(10)
    assert len(found) == 3 and serving.engine.answered == ["fine"] * 3


def test_an_answer_ends_where_who_asked_is_gone(serving):
    """A long text is not written for nobody."""
    line = Line(connected())
    line.send(1.0, worker.packed(Request(prompts=("x" * 100_000,))), checkpoint=str(Path("vit").resolve()))
    line.receive(5.0, 1 << 20)
    line.close()
    assert serving.ask("fine")["values"] == [1]
