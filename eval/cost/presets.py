"""Known architectures by name, for what needs no trained weights: latency, bits, plans."""

from typing import Any

from astra_jax.models.bert import BertConfig
from astra_jax.models.dinov2 import Dinov2Config
from astra_jax.models.gemma import Gemma3TextConfig
from astra_jax.models.gpt2 import GPT2Config
from astra_jax.models.llama import LlamaConfig
from astra_jax.models.mistral import MistralConfig
from astra_jax.models.modernbert import ModernBertConfig
from astra_jax.models.phi3 import Phi3Config
from astra_jax.models.qwen import Qwen3Config
from astra_jax.models.roberta import XLMRobertaConfig
from astra_jax.models.rotary import Rotary
from astra_jax.models.siglip import SiglipVisionConfig
from astra_jax.models.smollm3 import SmolLM3Config
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

# As published under Qwen, google, mistralai (v0.3), microsoft and HuggingFaceTB.
DECODERS: dict[str, tuple[str, Any]] = {
    "qwen3-0.6b": (
        "qwen3",
        Qwen3Config(
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            max_position_embeddings=40960,
            tie_word_embeddings=True,
            rope_parameters=Rotary(rope_theta=1e6),
        ),
    ),
    "qwen3-8b": (
        "qwen3",
        Qwen3Config(
            intermediate_size=12288,
            num_hidden_layers=36,
            num_key_value_heads=8,
            max_position_embeddings=40960,
            rope_parameters=Rotary(rope_theta=1e6),
        ),
    ),
    "gemma-3-1b": (
        "gemma3_text",
        Gemma3TextConfig(
            vocab_size=262_144,
            hidden_size=1152,
            intermediate_size=6912,
            num_attention_heads=4,
            num_key_value_heads=1,
            max_position_embeddings=32768,
            sliding_window=512,
        ),
    ),
    "gemma-3-4b": (
        "gemma3_text",
        Gemma3TextConfig(
            hidden_size=2560,
            intermediate_size=10240,
            num_hidden_layers=34,
            sliding_window=1024,
            rope_parameters=Rotary("linear", rope_theta=1e6, factor=8.0),
        ),
    ),
    "mistral-7b": (
        "mistral",
        MistralConfig(
            vocab_size=32768,
            max_position_embeddings=32768,
            rms_norm_eps=1e-5,
            rope_parameters=Rotary(rope_theta=1e6),
            sliding_window=None,
        ),
    ),
    "phi-4-mini": (
        "phi3",
        Phi3Config(
            vocab_size=200_064,
            num_attention_heads=24,
            num_key_value_heads=8,
            max_position_embeddings=131_072,
            tie_word_embeddings=True,
            rope_parameters=Rotary(
                "longrope",
                factor=32.0,
                original_max_position_embeddings=4096,
                partial_rotary_factor=0.75,
                short_factor=(1.0,) * 48,
            ),
        ),
    ),
    "smollm3-3b": (
        "smollm3",
        SmolLM3Config(max_position_embeddings=65536, rope_parameters=Rotary(rope_theta=5e6)),
    ),
}

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
    **DECODERS,
    "xlm-r-base": (
        "xlm-roberta",
        XLMRobertaConfig(
            vocab_size=250_002, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5, pooling="class"
        ),
    ),
    "modernbert-base": ("modernbert", ModernBertConfig()),
    "dinov2-base": ("dinov2", Dinov2Config(image_size=518)),
    "siglip-base": ("siglip_vision_model", SiglipVisionConfig()),
}
