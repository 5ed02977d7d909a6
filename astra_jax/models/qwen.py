"""Qwen2, Qwen2.5 and Qwen3 (`Qwen2ForCausalLM`, `Qwen3ForCausalLM`, ...ForSequenceClassification): Llamas with biases
of queries, keys and values, or with norms of every head's queries and keys; some of their blocks may have a window."""

import dataclasses
from typing import Any, ClassVar

from astra_jax.models.decoder import Biases, DecoderConfig, check_layer_types, sliding
from astra_jax.models.llama import Llama
from astra_jax.models.mask import Windows


@dataclasses.dataclass(frozen=True)
class _QwenConfig(DecoderConfig):
    """What Qwen2 and Qwen3 have both.

    Attributes:
      use_sliding_window, sliding_window: whether blocks may have a window, and how wide it is.
      layer_types: which have it; None for those from `max_window_layers` on.

    Raises:
      AstraError: a value does not fit the others; the message names value, range and fix.
    """

    vocab_size: int = 151936
    intermediate_size: int = 22016
    num_key_value_heads: int | None = 32
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    layer_types: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.use_sliding_window:  # then its width says nothing, as in transformers
            object.__setattr__(self, "sliding_window", None)
        super().__post_init__()
        check_layer_types(self, self.layer_types)

    @property
    def windows(self) -> Windows | None:
        late = [number >= self.max_window_layers for number in range(self.num_hidden_layers)]
        kinds = self.layer_types or ["sliding_attention" if one else "full_attention" for one in late]
        return sliding(kinds, self.sliding_window)


@dataclasses.dataclass(frozen=True)
class Qwen2Config(_QwenConfig):
    """The numbers of a Qwen2 or Qwen2.5 under the names of Hugging Face's `Qwen2Config`."""

    FIXED: ClassVar[dict[str, Any]] = {"use_mrope": False}

    @property
    def biases(self) -> Biases:
        return Biases(qkv=True)


@dataclasses.dataclass(frozen=True)
class Qwen3Config(_QwenConfig):
    """The numbers of a Qwen3 under the names of Hugging Face's `Qwen3Config`."""

    head_dim: int | None = 128
    attention_bias: bool = False

    @property
    def biases(self) -> Biases:
        return Biases(qkv=self.attention_bias, o=self.attention_bias)

    @property
    def norms_heads(self) -> bool:
        return True


class Qwen2(Llama):
    """Qwen2 with a language-model or a classification head."""


class Qwen3(Llama):
    """Qwen3 with a language-model or a classification head."""
