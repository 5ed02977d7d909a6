"""Hosts that compute together: who takes part, passes of all of them, and what becomes of one that fails or is gone."""

import contextlib
import secrets
import threading
import time

import numpy as np
import pytest

from astra_jax.errors import AstraError
from astra_jax.hosts import ways
from astra_jax.hosts.company import Company, Seat
from astra_jax.hosts.fellow import Fellow
from astra_jax.hosts.invitation import Invitation, new_secret
from astra_jax.hosts.remote import Peer
from astra_jax.hosts.split import LOOKS, PARTS
from astra_jax.hosts.ways import Way

SAME = {"jax": "1", "astra": "2"}


class Sum:
    """Work that needs all: every host says its number in three blocks, and the sum is of what it hears.

    `fails` and `dies` say at which block.
    """

    def __init__(self, fails=None, dies=None):
        self.fails, self.dies, self.read_, self.found = fails, dies, [], []

    def read(self, body):
        if body == b"bad":
            raise AstraError("this cannot be read")
        self.read_.append(body)

    def run(self, seat):
        self.found.append(total(seat, self.link, self))

    def forget(self):
        self.forgot = True


def total(seat, link, work=None):
    me, others, found = seat.order[seat.index], [n for n in range(len(seat.order)) if n != seat.index], 0
    for block in range(3):
        if work and not link.rehearsing and block == work.fails:
            raise RuntimeError("a bug\nof two lines")
        if work and not link.rehearsing and block == work.dies:
            work.die()
        link.post(block, np.full((1, 4), me + 1, np.uint8), others, 1)
        found += sum(packets[0][0] for packets in link.wait(block, [1] * len(others), others) if packets)
    return found


def until(true):
    """Waits until it is."""
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Fellows:
    def __init__(self, company):
        self.company, self.all, self.ended = company, [], []

    def add(self, work=None, same=SAME, stays=None):
        fellow, work = Fellow(self.company.invitation, same), work or Sum()
        work.die, work.link = lambda: self.leave(fellow), fellow.link
        fellow.ready()
        self.all.append(fellow)
        threading.Thread(target=self._serve, args=(fellow, work, stays), daemon=True).start()
        until(lambda: fellow.number in self.company.order())
        return work

    def _serve(self, fellow, work, stays):
        try:
            fellow.stay(work, stays) if stays else fellow.serve(work)
        except AstraError as error:
            self.ended.append(str(error))

    def leave(self, fellow):
        fellow._connection.close()
        fellow.link.close()


@pytest.fixture
def company():
    """Host 0, with whoever is added."""
    lines = []
    with contextlib.closing(Company("127.0.0.1", 0, new_secret(), SAME, {"x": 1}, told=lines.append)) as found:
        found.lines, found.fellows = lines, Fellows(found)
        yield found
        for fellow in found.fellows.all:
            fellow.link.close()


def seat_of(company):
    order = company.order()
    return Seat(order, len(order) - 1)


def run(company, seat=None):
    seat = seat or seat_of(company)
    found, passed = company.run(seat, lambda: total(seat, company.link))
    return found, passed.all()


def test_all_take_part_again_and_again(company):
    works = [company.fellows.add() for _ in range(2)]
    seat = seat_of(company)
    assert seat.order == (1, 2, 0)
    company.ask(seat.order, b"a request")
    assert company.rehearse(seat, lambda: total(seat, company.link)) == 0
    for _ in range(3):
        found, taken = run(company)
        assert found == 3 * (2 + 3) and [one.host for one in taken] == [0, 1, 2]
        assert all(one.tally.missing == 0 and one.tally.sent > 100 for one in taken)
    assert [work.read_ for work in works] == [[b"a request"]] * 2
    assert [work.found for work in works] == [[0, *[3 * (1 + 3)] * 3], [0, *[3 * (1 + 2)] * 3]]
    assert [line for line in company.lines if "takes part" in line] and company.fellows.all[0].told == {"x": 1}


def test_a_slow_host_gets_fewer_tokens(company):
    """And is told so."""

    class Slow(Sum):
        def run(self, seat):
            self.parts = seat.parts
            time.sleep(0 if self.link.rehearsing else 0.3)
            super().run(seat)

    slow, fast = company.fellows.add(Slow()), company.fellows.add()
    assert company.seat().parts is None
    for _ in range(LOOKS):
        _, taken = run(company, company.seat())
        company.learn(company.seat(), taken)
    seat = company.seat()
    assert seat.parts[0] < min(seat.parts[1:]) and sum(seat.parts) == PARTS
    company.rehearse(seat, lambda: total(seat, company.link))
    assert slow.parts == seat.parts and fast.found[-1] == 0


def test_ways_between_hosts_are_measured(company):
    company.fellows.add(), company.fellows.add()
    found = company.measure()
    assert sorted((way.sender, way.receiver) for way in found) == [(a, b) for a in range(3) for b in range(3) if a != b]
    assert all(way.rate > 1e6 and way.lost < 0.5 for way in found)
    table = ways.rows(found)
    assert [row["hosts"] for row in table] == ["0 - 1", "0 - 2", "1 - 2"]
    assert ways.slowest(found).rate == min(way.rate for way in found)
    assert run(company)[0] == 3 * (2 + 3), "and passes go on"


def test_a_way_on_which_nothing_comes():
    none, slow = Way(0, 1, None, None, 1.0), Way(1, 0, 2e6, 0.003, 0.0)
    (row,) = ways.rows([none, slow, Way(0, 2, 1e6, 0.1, 0.0)])
    assert row == {"hosts": "0 - 1", "round trip ms": 3.0, "Mbps there": None, "Mbps back": 2.0, "lost %": 100.0}
    assert ways.slowest([none]) is None and ways.slowest([none, slow]) == slow


def test_long_requests_come_as_well(company):
    work, seat = company.fellows.add(), seat_of(company)
    bodies = [secrets.token_bytes(size) for size in (0, 1200, 300_000, 6_000_000, 5)]
    for body in bodies:
        company.ask(seat.order, body)
    assert company.rehearse(seat, lambda: total(seat, company.link)) == 0
    assert work.read_ == bodies


def test_a_host_that_differs_is_not_taken(company):
    with pytest.raises(AstraError, match="host 0 does not take this host: jax is 0 there and 1 here"):
        company.fellows.add(same={**SAME, "jax": "0"})
    until(lambda: company.lines)
    assert company.order() == (0,) and "is not taken: jax is 0 there" in company.lines[0]


def test_a_host_that_cannot_read_says_so(company):
    company.fellows.add()
    seat = seat_of(company)
    company.ask(seat.order, b"bad")
    with pytest.raises(AstraError, match="host 1: this cannot be read"):
        company.rehearse(seat, lambda: total(seat, company.link))


def test_a_host_that_fails_in_a_pass_is_done_without_in_that_pass(company):
    work = Sum(fails=1)
    company.fellows.add(work), company.fellows.add()
    found, taken = run(company)
    assert found in (3 * 3, 2 + 3 * 3) and taken[0].tally.gone == {1}, "what it said last may come late"
    assert any("host 1" in line and "RuntimeError: a bug of two lines" in line for line in company.lines)
    work.fails = None
    assert run(company)[0] == 3 * (2 + 3)


def test_a_host_that_is_gone_in_a_pass_is_done_without(company):
    company.fellows.add(), company.fellows.add(Sum(dies=1)), company.fellows.add()
    begun = time.monotonic()
    found, taken = run(company)
    assert found in (3 * (2 + 4), 3 * (2 + 4) + 3) and taken[0].tally.gone == {2}
    assert time.monotonic() - begun < 1.5, "its connection ends with it"
    assert company.order() == (1, 3, 0)
    assert run(company)[0] == 3 * (2 + 4)
    company.fellows.all.pop(1)
    company.fellows.add()
    assert seat_of(company).order == (1, 3, 4, 0) and run(company)[0] == 3 * (2 + 4 + 5)


def test_a_pass_that_fails_here_leaves_nobody_waiting(company):
    work = company.fellows.add()
    seat = seat_of(company)
    with pytest.raises(ZeroDivisionError):
        company.run(seat, lambda: 1 // 0)
    begun = time.monotonic()
    assert run(company)[0] == 3 * 2
    assert time.monotonic() - begun < 1 and work.found == [0, 3]


def test_a_host_of_which_nothing_is_heard_is_let_go(company, monkeypatch):
    """As one that is stopped: its connection stays, and it is told for when it goes on."""
    monkeypatch.setattr("astra_jax.hosts.remote.PATIENCE_SECONDS", 0.5)
    company.fellows.add(), company.fellows.add()
    company.fellows.all[0].link._socket.close()
    until(lambda: company.order() == (2, 0))
    assert run(company)[0] == 3 * 3
    until(lambda: company.fellows.ended)
    assert "heard nothing of host 1" in company.fellows.ended[0]


def test_a_host_that_was_let_go_takes_part_again(company, monkeypatch):
    """As one whose link was cut for a while, or that was stopped; what it has loaded stays."""
    monkeypatch.setattr("astra_jax.hosts.remote.PATIENCE_SECONDS", 0.5)
    said = []
    work = company.fellows.add(stays=said.append)
    (fellow,) = company.fellows.all
    assert run(company)[0] == 3 * 2
    monkeypatch.setattr(fellow.link, "_seal", lambda *packet: None)
    until(lambda: company.order() == (0,) and said)
    monkeypatch.undo()
    until(lambda: company.order() == (2, 0))
    assert "heard nothing of host 1" in said[0] and "take part again" in said[0] and said[1] == "host 2: ready again"
    assert run(company)[0] == 3 * 3 and work.found == [3, 3]
    company._welcome = {"x": 2}
    company._let_go(company.members[0])
    until(lambda: company.fellows.ended)
    assert company.fellows.ended == ["host 0 has loaded something else now: start this host again"]


def test_hosts_that_do_not_hear_each_other(company, monkeypatch):
    """Though host 0 hears both."""
    monkeypatch.setattr("astra_jax.hosts.fellow.UDP_SECONDS", 1.0)
    company.fellows.add(), company.fellows.add()
    nowhere = Peer("127.0.0.1", 9)
    for member in company.members:
        member.where = nowhere
    seat = seat_of(company)
    company.ask(seat.order, b"")
    with pytest.raises(AstraError, match=r"UDP packets of host 2 do not come to host 1: let in the ports"):
        company.rehearse(seat, lambda: total(seat, company.link))


def test_packets_that_do_not_go_to_host_0_and_back(company, monkeypatch):
    monkeypatch.setattr("astra_jax.hosts.fellow.UDP_SECONDS", 0.5)
    fellow = Fellow(company.invitation, SAME)
    company.link._socket.close()
    with pytest.raises(AstraError, match=rf"no UDP packet goes to host 0, port {company.link.port}, and back to port"):
        fellow.ready()
    assert company.order() == (0,)


def test_all_forget_their_programs(company):
    works = [company.fellows.add() for _ in range(2)]
    company.forget()
    until(lambda: all(hasattr(work, "forgot") for work in works))


def test_host_0_is_gone(company):
    company.fellows.add()
    company.close()
    deadline = time.monotonic() + 5
    while not company.fellows.ended and time.monotonic() < deadline:
        time.sleep(0.05)
    where = f"127.0.0.1:{company.invitation.port}"
    assert company.fellows.ended == [f"host 0 at {where} is gone"]


def test_host_0_is_silent(company, monkeypatch):
    monkeypatch.setattr("astra_jax.hosts.fellow.SILENCE_SECONDS", 0.5)
    monkeypatch.setattr("astra_jax.hosts.remote.PATIENCE_SECONDS", 0.5)
    company.fellows.add()
    company.link.close()
    deadline = time.monotonic() + 10
    while not company.fellows.ended and time.monotonic() < deadline:
        time.sleep(0.05)
    assert company.fellows.ended == [
        f"host 0 at 127.0.0.1:{company.invitation.port} gives no sign of life: is its link cut?"
    ]


def test_nobody_is_there():
    with pytest.raises(AstraError, match="nobody listens at 127.0.0.1:9:"):
        Fellow(Invitation("127.0.0.1", 9, new_secret()), SAME)
