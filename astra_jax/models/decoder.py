"""What the decoders GPT-2 and Llama share: how text goes in, and the heads."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from astra_jax.codecs.base import Quantizer
from astra_jax.codecs.config import AstraConfig
from astra_jax.inputs import InputKind
from astra_jax.inputs.token_batches import Text
from astra_jax.mesh.sharding import Reading, Shards
from astra_jax.models.interface import Report, Strategy

Task = Literal["causal-lm", "classification"]


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
            return dataclasses.replace(Shards.split(self.config.max_position_embeddings, N), causal=True)
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
