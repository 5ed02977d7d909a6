"""As many packets of a block as a link has room for: no fewer than needed, and more again when there is room."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astra_jax.hosts.room import GOOD, GRACE_SECONDS, MOST_GOOD, Room, in_time

COUNT = 20


def test_what_came_before_it_was_waited_for_is_in_time():
    assert in_time(10, 1.0, 1.2, waited_from=1.5, worked=0.0) is None
    assert in_time(10, 1.0, 1.2, waited_from=1.2 - GRACE_SECONDS / 2, worked=0.0) is None
    assert in_time(10, 1.0, 1.2, waited_from=1.1, worked=0.0) == 5


def test_what_is_little_beside_the_work_is_in_time():
    assert in_time(10, 1.0, 1.2, waited_from=1.15, worked=1.1) is None
    assert in_time(10, 1.0, 1.2, waited_from=1.15, worked=0.4) == 8


def test_a_sender_that_is_slow_itself_has_room_all_the_same():
    """What it is waited for before its first packet is not the link's."""
    assert in_time(10, 1.0, 1.001, waited_from=0.1, worked=0.0) is None
    assert in_time(10, 1.0, 1.02, waited_from=0.1, worked=0.5) is None
    assert in_time(10, 1.0, 2.0, waited_from=0.1, worked=2.0) == 1, "but here the link is slow, too"
    assert in_time(1, 1.0, 1.0, waited_from=0.1, worked=0.0) is None
    assert in_time(0, 0.0, 0.0, waited_from=9.0, worked=0.0) is None


def blocks(room, fits, count=COUNT, least=1):
    """How many packets were sent in each of the blocks, where a link has room for so many."""
    found = []
    for fit in fits:
        found.append(room.packets(least, count))
        if found[-1] > fit:
            room.late(fit, found[-1], count)
    return found


def test_what_has_no_room_is_not_sent_in_the_next_block():
    assert blocks(Room(), [20, 20, 7, 7, 7]) == [20, 20, 20, 7, 7]
    assert blocks(Room(), [0, 0], least=4) == [20, 4]


def test_more_is_sent_when_there_is_room_again():
    found = blocks(Room(), [3] * 2 + [20] * 80)
    assert found[-1] == COUNT and sorted(found[1:]) == found[1:]


def test_a_link_that_has_no_more_room_is_tried_ever_less():
    found = blocks(Room(), [5] * 500)
    late = [n for n, sent in enumerate(found) if sent > 5]
    assert late[1] > GOOD and len(late) < 20 and late[-1] - late[-2] >= MOST_GOOD


def test_a_complaint_about_what_left_before_the_last_one_changes_nothing():
    room = Room()
    assert [room.packets(1, COUNT) for _ in range(2)] == [COUNT, COUNT]
    room.late(10, COUNT, COUNT)
    room.late(3, COUNT, COUNT)
    assert room.packets(1, COUNT) == 10


@given(st.lists(st.tuples(*[st.integers(0, 65535)] * 3), max_size=20), st.integers(1, 50), st.integers(1, 50))
def test_whatever_is_complained_of_as_many_are_sent_as_have_to_be(complaints, least, more):
    room, count = Room(), least + more
    for complaint in complaints:
        room.late(*complaint)
        assert least <= room.packets(least, count) <= count and 0 <= room.share <= 1


@pytest.mark.parametrize("fit", [1, 2, 5, 13, 19])
def test_most_of_the_room_is_used(fit):
    found = blocks(Room(), [fit] * 200)[5:]
    assert sum(min(sent, fit) for sent in found) >= 0.9 * fit * len(found)
    assert math.isclose(sum(sent > fit for sent in found) / len(found), 0, abs_tol=0.1)
