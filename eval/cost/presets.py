"""Known architectures by name, for what needs no trained weights: latency, bits, plans."""

from typing import Any

from astra_jax.models.bert import BertConfig
from astra_jax.models.gpt2 import GPT2Config
from astra_jax.models.llama import LlamaConfig
from astra_jax.models.rotary import Rotary
from astra_jax.models.vit import ViTConfig

LLAMA_3_8B = LlamaConfig(
    vocab_size=128_256,
    intermediate_size=14336,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_parameters=Rotary(rope_theta=500_000.0),
)

# Its proportions are those of Llama's smaller models, the vocabulary is GPT-2's.
LLAMA_S = LlamaConfig(
    vocab_size=50_257,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=12,
    num_attention_heads=16,
    num_key_value_heads=4,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)

# Name -> family and configuration. Those of the paper, the usual sizes of their families, and `llama-s`,
# which is our choice: a Llama that a few small devices can hold and compute.
PRESETS: dict[str, tuple[str, Any]] = {
    "vit-base": ("vit", ViTConfig()),
    "vit-large": (
        "vit",
        ViTConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
    ),
    "bert-base": ("bert", BertConfig()),
    "gpt2-s": ("gpt2", GPT2Config()),
    "gpt2-m": ("gpt2", GPT2Config(n_embd=1024, n_layer=24, n_head=16)),
    "llama-s": ("llama", LLAMA_S),
    "llama-3-8b": ("llama", LLAMA_3_8B),
}
