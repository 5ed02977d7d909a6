"""DistilBERT: a BERT without token types and pooler, whose classifier has a layer of its own."""

import dataclasses
from typing import ClassVar

from astra_jax.models.bert import Bert
from astra_jax.models.encoder import EncoderConfig
from astra_jax.models.layers import check_activation, check_divides


@dataclasses.dataclass(frozen=True)
class DistilBertConfig(EncoderConfig):
    """The numbers of a DistilBERT under the names of Hugging Face's `DistilBertConfig`. Its table of positions is
    stored, whether it was learned or is of sines (`sinusoidal_pos_embds`).

    Raises:
      AstraError: a value does not fit the others; the message names value, range and fix.
    """

    head_activation: ClassVar[str | None] = "relu"
    type_vocab_size: ClassVar[int] = 0
    layer_norm_eps: ClassVar[float] = 1e-12
    # Names of the same fields that every family of Hugging Face's has (`attribute_map`).
    ALIASES: ClassVar[dict[str, str]] = {
        "dim": "hidden_size",
        "n_heads": "num_attention_heads",
        "n_layers": "num_hidden_layers",
    }

    pooler: bool = False
    vocab_size: int = 30522
    n_layers: int = 6
    n_heads: int = 12
    dim: int = 768
    hidden_dim: int = 3072
    activation: str = "gelu"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_divides(self, "dim", "n_heads")
        check_activation("activation", self.activation)

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.dim

    @property
    def num_hidden_layers(self) -> int:
        """L."""
        return self.n_layers

    @property
    def num_attention_heads(self) -> int:
        """H."""
        return self.n_heads

    @property
    def intermediate_size(self) -> int:
        """F."""
        return self.hidden_dim

    @property
    def hidden_act(self) -> str:
        """Of the MLP."""
        return self.activation


class DistilBert(Bert):
    """DistilBERT as a sentence encoder or a classifier."""
