"""Tiny models of every family with random weights."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from astra_jax.codecs.config import AstraConfig

TINY_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 20,
    "patch_size": 4,
    "num_channels": 1,
    "num_labels": 5,
}

TINY_DINOV2 = {
    **{name: value for name, value in TINY_VIT.items() if name != "intermediate_size"},
    "mlp_ratio": 2,
    "num_register_tokens": 3,
}

TINY_GPT2 = {"vocab_size": 50, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24}

TINY_BERT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}

TINY_ROBERTA = {**TINY_BERT, "type_vocab_size": 1, "pad_token_id": 3, "max_position_embeddings": 68}

TINY_DISTILBERT = {
    "vocab_size": 50,
    "dim": 16,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 24,
    "max_position_embeddings": 64,
}

TINY_MPNET = {**TINY_BERT, "max_position_embeddings": 66}

TINY_LLAMA = {**TINY_BERT, "num_key_value_heads": 2}

WINDOW = 5
TINY_GEMMA3 = {
    **TINY_LLAMA,
    "head_dim": 4,
    "sliding_window": WINDOW,
    "layer_types": ("sliding_attention", "full_attention"),
}


def draw(module: Callable[..., nnx.Module], *args: Any, **options: Any) -> Any:
    """A module whose variables are all random, also those that start as 0 or 1 and would hide a mistake.

    They are drawn by numpy, because XLA takes ten seconds to compile the initialisation of a model.
    """
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: module(*args, **options, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def fill(path: tuple, variable: jax.ShapeDtypeStruct) -> jax.Array:
        name, values = jax.tree_util.keystr(path), rng.normal(size=variable.shape)
        if "kernel" in name:
            values /= np.sqrt(variable.shape[-2])
        elif "residual_var" in name:
            values **= 2
        return jnp.asarray(values.astype(variable.dtype))  # by numpy: jax compiles a program for every shape

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(fill, shapes))


def maker(family: Callable[..., nnx.Module], config: Callable[..., Any], tiny: dict[str, Any]) -> Callable[..., Any]:
    """A function from an AstraConfig, and from values of the configuration other than `tiny`, to a model."""

    @functools.cache
    def drawn(config: Any, astra: AstraConfig | None) -> nnx.Module:
        return draw(family, config, astra)

    return lambda astra=None, **overrides: nnx.clone(drawn(config(**{**tiny, **overrides}), astra))
