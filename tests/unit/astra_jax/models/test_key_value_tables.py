"""Keys and values of codewords computed once: the same model, where that pays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from astra_jax.codecs.config import NestedPQConfig, VQConfig
from astra_jax.mesh.sharding import make_mesh
from astra_jax.models.attention import Folded, Readout, attend, merge
from astra_jax.models.interface import Codes, Remote, Source
from astra_jax.models.key_value_tables import fold, folding_pays
from astra_jax.models.vit import ViTConfig
from astra_jax.models.weight_quantization import dequantized, quantize_weights
from astra_jax.serving.compile import place
from astra_jax.strategies.coded import Astra, AstraPlain
from astra_jax.strategies.rivals import SequenceParallel
from checkpoints.tensor_maps import build
from eval.cost.flops import flops
from eval.cost.timing import share

EXACT = dict(rtol=1e-5, atol=1e-5)
FAMILIES = ["tiny_vit", "tiny_llama"]  # attention with biases, and without, of grouped heads that turn


@pytest.fixture
def always(monkeypatch):
    """Tables pay also for models as small as those of tests."""
    monkeypatch.setattr("astra_jax.models.key_value_tables.folding_pays", lambda *_: True)


def block(model, index=0):
    """The attention of one block of a stack."""
    graphdef, state = nnx.split(model.blocks.attention)
    return nnx.merge(graphdef, jax.tree.map(lambda a: a[index], dequantized(state)))


def random_codes(attention, R, B=2):
    codec = attention.codec
    return np.random.default_rng(0).integers(0, codec.codewords, (B, R, codec.groups)).astype(np.uint16)


def plain_and_fast(model, call, number=0):
    """What `call` gives of the attention of a block, as it is and as `fold` makes it, in one program."""
    return nnx.jit(lambda model: [call(block(m, number)) for m in (model, fold(model))])(model)


def check_key_values(model, kind):
    """Those of random codes, found by tables or a readout."""

    def key_value(attention):
        seen.append(type(attention.tables))
        return attention.remote_key_value(Codes(jnp.asarray(random_codes(attention, 9))))

    seen = []
    expected, found = plain_and_fast(model, key_value, 1)
    assert seen == [type(None), kind]
    np.testing.assert_allclose(found, expected, **EXACT)


@jax.jit
def attention(query, sources):
    return merge([attend(query, source) for source in sources])


# Tables


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_the_tables_are_keys_and_values(request, always, family, groups):
    check_key_values(request.getfixturevalue(family)(VQConfig(groups=groups, codewords=16)), Folded)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantized_weights_have_the_tables_of_what_they_stand_for(tiny_vit, always, weights):
    check_key_values(quantize_weights(tiny_vit(VQConfig(groups=4, codewords=16)), weights), Folded)


ROTATED = NestedPQConfig(groups=3, codewords=16, widths=(8, 2, 5), levels=(1, 2))


@pytest.mark.parametrize("site", ["hidden", "kv"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_the_tables_of_a_rotated_codec(request, always, family, site):
    check_key_values(request.getfixturevalue(family)(dataclasses.replace(ROTATED, site=site)), Folded)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rotated_codec_without_tables_is_projected_from_its_axes(request, monkeypatch, family):
    monkeypatch.setattr("astra_jax.models.key_value_tables.folding_pays", lambda *_: False)
    check_key_values(request.getfixturevalue(family)(ROTATED), Readout)
    at_kv = request.getfixturevalue(family)(dataclasses.replace(ROTATED, site="kv"))
    assert fold(at_kv) is at_kv  # what codes stand for there are keys and values already


def test_at_site_kv_a_table_is_the_codebook(tiny_gpt2):
    model = tiny_gpt2(VQConfig(groups=1, codewords=16, site="kv"))
    np.testing.assert_array_equal(fold(model).blocks.attention.tables[...], model.codec.codebook[...])


def test_the_model_stays_as_it_is(tiny_vit, always):
    model = tiny_vit(VQConfig(groups=4, codewords=16))
    assert isinstance(fold(model).blocks.attention.tables, Folded)
    assert model.blocks.attention.tables is None


def test_shapes_stay_shapes(tiny_vit, always):
    model = nnx.eval_shape(lambda: tiny_vit(VQConfig(groups=4, codewords=16)))
    table = jax.tree.leaves(nnx.state(fold(model).blocks.attention)["tables"])[0]
    assert isinstance(table, jax.ShapeDtypeStruct) and table.shape == (2, 4, 16, 32)


# Where they pay


def vit_base(groups, site="hidden"):
    return nnx.eval_shape(lambda: build("vit", ViTConfig(), VQConfig(groups=groups, site=site), jnp.dtype("float32")))


@pytest.mark.parametrize(
    ("groups", "site", "platform", "pays"),
    [
        (1, "hidden", "cpu", True),
        (4, "hidden", "cpu", True),
        (8, "hidden", "cpu", False),  # faster, but 600 MB of tables for 340 MB of weights
        (1, "hidden", "gpu", True),
        (4, "hidden", "gpu", False),  # an accelerator projects faster than it reads
        (1, "kv", "cpu", True),  # to count codewords
        (4, "kv", "cpu", False),
    ],
)
def test_tables_are_made_where_they_pay(groups, site, platform, pays):
    model = vit_base(groups, site)
    assert folding_pays(model, platform) is pays
    assert (fold(model, platform) is not model) is pays


def test_nothing_is_gained_at_site_kv_with_a_rotary_embedding(tiny_llama):
    assert not folding_pays(tiny_llama(VQConfig(groups=1, codewords=16, site="kv")), "cpu")


def test_only_astra_on_several_devices_uses_tables(tiny_vit, always):
    model = tiny_vit(VQConfig(groups=4, codewords=16))

    def has_tables(N, make):
        return "tables" in place(model, make_mesh(N), make)[1]["blocks"]["attention"]

    assert has_tables(2, Astra.of)
    assert not has_tables(2, AstraPlain.of)
    assert not has_tables(1, Astra.of)
    assert not has_tables(2, SequenceParallel.of)


# Codewords that are counted


@given(st.data())
def test_counted_keys_are_as_good_as_repeated_ones(data):
    """Any counts, also 0, beside another source."""
    K, H, E = 5, 2, 4
    counts = np.asarray(data.draw(st.lists(st.integers(0, 3), min_size=K, max_size=K)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    query, k, v = (rng.normal(size=(1, n, H, E)).astype(np.float32) for n in (3, K, K))
    beside = Source(query, query, None)
    counted = Source(k, v, (counts > 0)[None], counts[None])
    every = np.arange(3)[:, None] < counts  # of three copies of all
    repeated = Source(np.tile(k, (1, 3, 1, 1)), np.tile(v, (1, 3, 1, 1)), every.reshape(1, -1))
    expected, found = (attention(query, [beside, source]) for source in (repeated, counted))
    np.testing.assert_allclose(found, expected, **EXACT)


@pytest.mark.parametrize("site", ["hidden", "kv"])
@pytest.mark.parametrize("masked", [False, True])
def test_codewords_are_counted_where_they_are_fewer_than_tokens(tiny_gpt2, always, site, masked):
    shapes = []

    def attended(plain):
        found = []
        for R in (3, 4, 5, 40):
            mask = jnp.asarray(np.random.default_rng(R).random((2, 1, R)) < 0.5) if masked else None
            remote = Remote(Codes(jnp.asarray(random_codes(plain, R))), jnp.arange(R), mask)
            query = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, plain.H, plain.E)), jnp.float32)
            source = plain.remote_source(remote, jnp.float32)
            shapes.append(source.key.shape[1])
            found.append(attention(query, [source]))
        return found

    expected, found = plain_and_fast(tiny_gpt2(VQConfig(groups=1, codewords=4, site=site)), attended)
    assert shapes == [3, 4, 5, 40, *(3, 4, 4, 4)]
    np.testing.assert_allclose(found, expected, **EXACT)


def test_tokens_with_a_rotary_embedding_are_not_counted(tiny_llama, always):
    def keys(attention):
        remote = Remote(Codes(jnp.asarray(random_codes(attention, 9))), jnp.arange(9), None)
        return attention.remote_source(remote, jnp.float32).key

    expected, found = plain_and_fast(tiny_llama(VQConfig(groups=1, codewords=4)), keys)
    np.testing.assert_allclose(found, expected, **EXACT)


def test_queries_that_see_different_tokens_do_not_count_codewords(tiny_gpt2, always):
    """As those of virtual shards."""
    mask = np.random.default_rng(0).random((2, 3, 9)) < 0.5

    def of_remote(attention):
        remote = Remote(Codes(jnp.asarray(random_codes(attention, 9))), jnp.arange(9), jnp.asarray(mask))
        return attention.remote_source(remote, jnp.float32)

    model = tiny_gpt2(VQConfig(groups=1, codewords=4))
    source = nnx.eval_shape(lambda: of_remote(block(fold(model))))
    assert source.key.shape[1] == 9 and source.times is None


def test_attention_to_remote_tokens_costs_the_same_for_any_number_of_them(monkeypatch):
    """FLOPs of one device of N, each with as many tokens: a block costs the same on 4 and on 16 devices."""
    config = ViTConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=1, intermediate_size=64, patch_size=4)

    def operations(N, strategy):
        model = build("vit", dataclasses.replace(config, image_size=32 * N), VQConfig(groups=1, codewords=64))
        model = nnx.eval_shape(lambda: model)
        image = jax.ShapeDtypeStruct((1, 32 * N, 32 * N, 3), jnp.float32)
        mine = share(model, N * N, image, strategy.of)
        return flops(mine.run, *mine.arguments)

    assert operations(4, Astra) == operations(2, Astra)  # 64 tokens on each of 16 devices, and of 4
    assert operations(4, AstraPlain) > operations(2, AstraPlain)
