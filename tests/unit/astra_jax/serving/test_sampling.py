"""How tokens are drawn, row by row, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from astra_jax.errors import AstraError
from astra_jax.serving.sampling import Draws, Sampling, draw, restrict, seeded

V = 12
DRAW, RESTRICT = jax.jit(draw), jax.jit(restrict)  # as the engine has it; step by step takes ten times as long
LOGITS = np.random.default_rng(0).normal(size=(3, V)).astype(np.float32)


def drawn(logits, sampling, seeds):
    """The first token of every row, drawn with these seeds (a number is of all)."""
    rows = Draws.of([sampling] * len(logits))
    rows = rows._replace(seed=np.broadcast_to(np.asarray(seeds, np.uint32), len(logits)))
    return np.asarray(DRAW(logits, rows, sampling.work))


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(seed=5, top_k=3), Sampling(1.0, top_k=1), Sampling(9.0, 0, 1e-6)]
)
def test_greedy(sampling):
    for seed in range(5):
        np.testing.assert_array_equal(drawn(LOGITS, sampling, seed), LOGITS.argmax(-1))


@given(seed=st.integers(0, 999), top_k=st.integers(0, V + 2), top_p=st.floats(0.01, 1))
def test_what_may_be_drawn(seed, top_k, top_p):
    """The likeliest k tokens, and of these the fewest that together have probability p among them."""
    logits = np.random.default_rng(seed).normal(scale=2, size=V).astype(np.float32)
    order = np.argsort(-logits)[: top_k or V]
    p = np.exp(logits[order].astype(np.float64))
    reached = np.cumsum(p / p.sum())
    if np.abs(reached[:-1] - top_p).min(initial=1) < 1e-6:
        return  # rounding decides
    kept = order[: 1 + int((reached[:-1] < top_p).sum())]

    restricted = np.asarray(RESTRICT(logits[None], np.asarray([top_k], np.int32), np.asarray([top_p], np.float32)))[0]
    assert set(np.flatnonzero(restricted > -np.inf)) == set(kept)
    np.testing.assert_array_equal(restricted[kept], logits[kept])


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.5), Sampling(temperature=2.0, top_k=3, top_p=0.8)])
def test_frequencies_are_probabilities(sampling):
    draws = 20_000
    logits = LOGITS[:1] / np.float32(sampling.temperature)
    if sampling.top_k:
        logits = RESTRICT(logits, np.asarray([sampling.top_k], np.int32), np.asarray([sampling.top_p], np.float32))
    p = np.exp(np.asarray(logits[0], np.float64))
    p /= p.sum()
    found = np.bincount(drawn(np.broadcast_to(LOGITS[0], (draws, V)), sampling, np.arange(draws)), minlength=V) / draws
    assert (np.abs(found - p) <= 4 * np.sqrt(p * (1 - p) / draws)).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "--temperature is -0.1; it must be 0 (greedy), or from 0.000001 to 1,000,000: try 0.8"),
        ({"temperature": 1e-300}, "--temperature is 1e-300; it must be 0 (greedy), or from"),
        ({"temperature": 1e7}, "--temperature is 10000000.0"),
        ({"temperature": True}, "--temperature is True"),
        ({"temperature": "1"}, "--temperature is 1;"),
        ({"temperature": None}, "--temperature is None"),
        ({"top_k": 1.0}, "--top-k is 1.0"),
        ({"top_k": [1]}, "--top-k is [1]"),
        ({"top_p": False}, "--top-p is False"),
        ({"top_p": 10**400}, "--top-p is 1000"),
        ({"seed": 2**32}, "--seed is 4294967296"),
        ({"seed": 1.5}, "--seed is 1.5"),
        ({"temperature": float("nan")}, "--temperature is nan"),
        ({"temperature": float("inf")}, "--temperature is inf"),
        ({"top_k": -1}, "--top-k is -1; it must be 0 (all tokens) or more: try 40"),
        ({"top_p": 0.0}, "--top-p is 0.0; it must be above 0 and at most 1: try 0.9"),
        ({"top_p": 1.1}, "--top-p is 1.1"),
        ({"seed": -1}, "--seed is -1; it must be from 0 to 4294967295"),
    ],
)
def test_sampling_out_of_range(unchecked, values, message):
    with pytest.raises(AstraError) as raised:
        Sampling(**values)
    assert message in str(raised.value)


@pytest.mark.parametrize("top_k", [V, V + 1, 2**31, 2**32, 10**30])
def test_more_tokens_than_there_are_may_all_be_drawn(top_k):
    """Also numbers that no array of JAX holds."""
    np.testing.assert_array_equal(drawn(LOGITS, Sampling(1.0, top_k=top_k), 1), drawn(LOGITS, Sampling(1.0), 1))


@pytest.mark.parametrize("top_p", [1e-300, 5e-324])
def test_the_likeliest_token_may_always_be_drawn(top_p):
    """Also where float32 has no such probability."""
    np.testing.assert_array_equal(drawn(LOGITS, Sampling(1.0, top_p=top_p), 1), LOGITS.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-6, 1e6])
def test_the_hottest_and_the_coldest(temperature):
    logits = np.asarray([[-1e30, -1e3, 1e3 - 1, 1e3]], np.float32)
    found = {int(drawn(logits, Sampling(temperature), seed)[0]) for seed in range(40)}
    assert found == ({3} if temperature < 1 else {1, 2, 3})


ANY = st.builds(
    Sampling,
    st.just(0.0) | st.floats(0.3, 3),
    st.integers(0, V),
    st.floats(0.3, 1),
    st.integers(0, 2**32 - 1),
)


@given(st.lists(st.tuples(ANY, st.integers(0, 99)), min_size=3, max_size=3), st.randoms(use_true_random=False))
def test_what_a_row_draws_depends_on_itself_alone(rows, random):
    """Not on its neighbours, their number or its place among them; greedy ones among them, too."""
    logits = np.random.default_rng(1).normal(size=(len(rows), V)).astype(np.float32)

    def all_of(order):
        sampling = [rows[n][0] for n in order]
        draws = Draws.of(sampling)._replace(place=np.asarray([rows[n][1] for n in order], np.int32))
        return np.asarray(DRAW(logits[order], draws, max(one.work for one in sampling))).tolist()

    together = all_of(list(range(len(rows))))
    assert together == [all_of([n])[0] for n in range(len(rows))]
    shuffled = random.sample(range(len(rows)), len(rows))
    assert all_of(shuffled) == [together[n] for n in shuffled]
    for n, (sampling, _) in enumerate(rows):
        if sampling.temperature == 0:
            assert together[n] == logits[n].argmax()


def test_places_of_a_text_and_seeds_of_rows_draw_differently():
    flat = np.zeros((64, V), np.float32)
    places = Draws.of([Sampling(1.0, seed=3)] * 64)._replace(place=np.arange(64, dtype=np.int32))
    for draws in (places, Draws.of(seeded(Sampling(1.0, seed=3), 64))):
        assert len(set(np.asarray(DRAW(flat, draws, 1)).tolist())) > V // 2
    (last, first) = seeded(Sampling(1.0, seed=2**32 - 1), 2)
    assert (last.seed, first) == (2**32 - 1, dataclasses.replace(last, seed=0))


def test_ways_of_drawing_share_a_program():
    """What is drawn, and how much work that takes, is no part of it."""
    program = jax.jit(lambda *arguments: draw(*arguments))  # by itself: jit counts the programs of a function
    ways = [Sampling(), Sampling(0.7), Sampling(0.7, 5, 0.9, 1), Sampling(2.0, 2**40), Sampling(0.1, top_p=0.3)]
    for sampling in ways:
        program(LOGITS, Draws.of([sampling] * 3), sampling.work)
    assert program._cache_size() == 1
