"""GPT-2, Llama and BERT: what their configurations refuse, and shapes. Their numbers are compared in tests/parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from astra_jax.codecs.config import VQConfig
from astra_jax.errors import AstraError
from astra_jax.models.bert import Bert, BertConfig
from astra_jax.models.gpt2 import GPT2, GPT2Config
from astra_jax.models.llama import Llama, LlamaConfig
from astra_jax.strategies.base import Single
from eval.cost.presets import LLAMA_3_8B

WHOLE = "it must be a whole number of at least 1"


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("config", "wrong", "message"),
    [
        (GPT2Config, {"n_layer": 0}, f"n_layer is 0; {WHOLE}"),
        (GPT2Config, {"n_positions": 1024.5}, f"n_positions is 1024.5; {WHOLE}"),
        (GPT2Config, {"n_inner": -1}, f"n_inner is -1; {WHOLE}"),
        (GPT2Config, {"vocab_size": None}, f"vocab_size is None; {WHOLE}"),
        (GPT2Config, {"n_layer": 10**9}, "n_layer is 1000000000; it must be a whole number of at most 10,000"),
        (
            GPT2Config,
            {"layer_norm_epsilon": float("nan")},
            "layer_norm_epsilon is nan; it must be a number from 0 to 1",
        ),
        (LlamaConfig, {"vocab_size": 10**9}, "vocab_size is 1000000000; it must be a whole number of at most"),
        (LlamaConfig, {"rms_norm_eps": float("inf")}, "rms_norm_eps is inf; it must be a number from 0 to 1"),
        (BertConfig, {"layer_norm_eps": -1e-12}, "layer_norm_eps is -1e-12; it must be a number from 0 to 1"),
        (
            BertConfig,
            {"max_seq_length": 10**12},
            "max_seq_length is 1000000000000; it must be a whole number of at most",
        ),
        (GPT2Config, {"n_head": 7}, "n_embd 768 is not a multiple of n_head 7"),
        (GPT2Config, {"activation_function": "mish"}, "activation_function is 'mish'; known are gelu, gelu_new"),
        (LlamaConfig, {"num_hidden_layers": "32"}, f"num_hidden_layers is '32'; {WHOLE}"),
        (LlamaConfig, {"num_key_value_heads": 5}, "num_attention_heads 32 is not a multiple of num_key_value_heads 5"),
        (LlamaConfig, {"num_key_value_heads": 0}, f"num_key_value_heads is 0; {WHOLE}"),
        (LlamaConfig, {"hidden_size": 4097}, "hidden_size 4097 is not a multiple of num_attention_heads 32"),
        (LlamaConfig, {"hidden_act": "swish"}, "hidden_act is 'swish'; known are"),
        (BertConfig, {"type_vocab_size": 0}, f"type_vocab_size is 0; {WHOLE}"),
        (BertConfig, {"num_attention_heads": 5}, "hidden_size 768 is not a multiple of num_attention_heads 5"),
        (BertConfig, {"task": "classification"}, "a BERT classifier reads the class token through a pooler"),
        (BertConfig, {"task": "classification", "pooling": "class", "pooler": False}, "which is missing"),
        (BertConfig, {"pooling": "max"}, "pooling is 'max'; it must be one of class, mean, last"),
        (BertConfig, {"task": "causal-lm"}, "task is 'causal-lm'; it must be one of classification, embedding"),
        (GPT2Config, {"task": "embedding"}, "task is 'embedding'; it must be one of causal-lm, classification"),
        (LlamaConfig, {"task": "embedding"}, "task is 'embedding'; it must be one of causal-lm, classification"),
    ],
)
def test_a_config_that_cannot_be(config, wrong, message):
    with pytest.raises(AstraError) as raised:
        config(**wrong)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("family", "config", "parameters"),
    [
        (GPT2, GPT2Config(), 124_439_808),
        (Llama, LLAMA_3_8B, 8_030_261_248),
        (Bert, BertConfig(), 109_482_240),
    ],
)
def test_the_sizes_of_known_models_without_their_weights(family, config, parameters):
    model = nnx.eval_shape(lambda: family(config, rngs=nnx.Rngs(0)))
    assert sum(a.size for a in jax.tree.leaves(nnx.state(model, nnx.Param))) == parameters
    assert model.codec is None


def test_what_is_quantized():
    """The block's input, or keys and values of the heads that there are."""
    for site, width in (("hidden", 4096), ("kv", 2 * 8 * 128)):
        astra = VQConfig(groups=32, codewords=16, site=site)
        model = nnx.eval_shape(lambda astra=astra: Llama(LLAMA_3_8B, astra, rngs=nnx.Rngs(0)))
        assert model.codec.codebook.shape == (32, 32, 16, width // 32)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_its_own_or_the_embedding(tiny_gpt2, random_text, tied):
    model, text = tiny_gpt2(tie_word_embeddings=tied), random_text(5)
    assert (model.head is None) == tied
    strategy = Single(model.shards(1, text))
    states = model.states(model.to_tokens(text), strategy)[0]
    table = model.embed.embedding[...].T if tied else model.head.kernel[...]
    np.testing.assert_allclose(model(model.to_tokens(text), strategy)[0], states @ table, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "options", "per_token", "shape"),
    [
        ("tiny_gpt2", {}, True, (2, 24, 50)),
        ("tiny_gpt2", {"task": "classification", "num_labels": 3}, False, (2, 3)),
        ("tiny_llama", {"head_dim": 6}, True, (2, 24, 50)),
        ("tiny_llama", {"task": "classification", "num_key_value_heads": None}, False, (2, 2)),
        ("tiny_bert", {"pooler": False}, False, (2, 16)),
        ("tiny_bert", {"pooling": "last", "normalize": True}, False, (2, 16)),
        ("tiny_bert", {"pooling": "class", "task": "classification", "num_labels": 3}, False, (2, 3)),
    ],
)
def test_outputs_are_float32_whatever_the_model_computes_in(request, random_text, family, options, per_token, shape):
    model = request.getfixturevalue(family)(**options)
    text = random_text(24, 3)
    half = nnx.eval_shape(lambda: type(model)(model.config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    weights = nnx.state(model)
    assert model.per_token == per_token

    def run(graphdef, weights):
        model = nnx.merge(graphdef, weights)
        shards = model.shards(1, text)
        return model(shards.scatter(model.to_tokens(text)), Single(shards))[0]

    full, low = (jax.jit(run, static_argnums=0)(nnx.graphdef(m), weights) for m in (model, half))
    assert (full.shape, low.shape, full.dtype, low.dtype) == (shape, shape, jnp.float32, jnp.float32)
    real = np.arange(24) < text.lengths[:, None] if per_token else ...
    scale = np.abs(full[real]).max()
    assert 0 < np.abs(full - low)[real].max() < 0.15 * scale
    if options.get("normalize"):
        np.testing.assert_allclose(np.linalg.norm(full, axis=-1), 1, rtol=1e-6)


def test_the_greatest_length_is_split_where_no_text_is_given(tiny_gpt2, tiny_bert, tiny_roberta):
    assert tiny_gpt2().shards(3).lengths == (21, 21, 22)
    assert tiny_gpt2().shards(3).causal
    assert tiny_bert().shards(3).lengths == (21, 21, 22)
    assert not tiny_bert().shards(3).causal
    assert tiny_roberta().shards(3).lengths == (21, 21, 22)  # four rows of its table are no token's
    split = tiny_bert(pooling="class").shards(4)  # the class token is not among the tokens
    assert (split.lengths, split.class_token) == ((15, 16, 16, 16), "distributed")
    single = tiny_bert(VQConfig(groups=4, codewords=16, class_token="single"), pooling="class")
    assert single.shards(4).class_token == "single"
