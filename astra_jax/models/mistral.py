"""Mistral (`MistralForCausalLM`, `MistralForSequenceClassification`): a Llama whose blocks may all have a window."""

import dataclasses

from astra_jax.models.decoder import DecoderConfig
from astra_jax.models.llama import Llama
from astra_jax.models.mask import Windows


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


class Mistral(Llama):
    """Mistral with a language-model or a classification head."""
