"""Where a text ends, and what of it is shown."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astra_jax.errors import AstraError
from astra_jax.serving.continuation import Continuation


def continuation(*stop, eos=(9,)):
    """Of tokens that are the letters of a text."""
    return Continuation(lambda token: "abcdefgh_."[token], eos, stop)


def test_a_text_goes_on_until_it_ends():
    text = continuation()
    assert [text.add(token) for token in (0, 1, 9, 2)] == ["a", "b", "", ""]
    assert (text.text, text.count, text.end) == ("ab", 3, "eos")


def test_a_stop_string_ends_a_text_and_is_never_shown():
    text = continuation("bcd", "g")
    assert [text.add(token) for token in (0, 1, 2, 1, 2, 3, 4)] == ["a", "", "", "bc", "", "", ""]
    assert (text.text, text.end) == ("abc", "stop")
    assert [text.rest(), text.rest()] == ["", ""]


def test_what_was_held_back_is_shown_at_the_end():
    text = continuation("bcd")
    assert [text.add(token) for token in (0, 1, 2)] == ["a", "", ""]
    assert (text.cut(), text.end) == ("bc", "length")
    ended = continuation("bcd")
    assert [ended.add(token) for token in (0, 1, 9)] == ["a", "", "b"]


@given(
    st.lists(st.integers(0, 3), max_size=12),
    st.lists(st.text(alphabet="abcd", min_size=1, max_size=3), max_size=2),
)
def test_what_is_shown_is_the_text_up_to_the_first_stop_string(ids, stop):
    text = continuation(*stop)
    shown = "".join(map(text.add, ids)) + text.rest()
    whole = "".join("abcd"[token] for token in ids)
    # A text ends with the token that completes a stop string; of several that this token completes, at the first.
    ends = [whole[:n] for n in range(len(whole) + 1) if any(s in whole[:n] for s in stop)]
    expected = ends[0][: min(ends[0].find(s) for s in stop if s in ends[0])] if ends else whole
    assert shown == text.text == expected
    assert (text.end == "stop") == bool(ends)


def test_an_endless_stop_string_takes_no_time():
    text = continuation("a" * 10_000_000, "ab")
    start = time.perf_counter()
    for _ in range(1000):
        text.add(0)
    assert time.perf_counter() - start < 2 and text.text == "a" * 1000 and not text.end


def test_a_stop_string_that_is_no_text(unchecked):
    with pytest.raises(AstraError, match="--stop is 7; it must be a text"):
        continuation(7)


def test_an_empty_stop_string():
    with pytest.raises(AstraError, match="--stop is an empty string: give at least one character"):
        continuation("")
