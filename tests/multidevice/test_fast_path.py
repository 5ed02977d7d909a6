"""ASTRA with tables on a mesh computes what the plain form does on one device's virtual shards, and sends the same."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from astra_jax.codecs.config import NestedPQConfig, VQConfig
from astra_jax.mesh.sharding import make_mesh
from astra_jax.models.gpt2 import GPT2
from astra_jax.serving.compile import parallelize
from astra_jax.serving.generate import Generator
from astra_jax.serving.sampling import Sampling
from astra_jax.strategies.coded import Astra, AstraPlain
from eval.cost.hlo import collectives_in
from tests.helpers.sharded import check, decode, tokens


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """It pays also for models as small as those of tests."""
    monkeypatch.setattr("astra_jax.models.key_value_tables.folding_pays", lambda *_: True)


TABLES, COUNTS = VQConfig(groups=4, codewords=16), VQConfig(groups=1, codewords=4)  # 4 are fewer than tokens
ROTATED = NestedPQConfig(groups=3, codewords=16, widths=(8, 2, 5), levels=(1, 2))
KV = dict(site="kv")


@pytest.mark.parametrize(
    ("astra", "N"),
    [
        (TABLES, 3),
        (COUNTS, 4),
        (ROTATED, 4),
        pytest.param(dataclasses.replace(COUNTS, class_token="single"), 8, marks=pytest.mark.slow),
        pytest.param(dataclasses.replace(COUNTS, **KV), 5, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_images(tiny_vit, rank_coded, astra, N):
    check(tiny_vit(astra), rank_coded(2), N)


@pytest.mark.parametrize(
    ("family", "options", "astra", "N", "data"),
    [
        pytest.param("tiny_gpt2", {}, TABLES, 3, 2, marks=pytest.mark.slow),
        ("tiny_gpt2", {}, dataclasses.replace(COUNTS, **KV), 2, 1),
        ("tiny_llama", {}, COUNTS, 4, 2),
        pytest.param("tiny_bert", {"pooling": "mean"}, COUNTS, 4, 2, marks=pytest.mark.slow),
        ("tiny_bert", {"pooling": "class"}, dataclasses.replace(COUNTS, class_token="single"), 3, 1),
        pytest.param("tiny_mpnet", {}, COUNTS, 3, 1, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_texts(request, random_text, family, options, astra, N, data):
    """Of different lengths, so that some shards are empty."""
    check(request.getfixturevalue(family)(astra, **options), random_text(23, 1, 2, 7, 24), N, data)


@pytest.mark.parametrize("family", ["tiny_gpt2", pytest.param("tiny_llama", marks=pytest.mark.slow)])
def test_a_text_goes_on_in_the_same_way(request, random_text, family):
    model, text = request.getfixturevalue(family)(COUNTS), random_text(23, 1, 2, 7)
    fast, plain = (Generator(model, make_mesh(2, 2), strategy.of) for strategy in (Astra, AstraPlain))
    new = tokens(plain, text, Sampling(temperature=3.0))
    np.testing.assert_array_equal(tokens(fast, text, Sampling(temperature=3.0)), new)
    np.testing.assert_allclose(decode(fast, text, new), decode(plain, text, new), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("astra", [TABLES, COUNTS], ids=str)
def test_the_same_codes_cross_the_link(tiny_vit, rank_coded, astra):
    model, mesh = tiny_vit(astra), make_mesh(4)
    fast, plain = (parallelize(model, mesh, strategy.of) for strategy in (Astra, AstraPlain))
    assert "tables" in fast.state["blocks"]["attention"] and "tables" not in plain.state["blocks"]["attention"]
    found = [collectives_in(program.lower(rank_coded(1)).compile().as_text()) for program in (fast, plain)]
    assert found[0] == found[1] and len(found[0]) == 2


@pytest.mark.slow
def test_bfloat16_is_no_further_from_float32_than_in_the_plain_form(tiny_gpt2, random_text):
    """A table is a product in float32 that is rounded once: an error of 1 % of the output's rms, 3 % allowed."""
    model, text, mesh = tiny_gpt2(COUNTS), random_text(24, 20), make_mesh(4)
    half = nnx.eval_shape(lambda: GPT2(model.config, COUNTS, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    half = nnx.merge(nnx.graphdef(half), nnx.state(model))
    exact = parallelize(model, mesh, AstraPlain.of)(text)
    for strategy in (Astra, AstraPlain):
        off = parallelize(half, mesh, strategy.of)(text) - exact
        assert 0 < jnp.sqrt(jnp.mean(off**2)) < 0.03 * jnp.sqrt(jnp.mean(exact**2))
