"""More groups of codes for devices that are near: the same on every mesh as on virtual shards, and what is sent."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from astra_jax.codecs.config import AstraConfig
from astra_jax.mesh.sharding import make_mesh
from astra_jax.serving.compile import make_of, parallelize
from astra_jax.serving.generate import Generator, Sampling
from astra_jax.strategies.base import Astra, Noise, Virtual
from astra_jax.strategies.near import Near
from eval.cost.hlo import collectives_in
from eval.cost.traffic import messages
from tests.multidevice.test_generation import decode, recompute, tokens
from tests.multidevice.test_predictor import estimates, three_blocks
from tests.multidevice.test_sharded_equals_virtual import real, run_virtual

NESTED = AstraConfig(groups=4, codewords=16, codec="nested-pq", widths=(6, 6, 3, 3), levels=(1, 1, 2))
LINEAR = dataclasses.replace(NESTED, predictor="linear")
IDS = dataclasses.replace(LINEAR, predictor="mlp", rank=5, side_info="token-ids")
KV = dict(site="kv")
TWO_HOMES, ONE_SLOW = Near(((0, 1), (2, 3)), 1), Near(((3, 0, 1),), 2)


def virtual(model, inputs, N, near):
    shards, toks = model.shards(N, inputs), model.to_tokens(inputs)
    out = model(shards.scatter(toks), Virtual(shards, near=near))[0]
    return shards.gather(out, toks.shape[1]) if model.per_token else out


@pytest.mark.parametrize(
    ("family", "astra", "N", "near"),
    [
        ("tiny_vit", NESTED, 4, TWO_HOMES),  # 25 patches
        pytest.param("tiny_gpt2", IDS, 4, ONE_SLOW, marks=pytest.mark.slow),
        pytest.param("tiny_llama", dataclasses.replace(NESTED, **KV), 3, Near(((2, 0),), 3), marks=pytest.mark.slow),
        pytest.param("tiny_vit", LINEAR, 5, ONE_SLOW, marks=pytest.mark.slow),
        pytest.param(
            "tiny_vit", dataclasses.replace(NESTED, class_token="single"), 4, ONE_SLOW, marks=pytest.mark.slow
        ),
        pytest.param("tiny_gpt2", NESTED, 8, Near(((0, 5), (4, 2, 7)), 2), marks=pytest.mark.slow),
        pytest.param("tiny_llama", dataclasses.replace(IDS, **KV), 4, TWO_HOMES, marks=pytest.mark.slow),
        pytest.param("tiny_bert", IDS, 3, Near(((0, 1),), 2), marks=pytest.mark.slow),
        pytest.param("tiny_bert", NESTED, 4, TWO_HOMES, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_it_is_the_same_model_as_on_virtual_shards(request, rank_coded, random_text, family, astra, N, near):
    """Texts of different lengths, some shards empty; and not the same model as with all groups for all."""
    predicts = astra.predictor != "none"
    model = three_blocks(request, family, astra) if predicts else request.getfixturevalue(family)(astra)
    inputs = rank_coded(2) if family == "tiny_vit" else random_text(23, 1, 2, 7, 24)
    found = real(model, inputs, parallelize(model, make_mesh(N), make_of("astra", near=near))(inputs))
    expected = real(model, inputs, virtual(model, inputs, N, near))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(found - real(model, inputs, run_virtual(model, inputs, N))).max() > 1e-4


@pytest.mark.slow
def test_batches_on_rows_of_devices(tiny_vit, rank_coded):
    model, images = tiny_vit(NESTED), rank_coded(3)
    found = parallelize(model, make_mesh(4, 2), make_of("astra", near=ONE_SLOW))(images)
    np.testing.assert_allclose(found, virtual(model, images, 4, ONE_SLOW), rtol=1e-5, atol=1e-5)


def test_who_is_near_sees_all_groups_and_who_is_far_the_first(tiny_gpt2, random_text):
    """In one block: shard 1 sees shard 0 as with all groups, shard 2 both as with the first two alone."""
    model, text = tiny_gpt2(NESTED, n_layer=1), random_text(24)
    shards, slots = model.shards(3, text), model.shards(3, text).scatter(model.to_tokens(text))
    found = virtual(model, text, 3, Near(((0, 1),), 2))
    few = model(slots, Virtual(shards, noise=Noise(jax.random.key(0), 0.0, jnp.int32(2))))[0]
    np.testing.assert_allclose(found[:, :16], run_virtual(model, text, 3)[:, :16], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[:, 16:], few[:, 16:], rtol=1e-5, atol=1e-5)


def test_who_has_more_groups_expects_no_better(request, random_text):
    """Every device has the same estimates of all tokens to the last bit, whoever is near: else codes would mislead."""
    model, text, mesh = three_blocks(request, "tiny_gpt2", LINEAR), random_text(24, 20), make_mesh(4)
    y = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 24, 16)), jnp.float32)
    of_device = estimates(model, Astra(model.shards(4, text), near=ONE_SLOW), mesh, y, jnp.zeros((2, 24), jnp.int32))
    np.testing.assert_array_equal(of_device, np.broadcast_to(of_device[:1], of_device.shape))
    everyone = estimates(model, Astra(model.shards(4, text)), mesh, y, jnp.zeros((2, 24), jnp.int32))
    assert np.abs(of_device[0, 2] - everyone[0, 2]).max() > 1e-3


@pytest.mark.slow
def test_where_all_are_near_it_is_as_with_all_groups(tiny_vit, rank_coded):
    model, images = tiny_vit(NESTED), rank_coded(2)
    make = make_of("astra", near=Near(((0, 1, 2),), 1))
    found = parallelize(model, make_mesh(3), make)(images)
    np.testing.assert_allclose(found, run_virtual(model, images, 3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("astra", "blocks"), [pytest.param(NESTED, 2, marks=pytest.mark.slow), (IDS, 1)], ids=["codes", "token ids"]
)
def test_what_is_sent(tiny_gpt2, random_text, astra, blocks):
    """The first two groups to all, the other two in two steps to the two that are near: so says the program, too."""
    model, text = tiny_gpt2(astra), random_text(24)
    sent = messages(model, 4, text, make_of("astra", near=ONE_SLOW))  # compares with the compiled program
    codes = [(m.kind, m.bits, m.times) for m in sent if m.in_blocks]
    assert codes == [("all-gather", 6 * 2 * 4, blocks), ("collective-permute", 6 * 2 * 4, 2 * blocks)]


def test_only_bytes_cross_the_link(tiny_vit, rank_coded):
    program = parallelize(tiny_vit(NESTED), make_mesh(4), make_of("astra", near=TWO_HOMES))
    *codes, pooled = collectives_in(program.lower(rank_coded(1)).compile().as_text())
    assert sorted((c.kind, c.dtype, c.trip_count) for c in codes) == [
        ("all-gather", "u8", 2),
        ("collective-permute", "u8", 2),
    ]
    assert pooled.kind == "all-reduce"


@pytest.mark.slow
@pytest.mark.parametrize("astra", [NESTED, IDS], ids=["codes", "token ids"])
def test_a_text_goes_on(tiny_gpt2, random_text, astra):
    """What the last device has of the others, near and far, is what it goes on from."""
    near, text = Near(((1, 2),), 1), random_text(23, 1, 7)
    model = tiny_gpt2(astra)
    generator = Generator(model, make_mesh(3), True, make_of("astra", near=near))
    new = tokens(generator, text, Sampling(temperature=3.0))
    expected = recompute(model, text, new, 3, near)
    np.testing.assert_allclose(decode(generator, text, new), expected, rtol=1e-5, atol=1e-5)
