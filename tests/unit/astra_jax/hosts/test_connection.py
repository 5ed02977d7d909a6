"""Messages between processes: whole, within limits, and with the bytes that belong to them."""

import contextlib
import json
import socket
import threading
import time

import pytest

from astra_jax.hosts.connection import CUT, GONE, Line


@pytest.fixture
def line():
    """A line, and the other end of its connection."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Line(ours), theirs


def test_messages_arrive_whole(line):
    here, there = line
    there.sendall(b'{"a": 1}\n{"b"')
    assert here.receive(1.0) == {"a": 1}
    there.sendall(b": [2]}\n")
    assert here.receive(1.0) == {"b": [2]}
    here.send(c="ä")
    assert json.loads(there.recv(100)) == {"c": "ä"}


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "no message"),
        (b"[1]\n", "no message"),
        (b"\xff\xfe\n", "no message"),
        (b"[" * 5000 + b"\n", "no message"),
        (b"x" * 20_000, "too long"),
        (b'{"half": ', "timed out"),
        (b"", "timed out"),
    ],
    ids=["http", "no object", "no text", "nested", "endless", "half", "nothing"],
)
def test_what_is_no_message(line, sent, why):
    """After that, nothing more is read."""
    here, there = line
    there.sendall(sent)
    with pytest.raises(OSError, match=why):
        here.receive(0.05)
    with pytest.raises(OSError, match="it is lost"):
        here.receive(0.05)


def test_bytes_come_with_their_message(line):
    here, there = line
    sent, body = Line(there), bytes(range(256)) * 1000
    sender = threading.Thread(target=lambda: sent.send(5.0, body, a=1))
    sender.start()
    assert here.receive(5.0, 1 << 20) == {"a": 1, "body": body}
    sender.join(5)  # while something is being sent there is no beat
    sent.beat()
    sent.send(b=2)
    assert here.receive(5.0) == {"alive": True} and here.receive(5.0) == {"b": 2}


def test_the_fate_of_the_other_side(line):
    """Known also where there is more to read; and afterwards nothing more is read."""
    here, there = line
    assert here.fate() == ""
    there.sendall(b'{"a": 1}\n')
    assert here.fate() == ""
    there.close()
    assert here.fate() == here.fate() == GONE
    with pytest.raises(ConnectionError, match="it is lost"):
        here.receive(1.0)


def test_the_fate_of_who_says_nothing(line):
    here, _ = line
    with pytest.raises(TimeoutError):
        here.receive(0.01)
    assert here.fate() == CUT


@pytest.mark.parametrize("size", [101, -1, 0, True, "7", 1e1], ids=str)
def test_no_more_bytes_than_are_taken(line, size):
    here, there = line
    there.sendall(json.dumps({"bytes": size}).encode() + b"\n" + bytes(200))
    with pytest.raises(ConnectionError, match="more than is taken"):
        here.receive(1.0, 100)


def test_bytes_may_take_long_as_long_as_some_come(line):
    here, there = line

    def slowly():
        there.sendall(b'{"bytes": 8}\n')
        for _ in range(8):
            time.sleep(0.1)
            there.sendall(b"x")

    threading.Thread(target=slowly).start()
    assert here.receive(0.3, 8) == {"body": b"x" * 8}
    there.sendall(b'{"bytes": 8}\nhalf')
    with pytest.raises(TimeoutError):
        here.receive(0.2, 8)


def test_all_of_a_message_has_its_time_where_it_comes_bit_by_bit(line):
    here, there = line

    def slowly():
        with contextlib.suppress(OSError):
            there.sendall(b'{"bytes": 100}\n')
            for _ in range(100):
                time.sleep(0.05)
                there.sendall(b"x")

    threading.Thread(target=slowly).start()
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        here.receive(1.0, 100, total=0.5)
    assert 0.4 < time.monotonic() - start < 2


def test_all_of_a_message_has_its_time_where_it_is_taken_bit_by_bit(line):
    here, there = line

    def slowly():
        with contextlib.suppress(OSError):
            while there.recv(1 << 12):
                time.sleep(0.05)

    threading.Thread(target=slowly, daemon=True).start()
    with pytest.raises(TimeoutError):
        here.send(1.0, bytes(1 << 24), total=0.5, a=1)
    here.close()


def test_a_sign_of_life_waits_for_nobody(line):
    """While bytes are sent that the other end does not take."""
    here, _ = line

    def send():
        with contextlib.suppress(TimeoutError):
            here.send(1.0, bytes(1 << 24), a=1)

    sending = threading.Thread(target=send)
    sending.start()
    time.sleep(0.2)
    start = time.monotonic()
    here.beat()
    assert time.monotonic() - start < 0.2
    sending.join()


def test_who_waits_is_told_of_the_end(line):
    here, _ = line
    threading.Timer(0.2, here.close).start()
    with pytest.raises(ConnectionError):
        here.receive(5.0)
