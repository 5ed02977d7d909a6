"""Low-rank adaptation: what is trained, and what becomes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from astra_jax.codecs.config import VQConfig
from astra_jax.errors import AstraError
from astra_jax.strategies.coded import Astra
from tests.helpers.training import finetune
from train.loop import Training, make_step, start
from train.lora import Lora, add, linears, merge_into

CODES = VQConfig(groups=4, codewords=16)
TRAINING = Training(steps=4, batch_size=2, shards=(2,), trains="lora", learning_rate=1e-2, warmup=0.0)


@nnx.jit
def logits(model, text):
    shards = model.shards(2, text)
    return model(shards.scatter(model.to_tokens(text)), Astra.virtual(shards))[0]


@pytest.fixture(scope="module")
def trained(tiny_llama, random_text):
    """A model with trained adapters, and what it was before it had any."""
    before, model, text = tiny_llama(CODES), tiny_llama(CODES), random_text(24, 20)
    assert add(model, Lora(rank=3), 0) == 7
    np.testing.assert_array_equal(logits(model, text), logits(before, text))  # at first they add nothing
    graphdef, frozen, state = start(model, TRAINING)
    step, losses = make_step(graphdef, TRAINING, 2), []
    for _ in range(12):
        state, metrics = step(state, frozen, {"input": text})
        losses.append(metrics["loss"])
    assert losses[-1] < losses[0]
    return before, nnx.merge(graphdef, state.params, frozen, state.codecs), text


def test_adapters_alone_are_trained(trained):
    before, after, _ = trained
    adapters = nnx.state(after, nnx.LoRAParam)
    assert len(jax.tree.leaves(adapters)) == 14
    assert all(np.abs(layer.adapter.lora_b[...]).max() > 0 for _, layer in linears(after))
    others = (
        nnx.state(m, lambda path, v: isinstance(v, nnx.Param) and not isinstance(v, nnx.LoRAParam))
        for m in (before, after)
    )
    for a, b in zip(*map(jax.tree.leaves, others), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(before.codec.codebook[...], after.codec.codebook[...])


def test_merged_kernels_are_as_good(trained):
    before, after, text = trained
    merged = nnx.clone(before)
    nnx.update(merged, nnx.state(after, nnx.Not(nnx.Param)))
    assert np.abs(logits(merged, text) - logits(after, text)).max() > 1e-2
    merge_into(merged, after)
    np.testing.assert_allclose(logits(merged, text), logits(after, text), rtol=1e-4, atol=1e-5)


def test_targets(tiny_gpt2):
    model = tiny_gpt2(CODES)
    assert add(model, Lora(targets=("attention.q", "*.v")), 0) == 2
    found = [name for name, layer in linears(model) if layer.adapter is not None]
    assert found == ["attention.q", "attention.v"]
    layers = "attention.k, attention.o, attention.q, attention.v, mlp.down, mlp.up"
    with pytest.raises(AstraError) as error:
        add(model, Lora(targets=("attention.*", "q_proj")), 0)
    assert str(error.value) == f"--targets q_proj is no layer of this model: it has {layers}"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "--rank is 0; it must be at least 1"),
        ({"alpha": 0.0}, "--alpha is 0.0; it must be above 0: try 32"),
    ],
)
def test_settings_out_of_range(values, message):
    with pytest.raises(AstraError, match=message):
        Lora(**values)


def test_what_would_do_nothing_is_refused():
    Lora().check("all")
    Lora(rank=4).check("lora")
    with pytest.raises(AstraError, match="--rank, --alpha and --targets are for --trains lora, and not for codebooks"):
        Lora(rank=4).check("codebooks")


def test_the_verb(tmp_path, tiny_gpt2, word_tokenizer, capsys):
    """On four devices in bfloat16; the checkpoint is that of a model without adapters, in float32."""
    model = tiny_gpt2(CODES)
    options = "--trains lora --rank 2 --targets attention.* --dtype bfloat16 --devices 4 --remat block"
    tuned = finetune(tmp_path, model, word_tokenizer(40), options)
    assert "4 layers of every block have an adapter of rank 2" in capsys.readouterr().out
    assert tuned.history[-1]["lora"] == {"rank": 2, "alpha": 32.0, "targets": ["attention.*"]}
    parameters = jax.tree_util.tree_leaves_with_path(nnx.state(model, nnx.Param))
    for (path, before), after in zip(parameters, jax.tree.leaves(nnx.state(tuned.model, nnx.Param)), strict=True):
        name = jax.tree_util.keystr(path)
        adapted = "attention" in name and "kernel" in name
        assert after.dtype == jnp.float32 and np.array_equal(before, after) != adapted, name
