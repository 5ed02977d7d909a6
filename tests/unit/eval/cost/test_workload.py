"""What is benchmarked: architectures by name, checkpoints, and how long their inputs are."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import checkpoints
from astra_jax.codecs.config import VQConfig
from astra_jax.errors import AstraError
from astra_jax.serving.compile import STRATEGIES
from eval.cost.cost import check_split
from eval.cost.presets import PRESETS
from eval.cost.workload import ONE, Setting, open_workload, settings
from eval.network.devices import Devices


def saved(folder, family, model, astra=None):
    """A checkpoint of a model in a folder."""
    checkpoint = checkpoints.Checkpoint(
        family=family,
        config=model.config,
        astra=astra,
        labels=None,
        preprocessing=None,
        hf_config={},
        dtype="float32",
        history=(),
        model=model,
    )
    checkpoints.save(folder, checkpoint)
    return str(folder)


def opened(name, tokens=None, site=None):
    return open_workload(name, tokens, site, "float32")


def test_settings():
    assert settings(("single", "astra", "bp-sp", "tp"), 4, (1, 16), (1, 2)) == [
        ONE,
        Setting("astra", 4, groups=1),
        Setting("astra", 4, groups=16),
        Setting("bp-sp", 4, exchanges=1),
        Setting("bp-sp", 4, exchanges=2),
        Setting("tp", 4),
    ]
    assert [str(way) for way in settings(("single", "astra", "bp-ag"), 2, (8,), (3,))] == [
        "single",
        "astra G=8",
        "bp-ag Nb=3",
    ]
    with pytest.raises(AstraError, match="no strategy 'voltage'; known are single, astra"):
        settings(("voltage",), 4, (1,), (1,))


def test_settings_of_the_plain_form():
    """It has the same as ASTRA."""
    both = settings(("single", "astra", "astra-plain", "sp"), 4, (1, 16), (1,), ("vq",))
    assert [str(way) for way in both] == [
        "single",
        "astra vq G=1",
        "astra vq G=16",
        "astra-plain vq G=1",
        "astra-plain vq G=16",
        "sp",
    ]


@pytest.mark.parametrize("name", PRESETS)
def test_a_known_architecture_takes_1024_tokens(name):
    """In every strategy, on 4 devices; nothing is computed."""
    work = opened(name)
    assert work.T == 1024 and work.checkpoint is None
    model = work.abstract(1)
    assert model.to_tokens(work.inputs()).shape[1] == 1024
    ways = settings(tuple(STRATEGIES), 4, (32,), (1,))
    for way in [way for way in ways if way.strategy != "tp" or model.blocks.attention.J % 4 == 0]:
        way.make(work.abstract(way.groups), way.N, work.inputs())
    assert STRATEGIES["astra"].of(model, 4, work.inputs()).shards.S == 256


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("vit-base", 86.6e6),
        ("vit-large", 304.3e6),
        ("bert-base", 109.5e6),
        ("gpt2-s", 124.4e6),
        ("gpt2-m", 354.8e6),
        ("llama-3-8b", 8.03e9),
        ("qwen3-0.6b", 596e6),
        ("qwen3-8b", 8.19e9),
        ("gemma-3-1b", 999.9e6),
        ("gemma-3-4b", 3.88e9),
        ("mistral-7b", 7.248e9),
        ("phi-4-mini", 3.836e9),
        ("smollm3-3b", 3.075e9),
        ("xlm-r-base", 278e6),
        ("modernbert-base", 149e6),
        ("dinov2-base", 86.6e6),
        ("siglip-base", 92.9e6),
    ],
)
def test_a_known_architecture_has_the_published_size(name, parameters):
    """At the length for which each was published; ViTs with 1,000 classes, BERT without its pooler's 0.6 million."""
    tokens = {"vit": 196, "bert": 511, "xlm-roberta": 511, "dinov2": 37**2, "siglip_vision_model": 196}.get(
        PRESETS[name][0]
    )
    params = nnx.state(opened(name, tokens).abstract(None), nnx.Param)
    assert sum(a.size for a in jax.tree.leaves(params)) == pytest.approx(parameters, rel=0.01)


def test_an_image_has_a_square_number_of_patches():
    work = opened("vit-base", 256)
    assert work.T == work.config.num_patches == 256 and work.inputs().shape == (1, 256, 256, 3)
    with pytest.raises(AstraError, match="--tokens is 1000; .* try 961 or 1024"):
        opened("vit-base", 1000)


def test_a_model_of_text_takes_what_its_positions_allow():
    assert opened("gpt2-s", 1000).inputs().ids.shape == (1, 1000)
    with pytest.raises(AstraError, match="--tokens is 1025; gpt2-s takes at most 1024"):
        opened("gpt2-s", 1025)
    with pytest.raises(AstraError, match="--tokens is 0; it must be at least 1"):
        opened("gpt2-s", 0)
    assert opened("llama-3-8b", 8192).T == 8192


def test_a_checkpoint_is_as_long_as_it_is(tmp_path, tiny_vit, tiny_gpt2, tiny_bert, tiny_roberta):
    vit = saved(tmp_path / "vit", "vit", tiny_vit(VQConfig(4, 16)), VQConfig(4, 16))
    work = opened(vit)
    assert work.T == 25 and opened(vit, 25).T == 25 and work.astra.codewords == 16 and work.astra.site == "hidden"
    assert opened(vit, site="kv").astra.site == "kv"
    with pytest.raises(AstraError, match="--tokens is 36, but images of .* have 25: leave the option out"):
        opened(vit, 36)
    gpt2 = saved(tmp_path / "gpt2", "gpt2", tiny_gpt2())
    assert opened(gpt2).T == 64 and opened(gpt2, 10).T == 10
    with pytest.raises(AstraError, match="takes at most 64"):
        opened(gpt2, 65)
    bert = opened(saved(tmp_path / "bert", "bert", tiny_bert(pooling="class")))
    assert bert.T == 63 and bert.inputs().ids.shape == (1, 64)  # a class token of its own
    roberta = saved(tmp_path / "roberta", "roberta", tiny_roberta())
    assert opened(roberta).T == 64
    with pytest.raises(AstraError, match="takes at most 64"):
        opened(roberta, 65)


def test_positions_of_a_known_bert_are_stretched(monkeypatch, tiny_bert):
    monkeypatch.setitem(PRESETS, "tiny", ("bert", tiny_bert(pooling="class").config))
    work = opened("tiny", 100)
    assert work.T == 100 and work.config.max_position_embeddings == work.inputs().ids.shape[1] == 101


def test_what_is_nothing():
    with pytest.raises(AstraError, match="vit-bsae: is no checkpoint and no preset: presets are vit-base, "):
        opened("vit-bsae")


def test_weights_of_a_checkpoint_with_other_codebooks(tmp_path, tiny_vit):
    """The weights are the checkpoint's, the codebooks random ones of another G."""
    model = tiny_vit(VQConfig(4, 16))
    work = opened(saved(tmp_path / "vit", "vit", model, VQConfig(4, 16)))
    found = work.model(work.weights(), 2)
    assert found.blocks.attention.codec.groups == 2
    for a, b in zip(*(jax.tree.leaves(nnx.state(m, nnx.Param)) for m in (found, model)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not any(isinstance(a, jax.ShapeDtypeStruct) for a in jax.tree.leaves(nnx.state(found)))
    assert work.model(work.weights(), None).blocks.attention.codec is None


def test_random_weights_have_the_precision_that_is_asked_for(monkeypatch, tiny_gpt2):
    monkeypatch.setitem(PRESETS, "tiny", ("gpt2", tiny_gpt2().config))
    work = open_workload("tiny", 8, None, "bfloat16")
    weights = work.weights()
    assert {a.dtype for a in jax.tree.leaves(weights)} == {jnp.dtype("bfloat16")}
    assert work.model(weights, 4).blocks.attention.codec.codebook[...].dtype == jnp.float32


def test_weights_that_do_not_fit_are_not_drawn(monkeypatch):
    pages = {"SC_PHYS_PAGES": 10**6, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    with pytest.raises(
        AstraError, match="llama-3-8b takes 32.1 GB in float32 and this machine has 4.1 GB: .*--device-p"
    ):
        opened("llama-3-8b").weights()


def test_more_devices_than_tokens(tiny_gpt2, monkeypatch):
    """Also of a text, a short one of which may leave devices without any."""
    monkeypatch.setitem(PRESETS, "tiny", ("gpt2", tiny_gpt2().config))
    work = opened("tiny", 3)
    check_split(work, [Setting("sp", 3), Setting("tp", 2)], Devices((1.0,) * 3))
    with pytest.raises(AstraError, match="3 tokens cannot be split over 4 devices: use at most 3"):
        check_split(work, [Setting("sp", 3), Setting("tp", 4)], Devices((1.0,) * 4))
    with pytest.raises(AstraError, match="strategy tp splits 2 heads"):
        check_split(work, [Setting("tp", 3)], Devices((1.0,) * 3))
