"""Generation: how tokens are drawn, where a text ends, what is refused. What is decoded: see tests/multidevice."""

import time
import types
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from astra_jax.errors import AstraError
from astra_jax.inputs.token_batches import pad
from astra_jax.mesh.sharding import make_mesh
from astra_jax.serving import generate
from astra_jax.serving.generate import Continuation, Generator, Sampling, restrict, sample

V = 12
LOGITS = jnp.asarray(np.random.default_rng(0).normal(size=(3, V)), jnp.float32)


def key(seed):
    return jax.random.key(seed)


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(seed=5, top_k=3), Sampling(1.0, top_k=1), Sampling(9.0, 0, 1e-6)]
)
def test_greedy(sampling):
    for seed in range(5):
        np.testing.assert_array_equal(sample(LOGITS, key(seed), sampling.numbers), LOGITS.argmax(-1))


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

    restricted = np.asarray(restrict(jnp.asarray(logits[None]), top_k, top_p))[0]
    assert set(np.flatnonzero(restricted > -np.inf)) == set(kept)
    np.testing.assert_array_equal(restricted[kept], logits[kept])


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.5), Sampling(temperature=2.0, top_k=3, top_p=0.8)])
def test_frequencies_are_probabilities(sampling):
    draws = 20_000
    logits = LOGITS[0] / sampling.temperature
    if sampling.top_k:
        logits = restrict(logits[None], sampling.top_k, sampling.top_p)[0]
    p = np.asarray(jax.nn.softmax(logits), np.float64)
    found = np.bincount(sample(jnp.broadcast_to(LOGITS[0], (draws, V)), key(0), sampling.numbers), minlength=V) / draws
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
    numbers = Sampling(1.0, top_k=top_k).numbers
    np.testing.assert_array_equal(sample(LOGITS, key(1), numbers), sample(LOGITS, key(1), Sampling(1.0).numbers))


@pytest.mark.parametrize("top_p", [1e-300, 5e-324])
def test_the_likeliest_token_may_always_be_drawn(top_p):
    """Also where float32 has no such probability."""
    np.testing.assert_array_equal(sample(LOGITS, key(1), Sampling(1.0, top_p=top_p).numbers), LOGITS.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-6, 1e6])
def test_the_hottest_and_the_coldest(temperature):
    logits = jnp.asarray([[-1e30, -1e3, 1e3 - 1, 1e3]], jnp.float32)
    drawn = {int(sample(logits, key(seed), Sampling(temperature).numbers)[0]) for seed in range(40)}
    assert drawn == ({3} if temperature < 1 else {1, 2, 3})


@pytest.fixture(scope="module")
def generator(tiny_llama) -> Generator:
    return Generator(tiny_llama(), make_mesh(1))


def tokens(generator, text, new_tokens, sampling):
    return np.stack(list(generator.tokens(text, new_tokens, sampling)), axis=1)


def test_a_seed_says_what_is_drawn(generator):
    text = pad([[1, 2, 3], [4]], 64)
    first, again, other = (tokens(generator, text, 8, Sampling(1.0, seed=seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any(axis=1).all()
    assert len(Counter(first.ravel().tolist())) > 4  # steps and rows differ


def test_a_program_is_compiled_per_bucket_not_per_length(tiny_llama):
    generator = Generator(tiny_llama(), make_mesh(1))

    def programs(length, new_tokens):
        tokens(generator, pad([list(range(length))], 64), new_tokens, Sampling())
        return generator._prefill._cache_size(), generator._decode._cache_size()

    prefill, decode = programs(3, 5)
    assert prefill == 1
    assert programs(9, 32) == programs(30, 3) == (prefill, decode)
    assert programs(33, 5) == (2 * prefill, 2 * decode)


def test_a_caller_may_stop(generator):
    text = pad([[1, 2, 3]], 64)
    steps = generator.tokens(text, 8, Sampling())
    assert [next(steps), next(steps)] == [[token] for token in tokens(generator, text, 8, Sampling())[0, :2]]


def test_as_many_tokens_as_the_model_has_room_for(generator):
    """64, and one that is drawn from the last."""
    text = pad([list(range(40)) + list(range(20))], 64)
    assert tokens(generator, text, 5, Sampling()).shape == (1, 5)
    assert tokens(generator, pad([[1] * 64], 64), 1, Sampling()).shape == (1, 1)
    with pytest.raises(
        AstraError, match="a prompt of 60 and 6 new tokens are more than the model takes, 64: ask for fewer"
    ):
        next(generator.tokens(text, 6, Sampling()))
    with pytest.raises(AstraError, match="the number of new tokens is 0; it must be at least 1"):
        next(generator.tokens(text, 0, Sampling()))


def test_what_cannot_generate(tiny_llama, tiny_bert):
    for model in (tiny_bert(), tiny_llama(task="classification")):
        with pytest.raises(AstraError, match="no language model: it cannot generate text"):
            Generator(model, make_mesh(1))
    with pytest.raises(AstraError, match="has no codebooks, so it runs on one device only"):
        Generator(tiny_llama(), make_mesh(2))


def continuation(*stop, eos=(9,)):
    """Of tokens that are the letters of a text."""
    return Continuation(lambda token: "abcdefgh_."[token], eos, stop)


def test_a_text_goes_on_until_it_ends():
    text = continuation()
    assert [text.add(token) for token in (0, 1, 9, 2)] == ["a", "b", "", ""]
    assert (text.text, text.count, text.done) == ("ab", 3, True)


def test_a_stop_string_ends_a_text_and_is_never_shown():
    text = continuation("bcd", "g")
    assert [text.add(token) for token in (0, 1, 2, 1, 2, 3, 4)] == ["a", "", "", "bc", "", "", ""]
    assert (text.text, text.done) == ("abc", True)
    assert [text.rest(), text.rest()] == ["", ""]


def test_what_was_held_back_is_shown_at_the_end():
    text = continuation("bcd")
    assert [text.add(token) for token in (0, 1, 2)] == ["a", "", ""]
    assert (text.rest(), text.done) == ("bc", False)
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
    assert text.done == bool(ends)


def test_sampling_in_another_way_compiles_nothing(generator):
    def programs(*sampling):
        tokens(generator, pad([[1, 2]], 64), 3, Sampling(*sampling))
        return generator._sample._cache_size(), generator._decode._cache_size()

    there = programs(0.7, 5, 0.9, 1)
    assert there == programs(0.8, 6, 1.0, 2) == programs(1.5, 0, 0.3, 3) == programs(2.0, 2**40)


def test_an_endless_stop_string_takes_no_time():
    text = continuation("a" * 10_000_000, "ab")
    start = time.perf_counter()
    for _ in range(1000):
        text.add(0)
    assert time.perf_counter() - start < 2 and text.text == "a" * 1000 and not text.done


def test_a_stop_string_that_is_no_text(unchecked):
    with pytest.raises(AstraError, match="--stop is 7; it must be a text"):
        continuation(7)


def test_an_empty_stop_string():
    with pytest.raises(AstraError, match="--stop is an empty string: give at least one character"):
        continuation("")


@pytest.mark.usefixtures("unchecked")  # of devices that are none
@pytest.mark.parametrize(
    ("rows", "whole"), [([[1, 2, 3, 0]], True), ([[1, 0], [1, 0]], True), ([[1, 3], [2, 0]], False)], ids=str
)
def test_texts_end_on_one_host(rows, whole, monkeypatch):
    """Numbers are the hosts of a mesh's devices."""
    monkeypatch.setattr(generate, "Mesh", lambda devices, axes: [device.process_index for device in devices])
    devices = np.array([[types.SimpleNamespace(process_index=host) for host in row] for row in rows])
    mesh = types.SimpleNamespace(devices=devices, shape=dict(zip(("data", "seq"), devices.shape, strict=True)))
    if whole:
        assert generate.ends_of(mesh) == [row[-1] for row in rows]
        return
    with pytest.raises(AstraError, match="--devices 2x2: texts end on several of the 4 hosts, .* at least 2x4"):
        generate.ends_of(mesh)
