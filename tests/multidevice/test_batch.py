"""Texts that enter and leave a running batch say what each says alone, also with remote tokens as codes."""

import functools
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from astra_jax.codecs.config import VQConfig
from astra_jax.errors import AstraError
from astra_jax.inputs.token_batches import Text, pad
from astra_jax.mesh.sharding import make_mesh
from astra_jax.serving.batch import Batch
from astra_jax.serving.generate import Generator
from astra_jax.serving.sampling import Sampling

MOST = 20  # tokens of a prompt, in one bucket but where another is asked for
SLOTS = 4


class Asked(NamedTuple):
    """A prompt, when it may enter, and when it leaves by itself."""

    prompt: list[int]
    new_tokens: int
    sampling: Sampling
    wait: int  # steps after the one before it entered
    leaves: int  # tokens after which it is taken out


ASKED = st.builds(
    Asked,
    st.lists(st.integers(0, 49), min_size=1, max_size=MOST),
    st.integers(1, 6),
    st.builds(
        Sampling, st.just(0.0) | st.floats(0.5, 3), st.integers(0, 20), st.floats(0.5, 1), st.integers(0, 2**32 - 1)
    ),
    st.integers(0, 3),
    st.integers(1, 6),
)


class Watched(Generator):
    """Keeps the logits of every step."""

    logits = None

    def decode(self, rows, work):
        rows, self.logits = super().decode(rows, work)
        return rows, self.logits


@pytest.fixture(scope="module")
def made(tiny_llama):
    """Makes the compiled model on a mesh, once."""
    model = tiny_llama(VQConfig(groups=4, codewords=16))
    return functools.cache(lambda N, data: Watched(model, make_mesh(N, data)))


def said(generator, schedule, slots):
    """What is said of each prompt, and from the second token on the logits that it was drawn from."""
    batch, coming, rows = Batch(generator, slots), list(enumerate(schedule)), {}
    tokens, logits, waited = [[] for _ in schedule], [[] for _ in schedule], 0
    while coming or rows:
        while coming and batch.free and waited >= coming[0][1].wait:
            number, asked = coming.pop(0)
            waited = 0
            (row,) = batch.enter(pad([asked.prompt], 64), [asked.new_tokens], [asked.sampling])
            rows[row] = number
        generator.logits = None
        for token in batch.step():
            number = rows[token.row]
            tokens[number].append(token.id)
            if generator.logits is not None:
                logits[number].append(np.asarray(generator.logits)[token.row])
            if token.last or len(tokens[number]) == schedule[number].leaves:
                batch.leave(token.row)
                del rows[token.row]
        waited += 1
    assert batch.free == batch_size(generator, slots)
    return tokens, logits


def batch_size(generator, slots):
    data = generator.mesh.shape["data"]
    return -(-slots // data) * data


def compare(generator, schedule, slots=SLOTS):
    tokens, logits = said(generator, schedule, slots)
    for asked, found, scores in zip(schedule, tokens, logits, strict=True):
        (alone,), (expected,) = said(generator, [asked], 1)
        assert len(found) == min(asked.new_tokens, asked.leaves) and found == alone
        np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "mesh", [(1, 1), (4, 1), pytest.param((2, 2), marks=pytest.mark.slow)], ids=["alone", "codes", "data"]
)
@settings(max_examples=8)
@given(schedule=st.lists(ASKED, min_size=2, max_size=7))
def test_a_text_in_a_batch_is_what_it_is_alone(made, mesh, schedule):
    """Whenever it enters and leaves, whoever is in, however these are drawn, and in whatever row."""
    compare(made(*mesh), schedule)


@pytest.mark.parametrize("mesh", [(1, 1), (4, 1)], ids=["alone", "codes"])
def test_the_cache_grows_where_a_longer_prompt_enters(made, mesh):
    """Also for those that are in already; and a row is used again by a shorter one."""
    ask = lambda length, wait, new: Asked(list(range(length)), new, Sampling(1.0, seed=length), wait, 99)  # noqa: E731
    compare(made(*mesh), [ask(3, 0, 8), ask(40, 2, 8), ask(5, 2, 8), ask(2, 1, 8)], slots=2)


def test_more_texts_than_there_is_room_for(made):
    batch = Batch(made(1, 1), 2)
    batch.enter(pad([[1], [2]], 64), [2, 2], [Sampling()] * 2)
    with pytest.raises(AstraError, match="1 texts cannot enter where 0 have room: wait until others are done"):
        batch.enter(pad([[3]], 64), [2], [Sampling()])
    batch.leave(0)
    assert batch.enter(pad([[3]], 64), [2], [Sampling()]) == [0]


def test_an_idle_batch_takes_no_step(made):
    batch = Batch(made(1, 1), 1)
    assert batch.step() == [] and tuple(batch.memory) == (0, 0)
    batch.enter(Text(np.array([[1, 2]], np.int32), np.array([2], np.int32)), [2], [Sampling()])
    batch.leave(0)
    assert batch.step() == [], "nor says what nobody waits for"


def test_texts_that_come_and_go_compile_nothing(made):
    """Once there is a program for the shapes of their prompts and of the cache."""
    generator = made(1, 1)

    def programs():
        ask = lambda length, wait: Asked(list(range(length)), 3, Sampling(), wait, 99)  # noqa: E731
        said(generator, [ask(3, 0), ask(9, 1), ask(30, 0), ask(2, 2)], 2)
        return generator._prefill._cache_size(), generator._enter._cache_size(), generator._decode._cache_size()

    assert programs() == programs()
