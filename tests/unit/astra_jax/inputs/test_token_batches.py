"""Batches of token sequences: what they are padded to, and what is said of too short and too long ones."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from astra_jax.errors import AstraError
from astra_jax.inputs.token_batches import bucket, longest, pad
from astra_jax.models.roberta import RobertaConfig


@pytest.mark.parametrize(
    ("T", "limit", "expected"),
    [
        (1, 1024, 32),
        (32, 1024, 32),
        (33, 1024, 64),
        (512, 1000, 512),
        (513, 1000, 1000),
        (1000, 1000, 1000),
        (3, 20, 20),
    ],
)
def test_buckets(T, limit, expected):
    assert bucket(T, limit) == expected


def test_places_before_the_first_token_are_none():
    assert longest(RobertaConfig(max_position_embeddings=514)) == 512
    assert longest(RobertaConfig(max_position_embeddings=514, pad_token_id=0, max_seq_length=600)) == 513
    assert longest(RobertaConfig(max_position_embeddings=514, max_seq_length=128)) == 128
    with pytest.raises(AstraError, match="max_position_embeddings is 2; it must be above 2, which is the place"):
        RobertaConfig(max_position_embeddings=2)
    with pytest.raises(AstraError, match="pad_token_id is -1; it must be a whole number of at least 0"):
        RobertaConfig(pad_token_id=-1)


@given(st.integers(1, 5000), st.integers(0, 5000))
def test_a_bucket_holds_its_sequences_and_is_at_most_twice_as_long(T, more):
    found = bucket(T, T + more)
    assert T <= found <= min(T + more, max(32, 2 * T - 1))
    assert bucket(found, T + more) == found


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=70), min_size=1, max_size=4))
def test_pad_keeps_every_sequence(sequences):
    text = pad(sequences, 100)
    assert text.ids.shape == (len(sequences), bucket(max(map(len, sequences)), 100))
    assert text.lengths.tolist() == [len(sequence) for sequence in sequences]
    for row, sequence in zip(text.ids, sequences, strict=True):
        assert row[: len(sequence)].tolist() == sequence
    assert {text.ids.dtype, text.lengths.dtype} == {np.dtype(np.int32)}


def test_pad_to_a_given_length():
    assert pad([[1, 2], [3]], 100, T=5).ids.tolist() == [[1, 2, 0, 0, 0], [3, 0, 0, 0, 0]]


@pytest.mark.parametrize("sequences", [[], [[]], [[1, 2], []]])
def test_an_empty_text(sequences):
    with pytest.raises(AstraError, match="the text is empty: give at least one token"):
        pad(sequences, 100)


def test_a_text_that_is_too_long():
    assert pad([[1] * 8], 8).ids.shape == (1, 8)
    with pytest.raises(AstraError, match="the text has 9 tokens; the model takes at most 8: shorten it"):
        pad([[1], [1] * 9], 8)
