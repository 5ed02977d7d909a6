"""Hosts of different speeds end together: what passes took becomes a split of the tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from astra_jax.hosts.split import LOOKS, MOST_CHANGES, PARTS, Split, parts_of


def seconds_of(speeds, parts, fixed=0.1):
    """What hosts compute for: remote tokens, which all of them handle, and their own."""
    mine = np.asarray(parts or [PARTS / len(speeds)] * len(speeds)) / PARTS
    return 5 * (fixed + mine) / np.asarray(speeds)


def splits(speeds, passes, order=None, split=None, **options):
    """The split of every pass, from the first on."""
    order, split, found = order or tuple(range(len(speeds))), split or Split(), []
    for _ in range(passes):
        found.append(split.of(order))
        split.learn(order, found[-1], seconds_of(speeds, found[-1], **options).tolist())
    return found


@pytest.mark.parametrize("speeds", [(0.1, 0.4, 0.4, 0.4), (1.0, 3.0), (1.0, 1.0, 2.0, 4.0, 4.0)])
def test_all_are_done_at_about_the_same_time(speeds):
    found = splits(speeds, LOOKS * (MOST_CHANGES + 2))
    assert found[0] is None
    least = 5 * (len(speeds) * 0.1 + 1) / sum(speeds)  # of what is done, over all speeds
    assert seconds_of(speeds, found[-1]).max() < 1.15 * least


def test_hosts_that_are_alike_share_evenly_and_noise_changes_nothing():
    draws, split = np.random.default_rng(0), Split()
    for _ in range(50):
        assert split.of((1, 2, 0)) is None
        split.learn((1, 2, 0), None, (0.3 * (1 + 0.1 * draws.random(3))).tolist())


def test_the_split_changes_seldom_and_then_no_more():
    found = splits((1.0, 8.0, 8.0), 60)
    assert len(set(found)) <= MOST_CHANGES + 1 and len(set(found[LOOKS * (MOST_CHANGES + 1) :])) == 1


def test_what_is_of_no_use_is_taken_back():
    """A host that takes as long whatever it gets, as one whose core is busy otherwise."""
    split, order, found = Split(), (1, 0), []
    for _ in range(5 * LOOKS):
        found.append(split.of(order))
        split.learn(order, found[-1], (2.0, 1.0))
    assert found[LOOKS] is not None and found[-1] is None


def test_short_passes_and_those_of_another_split_say_nothing():
    split = Split()
    for _ in range(9):
        assert split.of((1, 0)) is None
        split.learn((1, 0), None, (0.19, 0.01))
        split.learn((1, 0), (48, 16), (9.0, 1.0))
        split.learn((2, 0), None, (9.0, 1.0))


def test_a_fast_model_is_not_judged_by_passes_that_something_held_up():
    split = Split()
    for n in range(30):
        assert split.of((1, 0)) is None
        split.learn((1, 0), None, (0.5, 0.1) if n % 3 else (0.02, 0.02))


def test_who_is_left_or_comes_has_what_is_known_of_him():
    split = Split()
    splits((1.0, 4.0, 4.0), 5 * LOOKS, (1, 2, 0), split)
    slow, fast = split.of((1, 0))
    assert slow < fast / 2
    assert split.of((1, 2, 3, 0)) is None, "of one nothing is known"


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=PARTS))
def test_parts_are_all_of_it_and_nobody_gets_none(speeds):
    found = parts_of(speeds)
    assert found is None or (sum(found) == PARTS and min(found) >= 1 and len(found) == len(speeds))
