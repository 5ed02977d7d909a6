"""Language models of transformers that ours are compared with: which, module by module, and on what."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

from astra_jax.inputs.token_batches import Text
from astra_jax.strategies.base import Single

V, T, PAD = 61, 24, 60

BASE: dict[str, dict[str, Any]] = {
    "gpt2": {"n_positions": 96, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "llama": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 96,
    },
    "bert": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 40,
    },
}


def rope(**parameters: Any) -> dict[str, Any]:
    """A Llama whose heads are wide enough for frequencies of every kind."""
    return {"head_dim": 16, "rope_parameters": {"rope_theta": 10000.0, **parameters}}


LLAMA3 = rope(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}

# Name -> Hugging Face class and what differs from the base. ViTs have the other activations.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt2, untied": ("GPT2LMHeadModel", {"tie_word_embeddings": False}),
    "gpt2, n_inner": ("GPT2LMHeadModel", {"n_inner": 20, "n_layer": 1}),
    "gpt2, gelu": ("GPT2LMHeadModel", {"activation_function": "gelu"}),
    "gpt2, gelu_pytorch_tanh": ("GPT2LMHeadModel", {"activation_function": "gelu_pytorch_tanh"}),
    "gpt2, epsilon": ("GPT2LMHeadModel", {"layer_norm_epsilon": 1e-2}),
    "gpt2, one head": ("GPT2LMHeadModel", {"n_head": 1, "n_embd": 20}),
    "gpt2, classes": ("GPT2ForSequenceClassification", {"num_labels": 5, "pad_token_id": PAD}),
    "llama": ("LlamaForCausalLM", {}),
    "llama, tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama, no groups": ("LlamaForCausalLM", {"num_key_value_heads": None}),
    "llama, one key head": ("LlamaForCausalLM", {"num_key_value_heads": 1}),
    "llama, wide heads": ("LlamaForCausalLM", {"head_dim": 12}),
    "llama, biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama, gelu": ("LlamaForCausalLM", {"hidden_act": "gelu"}),
    "llama, epsilon": ("LlamaForCausalLM", {"rms_norm_eps": 1e-2}),
    "llama, theta": ("LlamaForCausalLM", rope(rope_type="default", rope_theta=500.0)),
    "llama, linear": ("LlamaForCausalLM", rope(rope_type="linear", factor=3.0)),
    "llama, dynamic": ("LlamaForCausalLM", rope(rope_type="dynamic", factor=3.0)),
    "llama, llama3": ("LlamaForCausalLM", LLAMA3),
    "llama, yarn": ("LlamaForCausalLM", rope(**YARN)),
    "llama, yarn, factor of attention": ("LlamaForCausalLM", rope(**YARN, attention_factor=1.3)),
    "llama, yarn, mscale": ("LlamaForCausalLM", rope(**YARN, mscale=0.7, mscale_all_dim=1.5)),
    "llama, yarn, ramp": ("LlamaForCausalLM", rope(**YARN, beta_fast=8.0, beta_slow=2.0, truncate=False)),
    "llama, classes": ("LlamaForSequenceClassification", {"num_labels": 5, "pad_token_id": PAD}),
    "bert": ("BertModel", {}),
    "bert, relu": ("BertModel", {"hidden_act": "relu"}),
    "bert, epsilon": ("BertModel", {"layer_norm_eps": 1e-2}),
    "bert, one head": ("BertModel", {"num_attention_heads": 1, "num_hidden_layers": 1}),
    "bert, classes": ("BertForSequenceClassification", {"num_labels": 5}),
}


class Theirs(NamedTuple):
    """What a module of ours stands for: from the input of one of their modules to the output of one."""

    given: str
    expected: str
    third: int | None = None  # of the output, where it is several side by side


def same(name: str, third: int | None = None) -> Theirs:
    return Theirs(name, name, third)


# Our module of a block (the block itself is empty) -> theirs, within their block.
MODULES: dict[str, tuple[str, dict[str, Theirs]]] = {
    "gpt2": (
        "transformer.h.{l}",
        {
            "norm1": same(".ln_1"),
            "attention.q": same(".attn.c_attn", 0),
            "attention.k": same(".attn.c_attn", 1),
            "attention.v": same(".attn.c_attn", 2),
            "attention.o": same(".attn.c_proj"),
            "attention": same(".attn"),
            "norm2": same(".ln_2"),
            "mlp": same(".mlp"),
            "": same(""),
        },
    ),
    "llama": (
        "model.layers.{l}",
        {
            "norm1": same(".input_layernorm"),
            "attention.q": same(".self_attn.q_proj"),
            "attention.k": same(".self_attn.k_proj"),
            "attention.v": same(".self_attn.v_proj"),
            "attention.o": same(".self_attn.o_proj"),
            "attention": same(".self_attn"),
            "norm2": same(".post_attention_layernorm"),
            "mlp": same(".mlp"),
            "": same(""),
        },
    ),
    "bert": (
        "encoder.layer.{l}",
        {
            "attention.q": same(".attention.self.query"),
            "attention.k": same(".attention.self.key"),
            "attention.v": same(".attention.self.value"),
            "attention.o": same(".attention.output.dense"),
            "attention": Theirs("", ".attention.output.dense"),
            "norm1": same(".attention.output.LayerNorm"),
            "mlp": Theirs(".intermediate.dense", ".output.dense"),
            "norm2": same(".output.LayerNorm"),
            "": same(""),
        },
    ),
}


def torch_model(name: str, randomised: Callable[[Any], Any], **more: Any) -> Any:
    """A tiny random model of transformers."""
    architecture, options = VARIANTS[name]
    cls, family = getattr(transformers, architecture), name.split(",")[0]
    options = {"vocab_size": V, "initializer_range": 0.1, **BASE[family], **options, **more}
    return randomised(cls(cls.config_class(**options, attn_implementation="eager")))


def batch(lengths: tuple[int, ...]) -> Text:
    """Random sequences of these lengths, padded to T."""
    ids = np.random.default_rng(1).integers(0, PAD, (len(lengths), T)).astype(np.int32)
    return Text(np.where(np.arange(T) < np.array(lengths)[:, None], ids, PAD), np.array(lengths, np.int32))


def to_torch(text: Text) -> dict[str, torch.Tensor]:
    mask = np.arange(T) < np.asarray(text.lengths)[:, None]
    return {"input_ids": torch.tensor(np.asarray(text.ids)).long(), "attention_mask": torch.tensor(mask).long()}


@nnx.jit
def run(model: Any, text: Text) -> jax.Array:
    """The output of a model on one device."""
    shards = model.shards(1, text)
    return model(shards.scatter(model.to_tokens(text)), Single(shards))[0]


def recorded(model: Any, text: Text) -> tuple[Any, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """The output of a torch model, and what went into every one of its modules and came out of it."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def hook(name: str) -> Any:
        def keep(_: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
            given = args[0] if args else kwargs.get("hidden_states")
            seen[name] = given, out[0] if isinstance(out, tuple) else out

        return keep

    handles = [m.register_forward_hook(hook(n), with_kwargs=True) for n, m in model.named_modules()]
    with torch.no_grad():
        out = model(**to_torch(text))
    for handle in handles:
        handle.remove()
    return out, seen


def jnp_of(tensor: torch.Tensor) -> jax.Array:
    return jnp.asarray(tensor.detach().numpy())
