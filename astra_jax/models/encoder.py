"""What encoders of texts share beside their blocks: how texts become embeddings, and classifiers of their own."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from astra_jax.codecs.config import Similarity
from astra_jax.errors import AstraError
from astra_jax.inputs import InputKind
from astra_jax.mesh.sharding import Pooling
from astra_jax.models.layers import ACTIVATIONS, LayerNorm, check_choice, check_numbers

Task = Literal["classification", "embedding"]


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The fields of every encoder's configuration; `num_labels` is C.

    Attributes:
      task: `classification`, or `embedding` for a model without a classifier.
      pooling: the state that a sentence's embedding is: the mean of all tokens, the class token, or the last token
        (a sentence-transformers pooling config). A classifier always reads the class token.
      normalize: whether embeddings are scaled to length 1.
      max_seq_length: the most tokens of a sentence, where sentence-transformers says fewer than the model can take.
      pooler: whether the model has BERT's pooling layer.
      do_lower_case: whether sentence-transformers makes a text lower case before the tokenizer sees it.
      prompt: what stands before every text.
      similarity: how embeddings are compared; of distances the negative.
      masked_lm: whether the model came with the head of a masked language model, which is kept and not computed.
      tie_word_embeddings: whether that head's decoder is the embedding, and is stored but once.
      head_activation: of the layer that a classifier of the family has of its own; None where it reads through the
        pooler.

    Raises:
      AstraError: a value does not fit the others; the message names value, range and fix.
    """

    input_kind: ClassVar[InputKind] = "text"
    head_activation: ClassVar[str | None] = None

    max_position_embeddings: int = 512
    task: Task = "embedding"
    num_labels: int = 2
    pooling: Pooling = "mean"
    normalize: bool = False
    max_seq_length: int | None = None
    pooler: bool = True
    do_lower_case: bool = False
    prompt: str = ""
    similarity: Similarity = "cosine"
    masked_lm: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        check_numbers(self)
        check_choice(self, "task", Task)
        check_choice(self, "pooling", Pooling)
        check_choice(self, "similarity", Similarity)
        if self.task == "classification" and not (self.pooling == "class" and (self.pooler or self.head_activation)):
            raise AstraError("config.json: a BERT classifier reads the class token through a pooler, which is missing")
        if self.most_tokens < 1:
            raise AstraError(
                f"config.json: max_position_embeddings is {self.max_position_embeddings}; it must be above "
                f"{self.position_offset}, which is the place of a text's first token"
            )
        if self.masked_lm and not self.tie_word_embeddings:
            raise AstraError(
                "config.json: the decoder of a masked language model must be its embedding (tie_word_embeddings), and "
                "this one is another: give the model without that head, as transformers' AutoModel saves it"
            )

    @property
    def position_offset(self) -> int:
        """The place of a text's first token in the table of positions; those before it are no token's."""
        return 0

    @property
    def most_tokens(self) -> int:
        """Of a text: so many have places."""
        return self.max_position_embeddings - self.position_offset


class DenseHead(nnx.Module):
    """[B,D] -> [B,C]: a layer with an activation, and the classes."""

    def __init__(self, D: int, C: int, activation: str, *, dtype: Any, rngs: nnx.Rngs):
        self.dense = nnx.Linear(D, D, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(D, C, dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, features: Float[Array, "B D"]) -> Float[Array, "B C"]:
        return self.out(ACTIVATIONS[self.activation](self.dense(features)))


class MaskedLMHead(nnx.Module):
    """What the head of a masked language model has of its own; the rest is the embedding. It is kept, so that an export
    has it, and never computed."""

    def __init__(self, D: int, V: int, *, dtype: Any, rngs: nnx.Rngs):
        self.dense = nnx.Linear(D, D, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(D, dtype=dtype, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros((V,)))
