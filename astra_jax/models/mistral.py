"""Mistral and Ministral 3 (`MistralForCausalLM`, `Ministral3ForCausalLM`, ...ForSequenceClassification): a Llama whose
blocks may all have a window, and one whose queries grow with their place in long texts."""

import dataclasses

from astra_jax.models.decoder import DecoderConfig
from astra_jax.models.llama import Llama
from astra_jax.models.mask import Windows
from astra_jax.models.rotary import Rotary


@dataclasses.dataclass(frozen=True)
class MistralConfig(DecoderConfig):
    """The numbers of a Mistral under the names of Hugging Face's `MistralConfig`."""

    intermediate_size: int = 14336
    num_key_value_heads: int | None = 8
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    sliding_window: int | None = 4096

    @property
    def windows(self) -> Windows | None:
        return (self.sliding_window,) * self.num_hidden_layers if self.sliding_window else None


@dataclasses.dataclass(frozen=True)
class Ministral3Config(MistralConfig):
    """The numbers of a Ministral 3 under the names of Hugging Face's `Ministral3Config`."""

    ROTARY = ("longrope", "llama_4_scaling_beta")

    vocab_size: int = 131072
    num_hidden_layers: int = 34
    head_dim: int | None = 128
    max_position_embeddings: int = 262144
    rms_norm_eps: float = 1e-5
    rope_parameters: Rotary = Rotary(
        "yarn",
        rope_theta=1e6,
        factor=16.0,
        original_max_position_embeddings=16384,
        mscale=1.0,
        mscale_all_dim=1.0,
        llama_4_scaling_beta=0.1,
    )
    sliding_window: int | None = None


class Ministral3(Llama):
    """Ministral 3 with a language-model or a classification head."""


class Mistral(Llama):
    """Mistral with a language-model or a classification head."""
