"""SmolLM3 (`SmolLM3ForCausalLM`, `SmolLM3ForSequenceClassification`): a Llama that has no positions in some blocks, by
default in every fourth."""

import dataclasses

from astra_jax.errors import AstraError
from astra_jax.models.decoder import Biases, DecoderConfig, check_layer_types, sliding
from astra_jax.models.llama import Llama
from astra_jax.models.mask import Windows
from astra_jax.models.rotary import Rotary, RotaryByBlock, by_block


@dataclasses.dataclass(frozen=True)
class SmolLM3Config(DecoderConfig):
    """The numbers of a SmolLM3 under the names of Hugging Face's `SmolLM3Config`.

    Attributes:
      no_rope_layers: of every block 1 where it has a rotary embedding and 0 where not; None for 0 in every
        `no_rope_layer_interval`-th.
      layer_types: which blocks have a window; None for those without positions, where `use_sliding_window` is set.

    Raises:
      AstraError: a value does not fit the others; the message names value, range and fix.
    """

    vocab_size: int = 128256
    hidden_size: int = 2048
    num_hidden_layers: int = 36
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 4
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = True
    rope_parameters: Rotary = Rotary(rope_theta=2_000_000.0)
    attention_bias: bool = False
    mlp_bias: bool = False
    no_rope_layers: tuple[int, ...] | None = None
    no_rope_layer_interval: int = 4
    use_sliding_window: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer_types(self, self.layer_types)
        if not set(self.with_positions) <= {0, 1} or len(self.with_positions) < self.num_hidden_layers:
            raise AstraError(
                f"config.json: no_rope_layers is {self.no_rope_layers!r}; it must be 0 or 1 for each of "
                f"{self.num_hidden_layers} blocks"
            )

    @property
    def with_positions(self) -> tuple[int, ...]:
        """Of every block whether it has a rotary embedding."""
        every = self.no_rope_layer_interval
        by_default = tuple(int((number + 1) % every != 0) for number in range(self.num_hidden_layers))
        return by_default if self.no_rope_layers is None else self.no_rope_layers[: self.num_hidden_layers]

    @property
    def biases(self) -> Biases:
        return Biases(qkv=self.attention_bias, o=self.attention_bias, mlp=self.mlp_bias)

    @property
    def rotary(self) -> Rotary | RotaryByBlock | None:
        return by_block(tuple(self.rope_parameters if there else None for there in self.with_positions))

    @property
    def windows(self) -> Windows | None:
        if not self.use_sliding_window:
            return None
        by_default = ["full_attention" if there else "sliding_attention" for there in self.with_positions]
        return sliding(self.layer_types or by_default, self.sliding_window)


class SmolLM3(Llama):
    """SmolLM3 with a language-model or a classification head."""
