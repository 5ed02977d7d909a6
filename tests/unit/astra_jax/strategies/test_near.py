"""Who is near whom, as a table, as steps of an exchange, and as a command line says it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from astra_jax.codecs.config import AstraConfig
from astra_jax.codecs.quantizer import make_codec
from astra_jax.errors import AstraError
from astra_jax.strategies.near import Near, near_of, near_on

NESTED = AstraConfig(groups=4, codewords=16, codec="nested-pq", widths=(6, 6, 3, 3), levels=(1, 1, 2))


@st.composite
def neighbourhoods(draw):
    """Neighbourhoods of some of 9 devices, in any order."""
    devices = draw(st.permutations(range(9)))
    ends = sorted(draw(st.sets(st.integers(1, 9), min_size=1, max_size=4)))
    parts = [tuple(devices[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)]
    return tuple(part for part in parts if part) if any(len(part) > 1 for part in parts) else ((0, 1),)


@given(neighbourhoods())
def test_in_all_steps_together_all_that_are_near_have_told_each_other_once(devices):
    near = Near(devices, 1)
    told = [pair for step in near.steps() for pair in step]
    assert len(told) == len(set(told))
    assert set(told) == set(zip(*np.nonzero(near.table(9) & ~np.eye(9, dtype=bool)), strict=True))
    for step in near.steps():
        senders, receivers = zip(*step, strict=True)
        assert len(set(senders)) == len(senders) and len(set(receivers)) == len(receivers)


def test_who_is_near():
    expected = [[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
    np.testing.assert_array_equal(near_of("2,0", 2).table(4), np.asarray(expected, bool))


def test_hosts_are_numbered_otherwise_than_shards():
    """Those of host 0 are the last, and hosts may have several."""
    assert near_on(near_of("0,2", 1), np.array([[1, 1, 2, 2, 0, 0]])).neighbourhoods == ((2, 3, 4, 5),)
    assert near_on(near_of("0,2/1,3", 1), np.array([[1, 2, 3, 0]])).neighbourhoods == ((1, 3), (0, 2))


def test_on_one_machine_devices_are_shards():
    near = near_of("0,2", 1)
    assert near_on(near, np.zeros((2, 3), int)) == near
    assert near_on(near, np.zeros((1, 1), int)) is None


def test_a_command_line():
    assert near_of(None, None) is None
    assert near_of("0,1/2,3", 4) == Near(((0, 1), (2, 3)), 4)


@pytest.mark.parametrize(
    ("near", "far_groups", "message"),
    [
        ("0,1", None, "^--near needs to know more: give something like --far-groups 4"),
        (None, 4, "^--far-groups needs to know more: give something like --near 0,1/2,3"),
        ("0,x", 4, "^near is '0,x': write numbers of devices"),
        ("0,1/", 4, "^near is '0,1/': write numbers of devices"),
        ("0,1/1,2", 4, "^near names 1 twice"),
        ("0/1", 4, "^near names no two that are near each other"),
    ],
)
def test_what_is_odd(near, far_groups, message):
    with pytest.raises(AstraError, match=message):
        near_of(near, far_groups)


@pytest.mark.parametrize(
    ("near", "far_groups", "astra", "message"),
    [
        ("0,1", 1, AstraConfig(groups=4, codewords=16), "^fewer groups for far devices need nested codes: run"),
        ("0,1", 0, NESTED, "^far groups are 0; these codes have 4, of which"),
        ("0,1", 4, NESTED, "^far groups are 4; these codes have 4, of which"),
        ("0,4", 1, NESTED, "^near names 4; the 4 devices are numbered from 0 to 3"),
        ("0,-1", 1, NESTED, "^near names -1; the 4 devices"),
    ],
)
def test_what_does_not_fit(near, far_groups, astra, message):
    with pytest.raises(AstraError, match=message):
        near_of(near, far_groups).check(make_codec(astra, 8), 4)


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        ([[1, 2, 0]], "^near names 3; the hosts are numbered from 0 to 2$"),
        ([[1, 2, 0], [3, 2, 0]], "^near names hosts, but shards have batches on several of them"),
    ],
)
def test_hosts_that_do_not_fit(hosts, message):
    with pytest.raises(AstraError, match=message):
        near_on(near_of("0,3", 1), np.array(hosts))
