"""Hosts with programs of their own say what virtual shards on one device do, and make do with what arrives."""

import dataclasses

import jax
import numpy as np
import pytest

from astra_jax.codecs.config import NestedPQConfig, VQConfig
from astra_jax.serving.compile import parallelize
from astra_jax.serving.generate import Generator
from astra_jax.serving.sampling import Sampling
from astra_jax.strategies.coded import Astra
from tests.helpers.links import on_hosts
from tests.helpers.sharded import (
    KV,
    PICTURE_MODELS,
    TEXT_MODELS,
    as_pairs,
    cases,
    decode,
    recompute,
    run_virtual,
    three_blocks,
    tokens,
)

PLAIN = VQConfig(groups=4, codewords=16)
SINGLE = dataclasses.replace(PLAIN, class_token="single")
OF_KEYS = dataclasses.replace(PLAIN, **KV)
NESTED = NestedPQConfig(groups=3, codewords=16, widths=(8, 2, 5), levels=(1, 2))
LINEAR = dataclasses.replace(PLAIN, predictor="linear")
MLP = dataclasses.replace(LINEAR, predictor="mlp", hidden_units=5)
IDS = dataclasses.replace(LINEAR, schedule=("known", "coded", "coded"))
ESTIMATED = NestedPQConfig.of(LINEAR, widths=(1, 2, 3, 4), levels=(4,))
PICTURES = {"vit": ("tiny_vit", {}), **PICTURE_MODELS}
CLASSIFIERS = [name for name in TEXT_MODELS if name not in ("gpt2", "llama")]


def answers(model, inputs, N, **options):
    """What the host of the last shard says."""
    found, sent = on_hosts(N, lambda mesh, make: np.asarray(parallelize(model, mesh, make)(inputs)), **options)
    return found[-1], sent


def check(model, inputs, N, speeds=None):
    found, _ = answers(model, inputs, N, speeds=speeds)
    np.testing.assert_allclose(found, run_virtual(model, inputs, N, None, speeds), rtol=1e-5, atol=1e-5)


FAST = [
    ("vit", PLAIN, 3),
    ("vit", SINGLE, 4),
    ("vit", NESTED, 2),
    ("deit", OF_KEYS, 3),
    ("siglip", PLAIN, 3),
]
SLOW = [("vit", OF_KEYS, 8), ("dinov2 classifier", PLAIN, 4), ("clip", SINGLE, 2), ("siglip", OF_KEYS, 8)]


@pytest.mark.parametrize(("name", "astra", "N"), cases(FAST + SLOW, FAST))
def test_pictures(request, rank_coded, name, astra, N):
    fixture, options = PICTURES[name]
    check(request.getfixturevalue(fixture)(astra, **options), rank_coded(2), N)


@pytest.mark.parametrize(
    ("name", "N", "site"),
    cases(
        [
            (name, N, ("hidden", "kv")[n % 2])
            for n, name in enumerate(CLASSIFIERS)
            for N in ((2, 8), (3, 4))[n // 2 % 2]
        ],
        [("llama classifier", 2, "kv"), ("bert distributed", 4, "kv"), ("bert mean", 3, "hidden")],
    ),
)
def test_texts_of_different_lengths(request, random_text, name, N, site):
    fixture, class_token, options = TEXT_MODELS[name]
    astra = VQConfig(groups=4, codewords=16, site=site, class_token=class_token)
    model = request.getfixturevalue(fixture)(astra, **options)
    check(model, as_pairs(model, random_text(23, 1, 2, 7, 24)), N)


@pytest.mark.parametrize(
    ("family", "astra", "N"),
    [
        ("tiny_vit", MLP, 3),
        (("tiny_bert", "class"), IDS, 3),
        pytest.param("tiny_vit", dataclasses.replace(ESTIMATED, class_token="single"), 4, marks=pytest.mark.slow),
        pytest.param("tiny_bert", dataclasses.replace(MLP, **KV), 4, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_estimates(request, rank_coded, random_text, family, astra, N):
    inputs = rank_coded(2) if family == "tiny_vit" else random_text(23, 1, 2, 7, 24)
    check(three_blocks(request, family, astra), inputs, N)


@pytest.mark.parametrize("speeds", [(1.0, 3.0, 2.0), (4.0, 4.0, 1.0)])
def test_hosts_that_are_not_as_fast_as_others_have_fewer_tokens(tiny_vit, tiny_bert, rank_coded, random_text, speeds):
    check(tiny_vit(PLAIN), rank_coded(2), 3, speeds)
    check(tiny_bert(PLAIN, pooling="mean"), random_text(23, 1, 2, 7, 24), 3, speeds)


@pytest.mark.parametrize(
    ("family", "astra", "N"),
    cases(
        [
            ("tiny_gpt2", OF_KEYS, 4),
            ("tiny_llama", NESTED, 3),
            ("tiny_gemma3", PLAIN, 2),
            ("tiny_llama", dataclasses.replace(IDS, **KV), 2),
            ("tiny_gpt2", PLAIN, 8),
            ("tiny_llama", OF_KEYS, 3),
        ],
        [("tiny_gpt2", OF_KEYS, 4), ("tiny_llama", NESTED, 3), ("tiny_gemma3", PLAIN, 2)],
    ),
)
def test_the_host_where_prompts_end_goes_on_with_them(request, random_text, family, astra, N):
    model = (
        request.getfixturevalue(family)(astra) if astra.predictor == "none" else three_blocks(request, family, astra)
    )
    text = random_text(23, 1, 2, 7)

    def of_host(mesh, make):
        generator = Generator(model, mesh, make)
        new = tokens(generator, text, Sampling(temperature=3.0)) if generator.here else generator.prefill(text)
        make.link.passes += 1
        return (new, decode(generator, text, new)) if generator.here else generator.prefill(text)

    found, _ = on_hosts(N, of_host)
    assert found[:-1] == [None] * (N - 1)
    new, logits = found[-1]
    np.testing.assert_allclose(logits, recompute(model, text, new, N), rtol=1e-5, atol=1e-5)


def test_what_crosses_the_link(tiny_vit, rank_coded):
    """Every host sends its codes to every other one, in every block, and in the end a class state to the last."""
    model = tiny_vit(PLAIN)
    _, sent = answers(model, rank_coded(1), 3)
    codes = [(channel, *ends) for channel, *ends, _ in sent if channel >= 0]
    everybody = [(L, n, m) for L in range(2) for n in range(3) for m in range(3) if n != m]
    assert sorted(codes) == everybody
    assert sum(size for channel, *_, size in sent if channel >= 0) == 2 * 2 * sum(-(-S * 4 * 4 // 8) for S in (8, 8, 9))
    assert sorted(ends for channel, *ends, _ in sent if channel < 0) == [[0, 2], [1, 2]]


def test_a_host_hears_only_of_what_is_before_it_in_a_text(tiny_llama, random_text):
    model, text = tiny_llama(PLAIN), random_text(23)
    _, sent = on_hosts(3, lambda mesh, make: Generator(model, mesh, make).prefill(text) and None)
    assert {(sender, receiver) for _, sender, receiver, _ in sent} == {(0, 1), (0, 2), (1, 2)}


@pytest.mark.parametrize("astra", [PLAIN, MLP], ids=["masked", "predicted"])
def test_codes_that_do_not_arrive(request, rank_coded, astra):
    """Are masked or predicted, as of virtual shards that lose the same."""
    model, images = three_blocks(request, "tiny_vit", astra), rank_coded(1)
    lost = {(0, 0, 1), (1, 2, 1), (1, 2, 0), (2, 0, 2)}  # block, sender, receiver
    found, _ = answers(model, images, 3, lost=lambda channel, n, m, packet: (channel, n, m) in lost)
    shards = model.shards(3, images)
    arrived = np.ones((3, 1, 3, 3, shards.class_slots + shards.S), bool)
    for block, sender, receiver in lost:
        arrived[block, :, receiver, sender] = False
    out = model(
        shards.scatter(model.to_tokens(images)), Astra.virtual(shards, jax.numpy.asarray(arrived.reshape(3, 1, 3, -1)))
    )[0]
    np.testing.assert_allclose(found, out, rtol=1e-5, atol=1e-5)
    assert np.abs(found - run_virtual(model, images, 3)).max() > 1e-3


@pytest.mark.parametrize("astra", [PLAIN, NESTED], ids=["vq", "nested"])
def test_a_text_goes_on_without_codes_that_did_not_arrive(tiny_llama, random_text, astra):
    """Block by block: what did not come in one is seen in the others, also after the prompt."""
    model, text = tiny_llama(astra), random_text(23, 1, 2, 7)
    lost = {(0, 0, 2), (1, 1, 2), (1, 0, 1)}  # block, sender, receiver

    def of_host(mesh, make):
        generator = Generator(model, mesh, make)
        if not generator.here:
            generator.prefill(text)
            make.link.passes += 1
            return generator.prefill(text)
        new = tokens(generator, text, Sampling(temperature=3.0))
        make.link.passes += 1
        return new, decode(generator, text, new)

    found, _ = on_hosts(3, of_host, lost=lambda channel, n, m, packet: (channel, n, m) in lost)
    arrived = np.ones((2, 3, 3), bool)
    for block, sender, receiver in lost:
        arrived[block, receiver, sender] = False
    new, logits = found[-1]
    expected = recompute(model, text, new, 3, jax.numpy.asarray(arrived))
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(logits - recompute(model, text, new, 3)).max() > 1e-3


def test_groups_that_do_not_arrive(tiny_vit, rank_coded, monkeypatch):
    """Of nested codes the first ones say something by themselves: it is as if all had sent no more."""
    monkeypatch.setattr("astra_jax.codecs.packets.PAYLOAD", 6)  # a group of all tokens in each
    model, images = tiny_vit(NESTED), rank_coded(1)
    found, _ = answers(model, images, 3, lost=lambda channel, n, m, packet: channel >= 0 and packet >= 2)
    shards = model.shards(3, images)
    virtual = Astra.virtual(shards, groups=jax.numpy.int32(2))
    fewer = model(shards.scatter(model.to_tokens(images)), virtual)[0]
    np.testing.assert_allclose(found, fewer, rtol=1e-5, atol=1e-5)
    assert np.abs(found - run_virtual(model, images, 3)).max() > 1e-3
