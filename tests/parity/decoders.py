"""Decoders of transformers that ours are compared with: which, and module by module."""

from typing import Any

from tests.parity.theirs import PAD, Theirs, same

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
}

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
}

# The norm behind the blocks.
LAST_NORM = {"gpt2": "transformer.ln_f", "llama": "model.norm"}
