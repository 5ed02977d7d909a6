"""Windows, batches and perplexity: what counts, and that how it is computed does not change it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from astra_jax.codecs.config import VQConfig
from astra_jax.errors import AstraError
from astra_jax.inputs.token_batches import pad
from astra_jax.mesh.sharding import Shards, make_mesh
from astra_jax.serving.compile import parallelize
from astra_jax.strategies.base import Single
from astra_jax.strategies.coded import Astra
from eval.datasets.windows import bucketed, even_strides, run_batches, windows
from eval.quality.perplexity import NextTokenLoss, perplexity
from tests.helpers import SHARED

LIMIT = 48


@pytest.fixture(scope="module")
def model(tiny_gpt2):
    """A language model with codebooks."""
    return tiny_gpt2(VQConfig(4, 16), n_positions=LIMIT)


@pytest.fixture(scope="module")
def virtual(model):
    """N -> a function from text to the loss of every token, on one device."""
    loss = NextTokenLoss(model)

    @functools.cache
    def make(N: int):
        @jax.jit
        def run(text):
            tokens, shards = loss.to_tokens(text), loss.shards(N, text)
            out = loss(shards.scatter(tokens), Astra.virtual(shards) if N > 1 else Single(shards))[0]
            return shards.gather(out, tokens.shape[1])

        return run

    return make


def documents(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 50, length).tolist() for length in lengths]


# --- windows ------------------------------------------------------------------------------------------------------

sizes = st.integers(2, 12).flatmap(lambda length: st.tuples(st.just(length), st.integers(1, length)))


@given(n=st.integers(0, 50), size=sizes)
def test_every_token_but_the_first_counts_once(n, size):
    length, stride = size
    counted, reached = [], 0
    for number, window in enumerate(windows(list(range(n)), length, stride)):
        # Tokens are their own places, so that a window shows where it lies.
        first = window.ids[0]
        assert window.ids == list(range(first, first + len(window.ids))) and 2 <= len(window.ids) <= length
        assert first == number * min(stride, length - 1)
        new = window.ids[1:][window.counted :]
        assert new and new[0] == (reached + 1 if number else 1)
        assert number == 0 or new[0] - first >= max(1, length - stride)  # the context that stride leaves
        counted, reached = counted + new, window.ids[-1]
    assert counted == list(range(1, n))


def test_windows_by_hand():
    ids = [0, 1, 2, 3, 4, 5, 6]
    assert windows(ids, 4, 2) == [([0, 1, 2, 3], 0), ([2, 3, 4, 5], 1), ([4, 5, 6], 1)]
    assert windows(ids, 4, 4) == [([0, 1, 2, 3], 0), ([3, 4, 5, 6], 0)]
    assert windows(ids[:4], 4, 1) == [([0, 1, 2, 3], 0)]
    assert windows([0], 4, 2) == windows([], 4, 2) == []


@pytest.mark.parametrize("length, stride", [(1, 1), (4, 0), (4, 5)])
def test_windows_that_cannot_be(length, stride):
    with pytest.raises(ValueError, match=f"length {length} .* stride {stride}"):
        windows([1, 2, 3], length, stride)


@given(N=st.integers(1, 8), T=st.integers(8, 40))
def test_even_strides_count_all_places_of_a_shard_alike(N, T):
    """Of a long document every window but the first counts whole shards, the last ones."""
    lengths = Shards.split(T, N).lengths
    shard = np.repeat(np.arange(N), lengths)
    for number, stride in enumerate(even_strides(lengths), 1):
        counted = np.zeros(N)
        for window in windows(list(range(T + 5 * stride)), T, stride)[1:]:
            # One token further: the last of a shard stands in for that of the shard before.
            counted += np.bincount(shard[1:][window.counted :], minlength=N)
        if number < N:
            assert counted.tolist() == [0] * (N - number) + [5 * n for n in lengths[N - number :]]


# --- batches ------------------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(1, 100), max_size=20), size=st.integers(1, 5))
def test_batches_hold_every_sequence_once(lengths, size):
    sequences = documents(*lengths)
    shapes, seen = [], []
    for places, text in bucketed(sequences, 100, size):
        shapes.append(text.ids.shape)
        assert len(text.lengths) == size >= len(places) >= 1 and min(text.lengths) >= 1
        for place, ids, length in zip(places, text.ids, text.lengths, strict=False):
            assert ids[:length].tolist() == sequences[place]
            seen.append(place)
    assert sorted(seen) == list(range(len(lengths)))
    assert shapes == sorted(shapes) and {T for _, T in shapes} <= {32, 64, 100}


def test_rows_come_back_to_their_places():
    sequences = documents(5, 70, 3, 40, 64, 65)
    rows = dict(run_batches(lambda text: jnp.asarray(text.lengths) * 10, sequences, 128, 4, "test"))
    assert [int(rows[place]) for place in range(6)] == [50, 700, 30, 400, 640, 650]


# --- perplexity ---------------------------------------------------------------------------------------------------


@nnx.jit
def logits(model, text):
    return model(model.to_tokens(text), Single(model.shards(1, text)))[0]


def by_hand(model, ids: list[int], length: int, stride: int) -> list[float]:
    """The loss of every token but the first, each from the tokens of its window that are before it."""
    losses = []
    for t in range(1, len(ids)):
        start = 0
        while start + length <= t:
            start += min(stride, length - 1)
        scores = np.asarray(logits(model, pad([ids[start:t]], LIMIT))[0, t - start - 1], np.float64)
        losses.append(float(np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[ids[t]]))
    return losses


@pytest.mark.parametrize("length, stride", [(8, 3), (8, 8), (2, 1)])
def test_perplexity_is_what_single_tokens_cost(model, virtual, length, stride):
    given_ids = documents(11, 1, 5)
    expected = [loss for ids in given_ids for loss in by_hand(model, ids, length, stride)]
    found = perplexity(virtual(1), given_ids, length, stride, 2)
    assert found.tokens == 14 == len(expected)
    assert found.nll == pytest.approx(np.mean(expected), abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.nll))


def test_batches_and_padding_do_not_change_the_result(virtual):
    run, given_ids = virtual(3), documents(40, 7, 48, 33, 2)
    whole = perplexity(run, given_ids, LIMIT, LIMIT, 4)
    alone = [perplexity(run, [ids], LIMIT, LIMIT, 1) for ids in given_ids]
    assert whole.tokens == sum(part.tokens for part in alone) == 125
    assert whole.nll == pytest.approx(sum(part.nll * part.tokens for part in alone) / 125, abs=1e-5)
    # A window that holds a whole document needs no second one, whatever the stride.
    assert perplexity(run, given_ids, LIMIT, 1, 4) == whole


@pytest.mark.parametrize("data_devices, N", [(1, 1), (1, 4), (2, 3)])
def test_a_mesh_and_virtual_shards_agree(model, virtual, data_devices, N):
    given_ids = documents(45, 30, 3)  # of the last one, four devices use three
    mesh = parallelize(NextTokenLoss(model), make_mesh(N, data_devices))
    found, expected = (perplexity(run, given_ids, 32, 16, 3) for run in (mesh, virtual(N)))
    assert found.tokens == expected.tokens and found.nll == pytest.approx(expected.nll, abs=1e-5)


def test_codes_and_window_matter(virtual):
    given_ids = documents(45, 30)
    costs = {perplexity(virtual(N), given_ids, 32, stride, 3).nll for N in (1, 3, 4) for stride in (16, 32)}
    assert len(costs) == 6


def test_nothing_to_predict(virtual):
    with pytest.raises(AstraError, match="nothing to predict"):
        perplexity(virtual(1), documents(1, 0), 8, 4, 2)


@pytest.mark.skipif(not (SHARED / "stories260k").is_dir(), reason=f"{SHARED}/stories260k is not here")
def test_a_trained_model_pays_what_is_known():
    """1.26644 nats per token, as transformers computes it: stories260k on its five sample stories."""
    from checkpoints import huggingface
    from eval.datasets.labelled import DataArgs

    folder = SHARED / "stories260k"
    checkpoint = huggingface.read(str(folder))
    args = DataArgs(data=str(folder / "text"), separator="<|endoftext|>")
    stories = [checkpoint.tokenizer.encode(text) for text in args.open_documents()]
    run = parallelize(NextTokenLoss(checkpoint.model), make_mesh(1))
    found = perplexity(run, stories, 512, 256, 5)
    assert found.tokens == 1804 and found.nll == pytest.approx(1.26644, abs=1e-4)
