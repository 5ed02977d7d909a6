"""Estimates that all devices keep: the same to the last bit, the same model as on virtual shards, and what is sent."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from astra_jax.config import AstraConfig
from astra_jax.generate import Generator, Sampling
from astra_jax.models.blocks import block_at
from astra_jax.sharding import SEQ, make_mesh
from astra_jax.strategies import Astra
from eval.traffic import messages
from tests.multidevice.test_generation import decode, recompute, tokens
from tests.multidevice.test_sharded_equals_virtual import check

LINEAR = AstraConfig(groups=4, codewords=16, predictor="linear")
IDS = dataclasses.replace(LINEAR, predictor="low-rank", rank=3, side_info="token-ids")
ROTATED = dataclasses.replace(LINEAR, codec="rotated-pq", widths=(1, 2, 3, 4), predictor="diagonal")
KV = dict(site="kv")
LAYERS = {"tiny_gpt2": "n_layer"}


@pytest.mark.parametrize(
    ("family", "astra", "N"),
    [
        ("tiny_vit", LINEAR, 4),
        ("tiny_vit", dataclasses.replace(ROTATED, class_token="single"), 3),
        ("tiny_gpt2", IDS, 4),
        ("tiny_llama", dataclasses.replace(IDS, **KV), 2),
        pytest.param("tiny_llama", ROTATED, 8, marks=pytest.mark.slow),
        pytest.param("tiny_bert", LINEAR, 3, marks=pytest.mark.slow),
        pytest.param("tiny_gpt2", dataclasses.replace(ROTATED, side_info="token-ids"), 3, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_it_is_the_same_model_as_on_virtual_shards(request, rank_coded, random_text, family, astra, N):
    """Texts of different lengths, some shards empty; three blocks, so that estimates build on each other."""
    model = request.getfixturevalue(family)(astra, **{LAYERS.get(family, "num_hidden_layers"): 3})
    check(model, rank_coded(2) if family == "tiny_vit" else random_text(23, 1, 2, 7, 24), N)


def test_every_device_has_the_same_estimates_to_the_last_bit(tiny_gpt2, random_text):
    model, text, mesh = tiny_gpt2(LINEAR, n_layer=3), random_text(24, 20), make_mesh(4)
    y = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 24, 16)), jnp.float32)
    states = [nnx.split(block_at(model.blocks, n).attention.codec) for n in range(3)]
    strategy = Astra(model.shards(4, text))

    def one_device(y):
        carry, found = strategy.start(model.codec, None), []
        for block, parts in zip(y, states, strict=True):
            _, carry, _ = strategy.exchange(nnx.merge(*parts), block, carry, 0)
            found.append(carry)
        return jnp.stack(found)[None]

    run = jax.shard_map(one_device, mesh=mesh, in_specs=P(None, None, SEQ), out_specs=P(SEQ), check_vma=False)
    of_device = np.asarray(jax.jit(run)(y))  # [device,L,N,B,S,W]
    assert of_device.shape == (4, 3, 4, 2, 6, 16)
    np.testing.assert_array_equal(of_device, np.broadcast_to(of_device[:1], of_device.shape))
    assert np.abs(of_device[0, 2]).max() > 0


@pytest.mark.parametrize("astra", [LINEAR, IDS], ids=["linear", "token ids"])
def test_what_is_sent(tiny_gpt2, random_text, astra):
    """With token ids the first block sends none; `messages` itself compares with the compiled program."""
    model = tiny_gpt2(astra, n_layer=3)
    sent = messages(model, 4, random_text(24), Astra.of)
    codes = 8 * 6 * 4 * 4 // 8
    if astra.side_info == "none":
        assert [(m.bits, m.times) for m in sent] == [(codes, 3)]
    else:
        assert [(m.bits, m.times, m.in_blocks) for m in sent] == [(6 * 16, 1, False), (codes, 2, True)]


@pytest.mark.parametrize(("family", "astra"), [("tiny_gpt2", IDS), ("tiny_llama", dataclasses.replace(ROTATED, **KV))])
def test_text_goes_on_from_estimates(request, random_text, family, astra):
    model, text = request.getfixturevalue(family)(astra), random_text(23, 1, 2, 7)
    generator = Generator(model, make_mesh(4))
    new = tokens(generator, text, Sampling(temperature=3.0))
    np.testing.assert_allclose(decode(generator, text, new), recompute(model, text, new, 4), rtol=1e-5, atol=1e-5)
