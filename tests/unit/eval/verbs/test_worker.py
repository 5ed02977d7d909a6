"""Who answers requests that come one after the other. That several hosts answer is in tests/multihost."""

import contextlib
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from astra_jax.errors import AstraError
from astra_jax.hosts.company import Company
from astra_jax.hosts.control import connect
from astra_jax.hosts.invitation import Invitation, new_secret
from eval.service import client
from eval.service.messages import NoHostTimes, Piece, Ways
from eval.service.requests import Request, packed, unpacked
from eval.verbs import net, worker

FINE = [*(Piece(0, token, "fine", None) for token in range(3)), NoHostTimes("done")]


class Loaded:
    """Stands for a service: says its prompt as a text, or fails as the prompt says. Is told to go on by `go`."""

    name, checkpoint = "vit", SimpleNamespace(digest="abc")

    def __init__(self):
        self.go, self.answered, self.said = threading.Event(), [], 0
        self.go.set()

    def check(self):
        return Ways([], 3, 1e7, 0.002)

    def answer_one(self, body):
        (prompt,) = unpacked(body).prompts
        self.go.wait(10)
        self.answered.append(prompt)
        if prompt == "fail":
            raise RuntimeError("a bug\nof two lines")
        if prompt == "refuse":
            raise AstraError("takes pictures")
        for token in range(3 if prompt == "fine" else 1000):
            yield Piece(0, token, prompt, None)
            self.said += 1
            time.sleep(0.01)
        yield NoHostTimes("done")


@pytest.fixture
def serving(unchecked, monkeypatch):
    """An engine that is served, and who asks it."""
    monkeypatch.setattr(client, "digest", lambda checkpoint: "abc" if checkpoint == Path("vit") else "other")
    loaded = Loaded()
    with contextlib.closing(Company("127.0.0.1", 0, new_secret(), {}, {})) as company:
        threading.Thread(target=worker.serve, args=(loaded, company), daemon=True).start()

        def ask(prompt="fine", checkpoint=Path("vit"), invitation=company.invitation):
            return list(client.ask(invitation, checkpoint, Request(prompts=(prompt,))))

        yield SimpleNamespace(loaded=loaded, ask=ask, company=company)
        loaded.go.set()


def test_whatever_fails_is_the_answer_and_the_next_is_answered(serving, capfd):
    for prompt, message in [
        ("fail", "the workers failed: RuntimeError: a bug of two lines"),
        ("refuse", "takes pictures"),
    ]:
        with pytest.raises(AstraError) as raised:
            serving.ask(prompt)
        assert str(raised.value) == message
        assert serving.ask() == FINE
    assert "a bug" in capfd.readouterr().err, "who keeps the workers sees where it failed"


def test_who_wants_to_know_how_fast_links_are_needs_no_checkpoint(serving, monkeypatch, capsys):
    invitation = serving.company.invitation
    assert client.check(invitation) == Ways([], 3, 1e7, 0.002)
    monkeypatch.setattr(net, "reached_here", lambda work, ways: {(way.strategy, way.groups): 1e10 for way in ways})
    net.main(net.Args("check", "vit-base", join=str(invitation)))
    said = capsys.readouterr().out
    assert "slowest link: 10 Mbps; longest round trip: 2 ms" in said and "use astra with G=" in said
    assert serving.ask() == FINE


def test_another_checkpoint_and_another_secret(serving):
    with pytest.raises(AstraError, match="the workers have loaded vit, another checkpoint: ask for it"):
        serving.ask(checkpoint=Path("bert"))
    other = Invitation("127.0.0.1", serving.company.invitation.port, new_secret())
    with pytest.raises(AstraError, match="does not know the secret"):
        serving.ask(invitation=other)


@pytest.mark.parametrize("body", [b"[" * 100_000, b"{}", b""])
def test_what_is_no_request_is_answered_by_an_error(serving, body):
    heard = []
    connect(serving.company.invitation, {"role": "client", "digest": "abc"}, heard.append, body)
    deadline = time.monotonic() + 5
    while not heard and time.monotonic() < deadline:
        time.sleep(0.01)
    assert heard[0]["kind"] == "Failed" and b"is not understood" in heard[0]["body"]
    assert serving.ask() == FINE


def test_who_asks_nothing_of_use_is_let_go(serving):
    for hello in ({"role": "king"}, {}, {"role": "host"}, {"role": "host", "same": {}, "port": "x"}):
        heard = []
        connect(serving.company.invitation, hello, heard.append)
        deadline = time.monotonic() + 5
        while {} not in heard and time.monotonic() < deadline:
            time.sleep(0.01)
        assert heard[-1] == {}
    assert serving.ask() == FINE


def test_requests_wait_for_each_other_and_nobody_for_who_is_gone(serving):
    serving.loaded.go.clear()
    found = []
    threads = [threading.Thread(target=lambda: found.append(serving.ask())) for _ in range(3)]
    threads[0].start()
    time.sleep(0.2)
    hello = {"role": "client", "digest": "abc"}
    gone = connect(serving.company.invitation, hello, lambda message: None, packed(Request(prompts=("nobody's",))))
    time.sleep(0.2)
    gone.close()
    for thread in threads[1:]:
        thread.start()
    time.sleep(0.2)
    serving.loaded.go.set()
    for thread in threads:
        thread.join(10)
    assert len(found) == 3 and serving.loaded.answered == ["fine"] * 3


def test_who_is_too_many_is_told_so(serving, monkeypatch):
    serving.loaded.go.clear()
    serving.company.asked.maxsize = 2
    answers = []

    def ask():
        try:
            answers.append(serving.ask())
        except AstraError as error:
            answers.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    serving.loaded.go.set()
    for thread in threads:
        thread.join(10)
    busy = "the workers are busy, and many wait already: ask again later"
    assert answers.count(FINE) == 3 and answers.count(busy) == 3


def test_an_answer_ends_where_who_asked_is_gone(serving):
    """A long text is not written for nobody."""
    answer = client.ask(serving.company.invitation, Path("vit"), Request(prompts=("long",)))
    next(answer)
    answer.close()
    assert serving.ask() == FINE
    assert serving.loaded.said < 500


def test_many_at_once(serving):
    """All are answered."""
    found = []
    threads = [threading.Thread(target=lambda: found.append(serving.ask())) for _ in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [FINE] * 100


@pytest.mark.parametrize(
    ("listen", "found"),
    [
        (None, ("10.0.0.2", 7777)),
        ("10.0.0.1", ("10.0.0.1", 7777)),
        ("10.0.0.1:80", ("10.0.0.1", 80)),
        ("pi.local", ("pi.local", 7777)),
        ("fe80::1", ("fe80::1", 7777)),
        ("[fe80::1]:80", ("fe80::1", 80)),
    ],
)
def test_where_a_worker_listens(listen, found):
    assert worker.place(listen, "10.0.0.2", 7777) == found


@pytest.mark.parametrize("listen", ["0.0.0.0", "0.0.0.0:7777", "::", "[::]:7777", "10.0.0.1:0", "a:b:c"])
def test_where_no_worker_listens(listen):
    with pytest.raises(AstraError, match="--listen"):
        worker.place(listen, "10.0.0.2", 7777)
