"""Generation: its programs, and what is refused. What is decoded: see tests/multidevice."""

import types
from collections import Counter

import numpy as np
import pytest

from astra_jax.errors import AstraError
from astra_jax.inputs.token_batches import pad
from astra_jax.mesh.sharding import make_mesh
from astra_jax.serving import batch, generate
from astra_jax.serving.generate import Generator
from astra_jax.serving.sampling import Sampling


@pytest.fixture(scope="module")
def generator(tiny_llama) -> Generator:
    return Generator(tiny_llama(), make_mesh(1))


def tokens(generator, text, new_tokens, sampling):
    return np.stack(list(batch.tokens(generator, text, new_tokens, sampling)), axis=1)


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
    steps = batch.tokens(generator, text, 8, Sampling())
    assert [next(steps), next(steps)] == [[token] for token in tokens(generator, text, 8, Sampling())[0, :2]]


def test_as_many_tokens_as_the_model_has_room_for(generator):
    """64, and one that is drawn from the last."""
    text = pad([list(range(40)) + list(range(20))], 64)
    assert tokens(generator, text, 5, Sampling()).shape == (1, 5)
    assert tokens(generator, pad([[1] * 64], 64), 1, Sampling()).shape == (1, 1)
    with pytest.raises(
        AstraError, match="a prompt of 60 and 6 new tokens are more than the model takes, 64: ask for fewer"
    ):
        next(batch.tokens(generator, text, 6, Sampling()))
    with pytest.raises(AstraError, match="the number of new tokens is 0; it must be at least 1"):
        next(batch.tokens(generator, text, 0, Sampling()))


def test_what_cannot_generate(tiny_llama, tiny_bert):
    for model in (tiny_bert(), tiny_llama(task="classification")):
        with pytest.raises(AstraError, match="no language model: it cannot generate text"):
            Generator(model, make_mesh(1))
    with pytest.raises(AstraError, match="has no codebooks, so it runs on one device only"):
        Generator(tiny_llama(), make_mesh(2))


def test_sampling_in_another_way_compiles_nothing(generator):
    def programs(*sampling):
        tokens(generator, pad([[1, 2]], 64), 3, Sampling(*sampling))
        return generator._enter._cache_size(), generator._decode._cache_size()

    there = programs(0.7, 5, 0.9, 1)
    assert there == programs(0.8, 6, 1.0, 2) == programs(1.5, 0, 0.3, 3) == programs(2.0, 2**40) == programs()


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
