"""BERT-like encoders (`BertModel`, `BertForSequenceClassification`, sentence-transformers): the forward pass."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from astra_jax.codecs.base import Quantizer
from astra_jax.codecs.config import AstraConfig, class_kind
from astra_jax.inputs import InputKind
from astra_jax.inputs.token_batches import Text, most_tokens
from astra_jax.mesh.sharding import Reading, Shards
from astra_jax.models.attention import MixedPrecisionAttention
from astra_jax.models.blocks import scan_blocks, stack_blocks
from astra_jax.models.encoder import DenseHead, EncoderConfig, MaskedLMHead
from astra_jax.models.interface import Report, Strategy
from astra_jax.models.layers import MLP, LayerNorm, check_activation, check_divides
from astra_jax.models.mask import Block


@dataclasses.dataclass(frozen=True)
class BertConfig(EncoderConfig):
    """The numbers of a BERT under the names of Hugging Face's `BertConfig`.

    Raises:
      AstraError: a value does not fit the others; the message names value, range and fix.
    """

    FIXED: ClassVar[dict[str, Any]] = {
        "position_embedding_type": "absolute",
        "is_decoder": False,
    }

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        super().__post_init__()
        check_divides(self, "hidden_size", "num_attention_heads")
        check_activation("hidden_act", self.hidden_act)


class BertBlock(nnx.Module):
    """Post-norm block: attention, then MLP, each within a residual and followed by a LayerNorm."""

    def __init__(self, config: Any, astra: AstraConfig | None, dtype: Any, rngs: nnx.Rngs):
        D, H, F, eps = config.hidden_size, config.num_attention_heads, config.intermediate_size, config.layer_norm_eps
        self.attention = MixedPrecisionAttention(D, H, H, D // H, qkv_bias=True, astra=astra, dtype=dtype, rngs=rngs)
        self.norm1 = LayerNorm(D, epsilon=eps, dtype=dtype, rngs=rngs)
        self.mlp = MLP(D, F, config.hidden_act, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(D, epsilon=eps, dtype=dtype, rngs=rngs)

    def attention_input(self, x: Float[Array, "*tokens D"]) -> Float[Array, "*tokens D"]:
        """What keys and values are projections of."""
        return x

    def __call__(
        self, x: Float[Array, "B S D"], strategy: Strategy, estimate: Any, block: Block
    ) -> tuple[Float[Array, "B S D"], Any, Report]:
        attended, estimate, report = self.attention(x, strategy, estimate, block)
        x = self.norm1(x + attended)
        return self.norm2(x + self.mlp(x, strategy)), estimate, report


class Bert(nnx.Module):
    """BERT as a sentence encoder or a classifier.

    Where the class token is read, it is a class token as ViT's: `distributed` puts a replica at the head of every
    shard. Where tokens are averaged it is a token like any other. The types of tokens, by which a pair of texts is told
    apart, come with their ids (`inputs.token_batches.typed`).

    Args:
      config: the architecture; a `BertConfig`, or an `EncoderConfig` that has its fields as properties.
      astra: how it is compressed; None without codebooks.
      dtype: what activations are computed in. Softmax, statistics and the output are float32.
      rngs: initialisation.
    """

    input_kind: ClassVar[InputKind] = BertConfig.input_kind
    per_token = False

    def __init__(self, config: Any, astra: AstraConfig | None = None, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config, self.astra, self.dtype = config, astra, jnp.dtype(dtype)
        D, init = config.hidden_size, nnx.initializers.normal(0.02)
        self.embed = nnx.Embed(config.vocab_size, D, dtype=dtype, embedding_init=init, rngs=rngs)
        self.position = nnx.Param(init(rngs.params(), (config.max_position_embeddings, D)))
        types = config.type_vocab_size
        self.token_type = nnx.Param(init(rngs.params(), (types, D))) if types else None
        self.embed_norm = LayerNorm(D, epsilon=config.layer_norm_eps, dtype=dtype, rngs=rngs)
        self.blocks = stack_blocks(lambda r: BertBlock(config, astra, dtype, r), config.num_hidden_layers, rngs)
        self.pooler = nnx.Linear(D, D, dtype=dtype, rngs=rngs) if config.pooler else None
        self.head: Any = self._classifier(dtype, rngs) if config.task == "classification" else None
        self.masked_lm = MaskedLMHead(D, config.vocab_size, dtype=dtype, rngs=rngs) if config.masked_lm else None

    def _classifier(self, dtype: Any, rngs: nnx.Rngs) -> DenseHead | nnx.Linear:
        D, C, activation = self.config.hidden_size, self.config.num_labels, self.config.head_activation
        if activation is None:
            return nnx.Linear(D, C, dtype=dtype, rngs=rngs)
        return DenseHead(D, C, activation, dtype=dtype, rngs=rngs)

    @property
    def codec(self) -> Quantizer | None:
        """The quantizers of all blocks, stacked on a leading axis L; None without codebooks."""
        return self.blocks.attention.codec

    @property
    def reads(self) -> tuple[Reading, ...]:
        """What an embedding, or what a head reads, is made of."""
        return (self.config.pooled,)

    @property
    def _reads_class(self) -> bool:
        return self.config.pooled == "class"

    def shards(self, N: int, text: Text | None = None) -> Shards:
        """The split of every sequence of a batch over N devices; without a batch, of one of the greatest length."""
        kind, class_slots = class_kind(self.astra) if self._reads_class else None, int(self._reads_class)
        if text is None:
            return Shards.split(most_tokens(self.config) - class_slots, N, kind)
        T, lengths = jnp.shape(text.ids)[1], jnp.asarray(text.lengths)
        return Shards.ragged(lengths - class_slots, T - class_slots, N, kind)

    def to_tokens(self, text: Text) -> Int[Array, "B T 2"]:
        """Every token's id, and that of the sequence's class token; the class token itself is not among the tokens
        where it has slots of its own."""
        ids = jnp.asarray(text.ids)
        ids = jnp.stack([ids, jnp.broadcast_to(ids[:, :1], ids.shape)], axis=-1)
        return ids[:, 1:] if self._reads_class else ids

    def embedded(self, ids: Int[Array, "B S"], positions: Any) -> Float[Array, "B S D"]:
        """The input of the first block: of tokens with these ids, which may say types, at these positions; class tokens
        included."""
        V, places = self.config.vocab_size, self.position[...][self.config.position_offset + positions]
        if self.token_type is not None:
            places = places + self.token_type[...][ids // V]
        x = self.embed(ids % V)
        return self.embed_norm(x + places.astype(x.dtype))

    def features(self, tokens: Int[Array, "B S 2"], strategy: Strategy) -> tuple[Float[Array, "B D"], Report]:
        """Tokens of the shards that are here -> the pooled state of every sequence, and the reports of all blocks."""
        ids = tokens[..., 0]
        if self._reads_class:
            ids = strategy.prepend_class(tokens[:, :1, 1:], tokens[..., :1])[..., 0]
        x = self.embedded(ids, strategy.tokens().position)
        x, reports = scan_blocks(self, x, strategy, ids)
        return strategy.pool(self.finished(x), *self.reads), reports

    def finished(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """What follows on the blocks, before states are pooled: nothing."""
        return x

    def logits(self, features: Float[Array, "B D"]) -> Float[Array, "B _"]:
        """Pooled states -> logits [B,C], or of a model without a classifier its embeddings [B,D], float32."""
        if self.head is not None:
            through_pooler = self.pooler if self.config.head_activation is None else None
            features = self.head(jnp.tanh(through_pooler(features)) if through_pooler else features)
        features = features.astype(jnp.float32)
        if self.config.normalize:
            features = features / jnp.maximum(jnp.linalg.norm(features, axis=-1, keepdims=True), 1e-12)
        return features

    def __call__(self, tokens: Int[Array, "B S 2"], strategy: Strategy) -> tuple[Float[Array, "B _"], Report]:
        """Tokens of the shards that are here -> logits [B,C] or embeddings [B,D], and the reports of all blocks."""
        features, reports = self.features(tokens, strategy)
        return self.logits(features), reports
