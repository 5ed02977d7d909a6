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
SMALL = BASE["llama"]
WIDE = {**SMALL, "head_dim": 8}
LLAMA4 = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 6,
    "llama_4_scaling_beta": 0.5,
}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
BASE |= {
    "qwen2": SMALL,
    "qwen3": WIDE,
    "mistral": SMALL,
    "ministral3": WIDE | {"eos_token_id": None, "rope_parameters": LLAMA4},
    "smollm3": SMALL,
    "phi3": SMALL,
    "olmo2": SMALL,
    "gemma2": {**WIDE, "sliding_window": 5},
    "gemma3_text": {**WIDE, "sliding_window": 5},
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
    "gpt2, n_inner, gelu": ("GPT2LMHeadModel", {"n_inner": 20, "n_layer": 1, "activation_function": "gelu"}),
    "gpt2, gelu_pytorch_tanh, epsilon, one head": (
        "GPT2LMHeadModel",
        {"activation_function": "gelu_pytorch_tanh", "layer_norm_epsilon": 1e-2, "n_head": 1, "n_embd": 20},
    ),
    "gpt2, classes": ("GPT2ForSequenceClassification", {"num_labels": 5, "pad_token_id": PAD}),
    "llama": ("LlamaForCausalLM", {}),
    "llama, tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama, no groups, gelu": ("LlamaForCausalLM", {"num_key_value_heads": None, "hidden_act": "gelu"}),
    "llama, one wide key head, epsilon": (
        "LlamaForCausalLM",
        {"num_key_value_heads": 1, "head_dim": 12, "rms_norm_eps": 1e-2},
    ),
    "llama, biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama, theta": ("LlamaForCausalLM", rope(rope_type="default", rope_theta=500.0)),
    "llama, linear": ("LlamaForCausalLM", rope(rope_type="linear", factor=3.0)),
    "llama, dynamic": ("LlamaForCausalLM", rope(rope_type="dynamic", factor=3.0)),
    "llama, llama3": ("LlamaForCausalLM", LLAMA3),
    "llama, yarn": ("LlamaForCausalLM", rope(**YARN)),
    "llama, yarn, factor of attention": ("LlamaForCausalLM", rope(**YARN, attention_factor=1.3)),
    "llama, yarn, mscale": ("LlamaForCausalLM", rope(**YARN, mscale=0.7, mscale_all_dim=1.5)),
    "llama, yarn, ramp": ("LlamaForCausalLM", rope(**YARN, beta_fast=8.0, beta_slow=2.0, truncate=False)),
    "llama, classes": ("LlamaForSequenceClassification", {"num_labels": 5, "pad_token_id": PAD}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2, windows": ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2, classes": ("Qwen2ForSequenceClassification", {"num_labels": 5, "pad_token_id": PAD}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "qwen3, biases, windows": ("Qwen3ForCausalLM", {"attention_bias": True, "use_sliding_window": True, **WINDOWS}),
    "qwen3, classes": ("Qwen3ForSequenceClassification", {"num_labels": 5, "pad_token_id": PAD}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 5}),
    "mistral, no window": ("MistralForCausalLM", {"sliding_window": None, "head_dim": 12}),
    "ministral3": ("Ministral3ForCausalLM", {"sliding_window": 9}),
    "ministral3, classes": ("Ministral3ForSequenceClassification", {"num_labels": 5, "pad_token_id": PAD}),
    "mistral, classes": ("MistralForSequenceClassification", {"num_labels": 5, "pad_token_id": PAD}),
    "smollm3": ("SmolLM3ForCausalLM", {"no_rope_layer_interval": 2, "pad_token_id": PAD}),
    "smollm3, windows": (
        "SmolLM3ForCausalLM",
        {
            "no_rope_layers": [0, 1],
            "use_sliding_window": True,
            "sliding_window": 5,
            "attention_bias": True,
            "mlp_bias": True,
            "pad_token_id": PAD,
        },
    ),
    "smollm3, classes": ("SmolLM3ForSequenceClassification", {"num_labels": 5, "pad_token_id": PAD}),
    "phi3": ("Phi3ForCausalLM", {"pad_token_id": PAD}),
    "phi3, a part of a head": (
        "Phi3ForCausalLM",
        {
            "pad_token_id": PAD,
            "sliding_window": 5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
    "phi3, longrope": (
        "Phi3ForCausalLM",
        {
            "pad_token_id": PAD,
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0, 1.1, 1.5, 2.0],
                "long_factor": [1.0, 2.0, 4.0, 8.0],
            },
        },
    ),
    "phi3, classes": ("Phi3ForSequenceClassification", {"num_labels": 5, "pad_token_id": PAD}),
    "olmo2": ("Olmo2ForCausalLM", {"pad_token_id": PAD}),
    "olmo2, biases": ("Olmo2ForCausalLM", {"pad_token_id": PAD, "attention_bias": True}),
    "olmo2, classes": ("Olmo2ForSequenceClassification", {"num_labels": 5, "pad_token_id": PAD}),
    "gemma2": ("Gemma2ForCausalLM", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5}),
    "gemma2, no bounds": (
        "Gemma2ForCausalLM",
        {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
            "query_pre_attn_scalar": 20,
        },
    ),
    "gemma2, classes": ("Gemma2ForSequenceClassification", {"num_labels": 5, "pad_token_id": PAD}),
    "gemma3_text": ("Gemma3ForCausalLM", WINDOWS),
    "gemma3_text, linear": (
        "Gemma3ForCausalLM",
        {
            "layer_types": WINDOWS["layer_types"],
            "attention_bias": True,
            "final_logit_softcapping": 2.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "gemma3_text, classes": ("Gemma3TextForSequenceClassification", {"num_labels": 5, "pad_token_id": PAD}),
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

BUILT_AS_LLAMA, LLAMA_MODULES = MODULES["llama"]
OTHER_NORMS = {
    "norm1": same(".post_attention_layernorm"),
    "norm2": same(".post_feedforward_layernorm"),
}
GEMMA_NORMS = {
    "norm1": same(".input_layernorm"),
    "norm1_after": same(".post_attention_layernorm"),
    "norm2": same(".pre_feedforward_layernorm"),
    "norm2_after": same(".post_feedforward_layernorm"),
}
ONE_TENSOR = ("attention.q", "attention.k", "attention.v")
MODULES |= {
    **dict.fromkeys(("qwen2", "qwen3", "mistral", "ministral3", "smollm3"), MODULES["llama"]),
    "phi3": (BUILT_AS_LLAMA, {ours: theirs for ours, theirs in LLAMA_MODULES.items() if ours not in ONE_TENSOR}),
    "olmo2": (BUILT_AS_LLAMA, LLAMA_MODULES | OTHER_NORMS),
    **dict.fromkeys(("gemma2", "gemma3_text"), (BUILT_AS_LLAMA, LLAMA_MODULES | GEMMA_NORMS)),
}

# The norm behind the blocks.
LAST_NORM = dict.fromkeys(MODULES, "model.norm") | {"gpt2": "transformer.ln_f"}
