"""What decoders share: how text goes in, and the heads; and the configuration of those that are built as Llama is."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from astra_jax.codecs.base import Quantizer
from astra_jax.codecs.config import AstraConfig
from astra_jax.errors import AstraError
from astra_jax.inputs import InputKind
from astra_jax.inputs.token_batches import Text, longest
from astra_jax.mesh.sharding import Reading, Shards
from astra_jax.models.interface import Report, Strategy
from astra_jax.models.layers import check_activation, check_choice, check_divides, check_numbers
from astra_jax.models.mask import Windows
from astra_jax.models.rotary import Rotary, RotaryByBlock, check_rotary

Task = Literal["causal-lm", "classification"]
LayerType = Literal["full_attention", "sliding_attention"]


class Biases(NamedTuple):
    """Which linear layers of a block have biases: queries, keys and values; attention's output; the MLP's."""

    qkv: bool = False
    o: bool = False
    mlp: bool = False


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The numbers that a decoder with grouped-query attention, RoPE and RMSNorm has, under Hugging Face's names;
    `num_labels` is C. A family adds its own, and says by properties what they mean.

    Raises:
      AstraError: a value does not fit the others; the message names value, range and fix.
    """

    input_kind: ClassVar[InputKind] = "text"
    ROTARY: ClassVar[tuple[str, ...]] = ("longrope",)  # what the rotary embedding may have (`check_rotary`)

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_parameters: Rotary = Rotary()
    task: Task = "causal-lm"
    num_labels: int = 2

    def __post_init__(self) -> None:
        check_numbers(self)
        check_choice(self, "task", Task)
        if self.head_dim is None:
            check_divides(self, "hidden_size", "num_attention_heads")
        if self.num_key_value_heads is not None:
            check_divides(self, "num_attention_heads", "num_key_value_heads")
        check_activation(*self.activation)
        check_rotary(self.rope_parameters, self.E, self.ROTARY)

    @property
    def J(self) -> int:
        """Key/value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def E(self) -> int:
        """Width of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def activation(self) -> tuple[str, str]:
        """Of the MLP: the field, and what it names."""
        return "hidden_act", getattr(self, "hidden_act", "")

    @property
    def biases(self) -> Biases:
        """Which layers have biases."""
        return Biases()

    @property
    def norms_heads(self) -> bool:
        """Whether every head's queries and keys are normalised."""
        return False

    @property
    def rotary(self) -> Rotary | RotaryByBlock | None:
        """The rotary embedding of all blocks."""
        return self.rope_parameters

    @property
    def windows(self) -> Windows | None:
        """How far every block sees; None where all see all."""
        return None

    @property
    def most_tokens(self) -> int:
        """The most tokens of a sequence.

        With `longrope` those up to which its short factors hold: with the long ones, keys that are kept would have
        to be made anew while a text grows.
        """
        rotary, most = self.rope_parameters, self.max_position_embeddings
        return min(most, rotary.original_max_position_embeddings) if rotary.rope_type == "longrope" else most


def check_layer_types(config: Any, layer_types: tuple[str, ...] | None) -> None:
    """Raises AstraError unless `layer_types` names the kind of attention of every block."""
    if layer_types is None:
        return
    if len(layer_types) != config.num_hidden_layers:
        raise AstraError(
            f"config.json: layer_types has {len(layer_types)} entries for {config.num_hidden_layers} blocks"
        )
    for kind in layer_types:
        if kind not in get_args(LayerType):
            raise AstraError(f"config.json: layer_types has {kind!r}; known are {', '.join(get_args(LayerType))}")


def sliding(layer_types: Sequence[str], window: int | None) -> Windows | None:
    """`windows` of blocks of these kinds; None where no block has one."""
    found = tuple(window if kind == "sliding_attention" else None for kind in layer_types)
    return found if any(found) else None


class Decoder(nnx.Module):
    """A causal language model, or a classifier that reads the state of the last token.

    A family sets `config`, `astra`, `embed` and `blocks`, calls `add_head`, and defines `embedded` and `states`.
    """

    input_kind: ClassVar[InputKind] = "text"

    config: Any
    astra: AstraConfig | None
    dtype: Any
    embed: nnx.Embed
    blocks: Any

    def embedded(self, ids: Int[Array, "B S"], positions: Any) -> Float[Array, "B S D"]:
        """The input of the first block: of tokens with these ids at these positions."""
        raise NotImplementedError

    def states(self, ids: Int[Array, "B S"], strategy: Strategy) -> tuple[Float[Array, "B S D"], Report]:
        """Token ids of the slots that are here -> final states, normalised, and the strategy's reports."""
        raise NotImplementedError

    def add_head(self, dtype: Any, rngs: nnx.Rngs) -> None:
        """The output layer that the configuration asks for; a tied one is the embedding itself."""
        config = self.config
        outputs = config.vocab_size if config.task == "causal-lm" else config.num_labels
        tied = config.task == "causal-lm" and config.tie_word_embeddings
        self.head = None if tied else nnx.Linear(config.hidden_size, outputs, use_bias=False, dtype=dtype, rngs=rngs)

    @property
    def per_token(self) -> bool:
        """Whether the output has a row per token, not per sequence."""
        return self.config.task == "causal-lm"

    @property
    def reads(self) -> tuple[Reading, ...]:
        """What a classifier reads."""
        return ("last",)

    @property
    def codec(self) -> Quantizer | None:
        """The quantizers of all blocks, stacked on a leading axis L; None without codebooks."""
        return self.blocks.attention.codec

    def shards(self, N: int, text: Text | None = None) -> Shards:
        """The split of every sequence of a batch over N devices; without a batch, of one of the greatest length."""
        if text is None:
            return dataclasses.replace(Shards.split(longest(self.config), N), causal=True)
        return Shards.ragged(jnp.asarray(text.lengths), jnp.shape(text.ids)[1], N, causal=True)

    def to_tokens(self, text: Text) -> Int[Array, "B T"]:
        """The token ids of a batch."""
        return jnp.asarray(text.ids)

    def features(self, ids: Int[Array, "B S"], strategy: Strategy) -> tuple[Float[Array, "*rows D"], Report]:
        """Token ids -> what the head reads, final states [B,S,D] or those of last tokens [B,D], and the reports."""
        states, reports = self.states(ids, strategy)
        return states if self.per_token else strategy.pool(states, *self.reads), reports

    def logits(self, features: Float[Array, "*rows D"]) -> Float[Array, "*rows _"]:
        """Final states -> logits of the next token, or of the classes, float32."""
        head = self.embed.attend if self.head is None else self.head
        return head(features).astype(jnp.float32)

    def __call__(self, ids: Int[Array, "B S"], strategy: Strategy) -> tuple[Float[Array, "..."], Report]:
        """Token ids -> logits [B,S,V] of every token that is here, or [B,C] of the classes; and the reports."""
        features, reports = self.features(ids, strategy)
        return self.logits(features), reports
