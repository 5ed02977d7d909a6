"""The tables of keys: every parameter is named once, in the shape that Hugging Face writes it."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from checkpoints import configs
from checkpoints.families.rows import Key
from checkpoints.info import parameters
from checkpoints.tensor_maps import FAMILIES, build, flat_state, model_tensors
from tests.helpers.folders import ASTRA, CONFIGS, VIT, each_model


@each_model
def test_the_table_names_every_parameter_once(name: str) -> None:
    family, config = CONFIGS[name]
    model = build(family, config)
    tensors, parameters, sizes = model_tensors(family, model), flat_state(model), FAMILIES[family].sizes(config)
    blocks = {path: a.shape[0] if path.startswith("blocks.") else 1 for path, a in parameters.items()}
    named = [(path, block or 0) for key, block in tensors.values() for path in key.paths]
    since = {path: key.since for key, _ in tensors.values() for path in key.paths}
    assert sorted(named) == sorted((path, block) for path, L in blocks.items() for block in range(since[path], L))
    for key, _ in tensors.values():
        ours = sum(math.prod(parameters[path].shape[1 if key.stacked else 0 :]) for path in key.paths)
        assert ours == math.prod(key.shape(sizes))


def test_patches_are_row_column_channel() -> None:
    key = next(key for key in FAMILIES["vit"].keys if key.path == "embed.kernel")
    theirs = np.random.default_rng(0).normal(size=(5, 3, 2, 4))
    image = np.random.default_rng(1).normal(size=(2, 4, 3))  # row, column, channel
    ours = np.empty((24, 5))
    key.as_theirs([ours], {"D": 5, "channel": 3, "row": 2, "column": 4})[0][...] = theirs
    np.testing.assert_allclose(image.reshape(-1) @ ours, np.einsum("rwc,dcrw->d", image, theirs))


def test_several_parameters_are_views_side_by_side() -> None:
    sizes = {"D": 4, "H": 3, "J": 2}
    ours = [np.arange(4.0 * n).reshape(4, n) + 100 * n for n in (3, 2, 2)]
    for axes, axis in (("H+J+J D", 0), ("D H+J+J", 1)):
        key = Key("c_attn.weight", axes, "q k v", "D H+J+J")
        views, joined = key.as_theirs(ours, sizes), np.concatenate(ours, axis=1)
        assert key.shape(sizes) == ((7, 4) if axis == 0 else (4, 7)) and key.shared == axis
        assert all(np.shares_memory(view, part) for view, part in zip(views, ours, strict=True))
        theirs = joined.T if axis == 0 else joined
        np.testing.assert_array_equal(np.concatenate(views, axis), theirs)
        filled = [np.zeros_like(part) for part in ours]
        for start in range(0, len(theirs), 2):  # rows that belong to two of them, too
            rows = slice(start, min(start + 2, len(theirs)))
            key.fill(key.as_theirs(filled, sizes), rows, theirs[rows])
        for part, expected in zip(filled, ours, strict=True):
            np.testing.assert_array_equal(part, expected)


def test_no_random_state_is_part_of_a_model() -> None:
    model = build("vit", VIT, ASTRA)
    assert not jax.tree.leaves(nnx.state(model, nnx.RngState))


# A large model, in shapes

LLAMA3 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
LLAMA31 = LLAMA3 | {
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}


@pytest.mark.parametrize("hf_config", [LLAMA3, LLAMA31])
def test_llama_3_8b_has_exactly_the_tensors_of_its_index(hf_config: dict[str, Any]) -> None:
    config, _ = configs.config_from_hf("llama", hf_config, Path())
    assert config.rope_parameters.rope_type == ("llama3" if hf_config is LLAMA31 else "default")
    model, sizes = build("llama", config), FAMILIES["llama"].sizes(config)
    block = {
        "input_layernorm": (4096,),
        "self_attn.q_proj": (4096, 4096),
        "self_attn.k_proj": (1024, 4096),
        "self_attn.v_proj": (1024, 4096),
        "self_attn.o_proj": (4096, 4096),
        "post_attention_layernorm": (4096,),
        "mlp.gate_proj": (14336, 4096),
        "mlp.up_proj": (14336, 4096),
        "mlp.down_proj": (4096, 14336),
    }
    index = {
        "model.embed_tokens.weight": (128256, 4096),
        "model.norm.weight": (4096,),
        "lm_head.weight": (128256, 4096),
    }
    index |= {f"model.layers.{n}.{name}.weight": shape for n in range(32) for name, shape in block.items()}
    shapes = {name: key.shape(sizes) for name, (key, _) in model_tensors("llama", model).items()}
    assert shapes == index and len(index) == 291
    assert parameters(model) == sum(map(math.prod, index.values())) == 8_030_261_248
    assert {type(a) for a in flat_state(model).values()} == {jax.ShapeDtypeStruct}  # nothing was allocated
