"""Hosts that watch each other, as threads of one process over the loopback interface."""

import json
import queue
import socket
import threading
import time

import pytest

from astra_jax.errors import AstraError
from astra_jax.lifeline import Lifeline

FACTS = {"astra": "1", "jax": "2"}


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Fellows:
    """Lifelines of several hosts, what each was told when another failed, and what they raised."""

    def __init__(self, port, hosts, facts=None, only=None, late=0.0, **options):
        self.told, self.raised, self.lines = queue.Queue(), {}, {}

        def start(host):
            time.sleep(late * host)
            try:
                told = lambda message: self.told.put((host, message))  # noqa: E731
                mine = (facts or {}).get(host, FACTS)
                self.lines[host] = Lifeline("127.0.0.1", port, hosts, host, mine, on_failure=told, **options)
            except AstraError as error:
                self.raised[host] = str(error)

        threads = [threading.Thread(target=start, args=(host,), daemon=True) for host in only or range(hosts)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)

    def cut_off(self, host):
        """Ends a host's connections, as a killed process does."""
        self.lines[host]._over.set()
        for line in self.lines[host]._lines.values():
            line.socket.shutdown(socket.SHUT_RDWR)

    def all_told(self, n):
        return dict(self.told.get(timeout=5) for _ in range(n))


def test_hosts_that_are_done_part_in_peace(port):
    fellows, order = Fellows(port, 3), []
    assert fellows.raised == {}
    threads = [
        threading.Thread(target=line.close, args=(lambda host=host: order.append(host),))
        for host, line in fellows.lines.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert order[-1] == 0 and sorted(order) == [0, 1, 2]  # host 0 ends last
    assert fellows.told.empty()


@pytest.mark.parametrize("gone", [0, 2])
def test_a_host_that_is_gone_is_named_at_once(port, gone):
    fellows = Fellows(port, 3)
    start = time.monotonic()
    fellows.cut_off(gone)
    told = fellows.all_told(2)
    assert time.monotonic() - start < 2
    assert set(told) == {0, 1, 2} - {gone}
    assert set(told.values()) == {f"host {gone} is gone: its process ended or was killed"}


def test_a_host_that_is_silent_is_gone_after_a_while(port):
    fellows = Fellows(port, 3, patience=2.5)
    fellows.lines[1]._over.set()  # it lives, but gives no sign of it, as behind a cut link
    start = time.monotonic()
    told = fellows.all_told(2)
    assert 1 < time.monotonic() - start < 5
    assert told[0] == told[2] == "host 1 has given no sign of life for 2.5 s: is its link cut?"


def test_signs_of_life_are_given_for_longer_than_the_patience(port):
    fellows = Fellows(port, 2, patience=2.0)
    time.sleep(4)
    assert fellows.told.empty()


def test_an_error_is_passed_on(port):
    fellows = Fellows(port, 3)
    fellows.lines[2].abandon("disk full")
    assert set(fellows.all_told(2).items()) == {(host, "host 2 ended with an error: disk full") for host in (0, 1)}


def test_missing_hosts_are_named(port):
    fellows = Fellows(port, 4, only=(0, 2), start_seconds=1.0)
    message = "host 1 and 3 did not come within 1 s: start the same command there with --host 1, and look whether it"
    assert set(fellows.raised) == {0, 2}
    assert all(text.startswith(message) for text in fellows.raised.values())


def test_without_host_0_the_others_give_up(port):
    fellows = Fellows(port, 3, only=(1, 2), start_seconds=1.0)
    assert set(fellows.raised) == {1, 2}
    assert all("host 0 did not answer at 127.0.0.1" in text for text in fellows.raised.values())


def test_other_versions_are_named_on_every_host(port):
    fellows = Fellows(port, 2, facts={1: {"astra": "1", "jax": "3"}})
    message = "host 1 has jax 3 instead of 2 on host 0: use the same on all hosts"
    assert fellows.raised == {0: message, 1: message}


def test_a_port_in_use_is_said(port):
    with socket.create_server(("127.0.0.1", port)):
        fellows = Fellows(port, 2, only=(0,))
    assert f"host 0 cannot listen at 127.0.0.1:{port} (Address already in use): give --coordinator" in fellows.raised[0]


GREETINGS = [b"GET / HTTP/1.1\r\n\r\n", b"[1, 2]\n", b"\x00" * 10_000, json.dumps({"host": 9}).encode() + b"\n"]


@pytest.mark.parametrize("greeting", GREETINGS, ids=range(4))
def test_strangers_are_left_alone(port, greeting):
    def stranger():
        for _ in range(100):
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                    connection.sendall(greeting)
                    return connection.recv(100)  # until it is turned away
            except OSError:
                time.sleep(0.02)

    threading.Thread(target=stranger, daemon=True).start()
    fellows = Fellows(port, 2, start_seconds=20.0, late=0.3)
    assert fellows.raised == {} and set(fellows.lines) == {0, 1}
