"""Phi-3, Phi-3.5-mini and Phi-4-mini (`Phi3ForCausalLM`, `Phi3ForSequenceClassification`): a Llama whose checkpoints
hold several projections in one tensor, and of whose heads only a part may be rotated."""

import dataclasses
from typing import Any, ClassVar

from astra_jax.errors import AstraError
from astra_jax.models.decoder import DecoderConfig
from astra_jax.models.llama import Llama
from astra_jax.models.mask import Windows


@dataclasses.dataclass(frozen=True)
class Phi3Config(DecoderConfig):
    """The numbers of a Phi-3 under the names of Hugging Face's `Phi3Config`.

    Raises:
      AstraError: a value does not fit the others; the message names value, range and fix.
    """

    FIXED: ClassVar[dict[str, Any]] = {
        **dict.fromkeys(("attention_bias", "mlp_bias", "lm_head_bias"), False),
        **dict.fromkeys(("full_attn_mod", "interpolate_factor"), 1),
    }
    ROTARY = ("longrope", "partial_rotary_factor")

    vocab_size: int = 32064
    hidden_size: int = 3072
    intermediate_size: int = 8192
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    original_max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (kind := self.rope_parameters.rope_type) not in ("default", "longrope"):
            raise AstraError(f"config.json: rope_type is {kind!r}; a Phi-3 has default or longrope")

    @property
    def windows(self) -> Windows | None:
        return (self.sliding_window,) * self.num_hidden_layers if self.sliding_window else None


class Phi3(Llama):
    """Phi-3 with a language-model or a classification head."""
