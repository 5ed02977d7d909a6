"""Packets by UDP: all of them come, whatever is lost, and nobody else's do."""

import contextlib
import secrets
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from astra_jax.errors import AstraError
from astra_jax.hosts.datagrams import BEAT_SECONDS, Datagrams
from astra_jax.hosts.remote import Peer

KEY = secrets.token_bytes(32)


class Wire(threading.Thread):
    """Between two sockets: what goes to it goes on to the other one, but for what is lost, late or changed."""

    def __init__(self, change):
        super().__init__(daemon=True)
        self.change, self.seen = change, []
        self.ends = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2)]
        for end in self.ends:
            end.bind(("127.0.0.1", 0))
        self.to = [None, None]

    def run(self):
        for n in range(2):
            threading.Thread(target=self._carry, args=(n,), daemon=True).start()

    def _carry(self, n):
        while True:
            packet, _ = self.ends[n].recvfrom(1 << 16)
            self.seen.append(packet)
            for one in self.change(packet):
                self.ends[1 - n].sendto(one, self.to[n])


@pytest.fixture
def two():
    """Two hosts, 0 and 1, and a wire between them."""
    opened = []

    def make(change=lambda packet: [packet], late="wait"):
        links = [Datagrams("127.0.0.1", late=late) for _ in range(2)]
        wire = Wire(change)
        wire.to = [("127.0.0.1", links[1].port), ("127.0.0.1", links[0].port)]
        for n, link in enumerate(links):
            link.enter(n, KEY)
            link.meet({1 - n: Peer("127.0.0.1", wire.ends[n].getsockname()[1])})
            link.begin(1, [0, 1])
        wire.start()
        opened.extend(links)
        return *links, wire

    yield make
    for link in opened:
        link.close()


def rows(n, size=100, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (n, size), np.uint8)


def exchange(a, b, blocks=5, count=7):
    """Both send and wait in every block; what each got."""

    def run(link, me):
        found = []
        for block in range(blocks):
            link.post(block, rows(count, seed=10 * block + me), [1 - me], count)
            found += link.wait(block, [count], [1 - me])
        return found

    with ThreadPoolExecutor(2) as pool:
        each = [pool.submit(run, link, me) for me, link in enumerate((a, b))]
        return [one.result(60) for one in each]


def expected(me, blocks=5, count=7):
    return [{n: bytes(row) for n, row in enumerate(rows(count, seed=10 * block + 1 - me))} for block in range(blocks)]


def test_all_packets_come(two):
    a, b, wire = two()
    assert exchange(a, b) == [expected(0), expected(1)]
    assert a.tally.missing == b.tally.missing == a.tally.again == 0
    everything = b"".join(wire.seen)
    assert all(bytes(row)[:16] not in everything for block in range(5) for row in rows(7, seed=10 * block))


@pytest.mark.parametrize("rate", [0.05, 0.3])
def test_what_is_lost_is_sent_again(two, rate):
    draws = np.random.default_rng(1)
    a, b, _ = two(lambda packet: [] if draws.random() < rate else [packet])
    assert exchange(a, b) == [expected(0), expected(1)]
    assert a.tally.again + b.tally.again > 0 and a.dropped == b.dropped == 0


def test_packets_that_come_twice_overtake_each_other_or_are_changed(two):
    draws, held = np.random.default_rng(2), []

    def change(packet):
        held.append(packet)
        if draws.random() < 0.3:
            return []  # it comes later
        found = [*reversed(held)]
        held.clear()
        flipped = bytearray(packet)
        flipped[draws.integers(len(packet))] ^= 1 << draws.integers(8)
        return [*found, bytes(flipped), packet[: draws.integers(len(packet))], packet]

    a, b, _ = two(change)
    assert exchange(a, b) == [expected(0), expected(1)]
    assert a.dropped > 0 and b.dropped > 0


def test_a_stranger_is_dropped(two):
    a, b, _ = two()
    draws = np.random.default_rng(3)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        for size in draws.integers(0, 2000, 3000):
            stranger.sendto(draws.bytes(int(size)), ("127.0.0.1", a.port))
    assert exchange(a, b) == [expected(0), expected(1)]
    assert a.dropped >= 100, "but for those that the system drops"


def test_nothing_is_taken_twice(two):
    a, b, wire = two()
    exchange(a, b)
    before, heard = a.dropped, a.tally.received
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        for packet in list(wire.seen):
            stranger.sendto(packet, ("127.0.0.1", a.port))
    time.sleep(0.2)
    assert a.dropped - before >= len(wire.seen) // 2
    assert a._peers[1].where.port == wire.ends[0].getsockname()[1], "and nobody is sent elsewhere"
    assert heard <= a.tally.received < heard + 2000, "but for signs of life"


def test_a_host_that_is_gone_is_not_waited_for(two):
    a, b, _ = two()
    a.post(0, rows(2), [1], 2)
    b.close()
    begun = time.monotonic()
    assert a.wait(0, [3], [1]) == [{}]
    assert 1 < time.monotonic() - begun < 2.2
    assert a.tally.gone == {1} and a.tally.missing == 3


def test_a_host_that_is_said_to_be_gone(two):
    a, _, _ = two()
    threading.Timer(0.2, a.gone, [1]).start()
    begun = time.monotonic()
    assert a.wait(0, [3], [1]) == [{}] and time.monotonic() - begun < 1


def test_codes_that_are_late_are_done_without(two):
    a, b, _ = two(late="predict")
    exchange(a, b, blocks=20)
    begun = time.monotonic()
    assert a.wait(30, [3], [1]) == [{}]
    assert time.monotonic() - begun < 1 and a.tally.missing == 3
    threading.Timer(1.2, b.post, [-2, rows(3), [0], 3]).start()
    assert len(a.wait(-2, [3], [1])[0]) == 3, "but what is no code is waited for"


def test_fewer_packets_go_where_more_would_be_late_and_more_again_later(two):
    """Blocks of 12 packets, over a link that takes 10 ms for each, while 40 ms of work are done. Two have to go."""
    slow, count = [True], 12

    def change(packet):
        if slow[0] and len(packet) > 500:
            time.sleep(0.01)
        return [packet]

    a, b, _ = two(change)
    a.adapts = b.adapts = True

    def blocks(begin, end):
        found = []
        for block in range(begin, end):
            a.post(block, rows(count, 1000, seed=block), [1], 2)
            time.sleep(0.04)
            found += b.wait(block, [count], [0])
        return found

    found = blocks(0, 12)
    assert len(found[0]) == count and all(2 <= len(packets) <= 8 for packets in found[3:])
    assert all(sorted(packets) == list(range(len(packets))) for packets in found), "the first ones"
    assert b.tally.left_out == sum(count - len(packets) for packets in found) and b.tally.missing == 0
    slow[0] = False
    assert len(blocks(12, 80)[-1]) == count


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_what_a_host_is_told_comes_in_order(two, rate):
    draws, heard = np.random.default_rng(4), []
    a, b, _ = two(lambda packet: [] if draws.random() < rate else [packet])
    b.told = lambda number, message: heard.append((number, message))
    messages = [draws.bytes(size) for size in (1, 1200, 1201, 50_000, 3)]
    for message in messages:
        a.tell(1, message)
    deadline = time.monotonic() + 10
    while len(heard) < len(messages) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert heard == [(0, message) for message in messages]
    a.tell(7, b"nobody")


def test_early_packets_wait_for_their_pass(two):
    a, b, _ = two()
    b.begin(2, [0, 1])
    b.post(0, rows(2), [0], 2)
    time.sleep(0.1)
    a.begin(2, [0, 1])
    assert len(a.wait(0, [2], [1])[0]) == 2


def test_hosts_hear_each_other_before_anything_is_sent(two):
    a, b, _ = two()
    assert a.silent([0, 1], 4 * BEAT_SECONDS) == []
    assert 0 < a.round_trip(1, 2.0) < 0.1
    b.close()
    time.sleep(0.3)  # what it sent last has come
    assert a.silent([0, 1], 2 * BEAT_SECONDS) == [1]


@pytest.mark.parametrize(
    ("address", "says"), [("203.0.113.7", "no address of this host"), ("no.such.host.invalid", "not known here")]
)
def test_an_address_that_is_not_here(address, says):
    with pytest.raises(AstraError, match=says):
        Datagrams(address)


def test_a_port_in_use():
    with contextlib.closing(Datagrams("127.0.0.1")) as one, pytest.raises(AstraError, match="in use"):
        Datagrams("127.0.0.1", one.port)
