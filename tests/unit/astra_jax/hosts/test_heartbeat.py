"""Hosts that watch each other, as threads of one process over connections within it."""

import threading
import time

import pytest

from tests.helpers.hosts import Fellows, each


def test_hosts_that_are_done_part_in_peace():
    fellows, order = Fellows(3), []
    assert fellows.told.empty()
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


def test_a_host_that_said_it_is_done_may_be_gone_before_host_0_has_ended_its_watch():
    fellows, left = Fellows(3), threading.Event()
    leaver = threading.Thread(target=fellows.lines[2].close, args=(lambda: None,), daemon=True)
    leaver.start()
    assert fellows.lines[0]._done[2].wait(10)
    fellows.cut_off(2)
    closing = [
        threading.Thread(target=fellows.lines[1].close, args=(lambda: None,)),
        threading.Thread(target=fellows.lines[0].close, args=(left.set,)),
    ]
    for thread in closing:
        thread.start()
    for thread in closing:
        thread.join(10)
    assert left.is_set() and fellows.told.empty()


@pytest.mark.parametrize("gone", [0, 2])
def test_a_host_that_is_gone_is_named_at_once(gone):
    fellows = Fellows(3)
    start = time.monotonic()
    fellows.cut_off(gone)
    told = fellows.all_told(2)
    assert time.monotonic() - start < 2
    assert set(told) == {0, 1, 2} - {gone}
    assert set(told.values()) == {f"host {gone} is gone: its process ended or was killed"}


def test_a_host_that_is_silent_is_gone_after_a_while():
    fellows = Fellows(3, patience=2.5, deaf=1)
    start = time.monotonic()
    told = fellows.all_told(2)
    assert 1 < time.monotonic() - start < 5
    assert told[0] == told[2] == "host 1 has given no sign of life for 2.5 s: is its link cut?"


def test_signs_of_life_are_given_for_longer_than_the_patience():
    fellows = Fellows(2, patience=2.0)
    time.sleep(4)
    assert fellows.told.empty()


GONE = "host 2 is gone: its process ended or was killed"


@pytest.mark.parametrize("policy", ["fail", "shrink"])
def test_an_error_that_is_no_fault_of_a_host_ends_all(policy):
    """What it was told to do cannot be done: without it the others would not fare better."""
    fellows = Fellows(3, policy=policy)
    fellows.lines[2].abandon("no such file", a_fault=False)
    message = "host 2 ended with an error: no such file"
    assert fellows.all_told(2) == {0: message, 1: message}


def test_host_0_goes_on_alone():
    fellows = Fellows(3, policy="single")
    fellows.cut_off(2)
    assert fellows.all_told(2) == {0: (GONE, 1, 0), 1: f"{GONE}; host 0 goes on alone"}


def test_those_that_are_left_go_on():
    """With new numbers, in their order; two that go at about the same time are known together."""
    fellows = Fellows(5, policy="shrink")
    fellows.cut_off(2)
    time.sleep(0.1)
    fellows.lines[3].abandon("no memory", a_fault=True)
    assert fellows.all_told(3) == {0: (GONE, 3, 0), 1: (GONE, 3, 1), 4: (GONE, 3, 2)}


def test_without_host_0_nobody_goes_on():
    fellows = Fellows(3, policy="shrink")
    fellows.lines[1].need(False)  # a host that has nothing more to do
    fellows.cut_off(0)
    message = "host 0 is gone: its process ended or was killed"
    assert fellows.all_told(2) == {1: message, 2: message}


def test_a_host_that_is_not_needed_may_go():
    """Until it is needed again; and to part in peace, it is not waited for."""
    fellows = Fellows(3, policy="shrink")
    for line in fellows.lines.values():
        line.need(False)
    fellows.cut_off(2)
    time.sleep(1.0)
    assert fellows.told.empty()
    fellows.lines[0].need(True)
    assert fellows.all_told(2) == {0: (GONE, 2, 0), 1: (GONE, 2, 1)}
    other = Fellows(3)
    other.lines[0].need(False)
    other.cut_off(2)
    other.lines[1]._tell(done=True)
    threading.Thread(target=other.lines[0].close, args=(lambda: other.told.put((0, "closed")),)).start()
    assert other.told.get(timeout=5) == (0, "closed")


def test_bytes_to_a_host_that_takes_none_are_no_end():
    """As behind a cut link: the host is silent, and gone after a while, whoever waits to send to it."""
    fellows = Fellows(3, patience=2.0, deaf=1)
    start = time.monotonic()
    fellows.lines[0]._send(bytes(1 << 24), told=True)
    assert "host 1 has given no sign of life for 2 s" in fellows.all_told(2)[0]
    assert time.monotonic() - start < 6


def test_hosts_that_read_the_same_go_on():
    """Whoever is first."""
    fellows = Fellows(3)
    for host, what in [(1, "batch 1"), (0, "batch 1"), (2, "batch 1"), (1, "batch 2"), (0, "batch 2")]:
        fellows.lines[host].say_read(what)
    time.sleep(0.2)
    assert fellows.told.empty()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)], ids=str)
def test_hosts_that_read_something_else_end_all(order):
    """Also host 1, which would wait for the others without end."""
    fellows = Fellows(3)
    for host in order:
        fellows.lines[host].say_read("batch 1")
    for host in order:
        fellows.lines[host].say_read("the end" if host == 2 else "batch 2")
    told = fellows.all_told(3)
    assert set(told.values()) == {"host 0 has read batch 2, and host 2 the end: give the same on every host"}


def test_hosts_tell_each_other_beside_the_collectives():
    """Of any size, in order, whoever comes first."""
    fellows = Fellows(3)

    def tell(host, line):
        time.sleep(0.05 * host)
        found = [line.gather([host] * size) for size in (0, 1, 10_000)]
        return found, line.spread({"from": host})

    found = each(fellows, tell)
    assert found[0] == ([[[host] * size for host in range(3)] for size in (0, 1, 10_000)], {"from": 0})
    assert found[1] == found[2] == ([None] * 3, {"from": 0})
    assert fellows.told.empty()


def test_who_waits_for_what_a_host_tells_may_give_up():
    fellows = Fellows(2)
    with pytest.raises(TimeoutError, match="host 1 said nothing for 0.1 s"):
        fellows.lines[0].gather(1, 0.1)
    with pytest.raises(TimeoutError):
        fellows.lines[1].spread(None, 0.1)


def test_nonsense_that_a_host_tells_is_nothing():
    fellows = Fellows(2)
    for body in (b"", b"\xff", b"[" * 100_000):
        fellows.lines[1]._lines[0].send(1.0, body, told=True)
        assert fellows.lines[0].gather(1) == [1, None]
