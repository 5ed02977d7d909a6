"""Codes that are sent in any order: the same results on every mesh, fewer bytes, and a refusal where order matters."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from astra_jax.codecs import bitpacking
from astra_jax.codecs.config import AstraConfig
from astra_jax.errors import AstraError
from astra_jax.mesh.sharding import Shards, make_mesh
from astra_jax.serving.compile import make_of, parallelize
from astra_jax.serving.generate import Generator, Sampling
from astra_jax.strategies.base import Astra
from eval.cost.hlo import collectives_in
from eval.cost.traffic import messages
from tests.multidevice.test_generation import decode, tokens
from tests.multidevice.test_sharded_equals_virtual import real, run_virtual

free = make_of("astra", "free")
FEW, MORE = AstraConfig(groups=1, codewords=8), AstraConfig(groups=1, codewords=16)
KV = dict(site="kv")


@pytest.fixture(params=[True, pytest.param(False, marks=pytest.mark.slow)], ids=["tables", "plain"])
def fast_path(request, monkeypatch):
    """With tables of codewords, which pay also for models as small as those of tests, and without."""
    monkeypatch.setattr("astra_jax.models.key_value_tables.folding_pays", lambda *_: True)
    return request.param


def check(model, inputs, N, data, fast_path):
    """Sorted codes lead where the codes of virtual shards do."""
    assert free(model, N, inputs).sorts(model.codec)
    on_mesh = parallelize(model, make_mesh(N, data), free, fast_path)(inputs)
    expected = run_virtual(model, inputs, N)
    np.testing.assert_allclose(real(model, inputs, on_mesh), real(model, inputs, expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("astra", "N"),
    [
        (FEW, 2),  # shards of 12 and 13 tokens
        (AstraConfig(groups=1, codewords=4), 5),  # all alike
        pytest.param(MORE, 3, marks=pytest.mark.slow),
        pytest.param(dataclasses.replace(FEW, **KV), 4, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_images(tiny_vit, rank_coded, fast_path, astra, N):
    check(tiny_vit(astra), rank_coded(2), N, 1, fast_path)


@pytest.mark.parametrize(
    ("family", "options", "astra", "N", "data"),
    [
        ("tiny_gpt2", {}, FEW, 4, 2),
        pytest.param("tiny_gpt2", {}, dataclasses.replace(MORE, **KV), 2, 1, marks=pytest.mark.slow),
        pytest.param("tiny_gpt2", {"task": "classification", "num_labels": 3}, FEW, 3, 2, marks=pytest.mark.slow),
        ("tiny_bert", {"pooling": "class"}, MORE, 3, 1),
        pytest.param("tiny_bert", {"pooling": "mean"}, FEW, 4, 2, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_texts(request, random_text, fast_path, family, options, astra, N, data):
    """Of different lengths: shards end with different numbers of slots without a token, and some have no others."""
    check(request.getfixturevalue(family)(astra, **options), random_text(23, 1, 2, 7, 24), N, data, fast_path)


@pytest.mark.slow
def test_a_text_goes_on_in_the_same_way(tiny_gpt2, random_text, fast_path):
    model, text = tiny_gpt2(MORE), random_text(23, 1, 2, 7)
    kept = Generator(model, make_mesh(2, 2), fast_path)
    new = tokens(kept, text, Sampling(temperature=3.0))
    expected = decode(kept, text, new)
    generator = Generator(model, make_mesh(2, 2), fast_path, free)
    np.testing.assert_allclose(decode(generator, text, new), expected, rtol=1e-5, atol=1e-5)
    codes = generator.prefill(text, 1)[1].codes
    assert codes.shape == (2, 4, 12, 1) and (np.diff(codes[..., 0], axis=-1) >= 0).all()
    (gather,) = collectives_in(generator._prefill.lower(generator.state, text).compile().as_text())
    assert gather.bytes == 2 * 2 * bitpacking.multiset_bytes(12, 16)


@pytest.mark.parametrize(("family", "N", "S"), [("tiny_vit", 2, 13), ("tiny_gpt2", 4, 6), ("tiny_bert", 4, 6)])
def test_only_multisets_cross_the_link(request, rank_coded, random_text, family, N, S):
    """One all-gather of bytes in every block, of as many as are predicted, and fewer than in order."""
    model = request.getfixturevalue(family)(FEW)
    inputs = rank_coded(1) if family == "tiny_vit" else random_text(23)
    gather, *pooled = collectives_in(parallelize(model, make_mesh(N), free).lower(inputs).compile().as_text())
    assert (gather.kind, gather.dtype, gather.trip_count) == ("all-gather", "u8", model.config.num_hidden_layers)
    assert gather.bytes == N * bitpacking.multiset_bytes(S, 8) < N * bitpacking.packed_bytes(S, 3)
    assert [c.kind for c in pooled] == ["all-reduce"] * (not model.per_token)
    sent, *_ = messages(model, N, inputs, free)  # compares with the compiled program
    assert sent.bits == 8 * bitpacking.multiset_bytes(S, 8)


def test_short_shards_are_sent_in_order(tiny_vit, rank_coded):
    """7 codes of 10 bits are 70 bits, and of 1024 codewords in any order 1030."""
    model = tiny_vit(AstraConfig(groups=1, codewords=1024))
    assert free(model, 4).messages(model) == Astra.of(model, 4).messages(model)
    found = [
        collectives_in(parallelize(model, make_mesh(4), make).lower(rank_coded(1)).compile().as_text())
        for make in (free, Astra.of)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("family", "astra", "reason"),
    [
        ("tiny_vit", AstraConfig(groups=4, codewords=8), "4 groups"),
        ("tiny_llama", FEW, "a rotary embedding"),
        ("tiny_gpt2", dataclasses.replace(FEW, predictor="linear"), "a predictor"),
        ("tiny_vit", dataclasses.replace(FEW, class_token="single"), "a single class token"),
    ],
    ids=str,
)
def test_where_order_matters_it_is_kept(request, family, astra, reason):
    with pytest.raises(AstraError, match=f"^codes cannot be sent in any order with {reason}: keep the order"):
        parallelize(request.getfixturevalue(family)(astra), make_mesh(2), free)


@pytest.mark.parametrize("lengths", [(7, 6, 5), jnp.asarray([[7, 0, 3], [1, 2, 7]])], ids=["known", "ragged"])
def test_padding_is_behind_all_tokens(lengths):
    """What sorting padding last relies on: slots with a token come first in what every shard sends."""
    shards = Shards(lengths, "distributed", slots=7)
    valid = np.asarray(shards.tokens().valid)[..., shards.home_slots :]
    assert (valid[..., :-1] >= valid[..., 1:]).all() and (valid.sum(-1) == np.asarray(lengths)).all()
