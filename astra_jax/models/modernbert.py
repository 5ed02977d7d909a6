"""ModernBERT (`ModernBertModel`, `ModernBertForSequenceClassification`): the forward pass.

Pre-norm blocks with rotary embeddings and a gated MLP; the first has no norm before its attention. Most blocks see 64
tokens to each side, every third sees all, and turns by another base."""

import dataclasses
from functools import partial
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from astra_jax.codecs.config import AstraConfig
from astra_jax.mesh.sharding import Pooling
from astra_jax.models.attention import MixedPrecisionAttention
from astra_jax.models.bert import Bert
from astra_jax.models.blocks import stack_blocks
from astra_jax.models.decoder import check_layer_types, sliding
from astra_jax.models.encoder import EncoderConfig, MaskedLMHead
from astra_jax.models.interface import Report, Strategy
from astra_jax.models.layers import ACTIVATIONS, GatedMLP, LayerNorm, check_activation, check_choice, check_divides
from astra_jax.models.mask import Block, Windows
from astra_jax.models.rotary import Rotary, RotaryByBlock, by_block, check_rotary

ClassifierPooling = Literal["cls", "mean"]


@dataclasses.dataclass(frozen=True)
class ModernBertConfig(EncoderConfig):
    """The numbers of a ModernBERT under the names of Hugging Face's `ModernBertConfig`.

    Attributes:
      rope_parameters, sliding_rope: the rotary embeddings of blocks that see all, and of those with a window.
      local_attention: how many tokens a block with a window sees, to both sides together.
      layer_types: which blocks have one; None for all but every `global_attn_every_n_layers`-th, from the first on.

    Raises:
      AstraError: a value does not fit the others; the message names value, range and fix.
    """

    THETAS = ("global_rope_theta", "local_rope_theta")  # of blocks without a window and with one, in older files

    vocab_size: int = 50368
    hidden_size: int = 768
    intermediate_size: int = 1152
    num_hidden_layers: int = 22
    num_attention_heads: int = 12
    hidden_activation: str = "gelu"
    max_position_embeddings: int = 8192
    norm_eps: float = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_parameters: Rotary = Rotary(rope_theta=160_000.0)
    sliding_rope: Rotary = Rotary()
    local_attention: int = 128
    global_attn_every_n_layers: int = 3
    layer_types: tuple[str, ...] | None = None
    decoder_bias: bool = True
    classifier_pooling: str = "cls"
    classifier_bias: bool = False
    classifier_activation: str = "gelu"
    pooler: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_divides(self, "hidden_size", "num_attention_heads")
        check_activation("hidden_activation", self.hidden_activation)
        check_activation("classifier_activation", self.classifier_activation)
        check_choice(self, "classifier_pooling", ClassifierPooling)
        check_layer_types(self, self.layer_types)
        for rotary in (self.rope_parameters, self.sliding_rope):
            check_rotary(rotary, self.hidden_size // self.num_attention_heads)

    @property
    def head_activation(self) -> str:  # type: ignore[override]  # of other families it is always the same
        return self.classifier_activation

    @property
    def pooled(self) -> Pooling:
        by_mean = self.task == "classification" and self.classifier_pooling == "mean"
        return "mean" if by_mean else self.pooling

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of attention of every block."""
        every = self.global_attn_every_n_layers
        numbers = range(self.num_hidden_layers)
        return self.layer_types or tuple("sliding_attention" if n % every else "full_attention" for n in numbers)

    @property
    def rotary(self) -> Rotary | RotaryByBlock | None:
        """The rotary embeddings of all blocks."""
        of = {"full_attention": self.rope_parameters, "sliding_attention": self.sliding_rope}
        return by_block(tuple(of[kind] for kind in self.kinds))

    @property
    def windows(self) -> Windows | None:
        """How far every block sees, a token itself included."""
        return sliding(self.kinds, self.local_attention // 2 + 1)


class ModernBertBlock(nnx.Module):
    """Attention, then a gated MLP, each behind a LayerNorm and around a residual."""

    def __init__(self, config: ModernBertConfig, astra: AstraConfig | None, dtype: Any, rngs: nnx.Rngs):
        D, H, F = config.hidden_size, config.num_attention_heads, config.intermediate_size
        norm = partial(LayerNorm, epsilon=config.norm_eps, use_bias=config.norm_bias, dtype=dtype, rngs=rngs)
        self.norm1 = norm(D)
        self.attention = MixedPrecisionAttention(
            *(D, H, H, D // H),
            qkv_bias=config.attention_bias,
            o_bias=config.attention_bias,
            rotary=config.rotary,
            windows=config.windows,
            astra=astra,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm2 = norm(D)
        self.mlp = GatedMLP(D, F, config.hidden_activation, use_bias=config.mlp_bias, dtype=dtype, rngs=rngs)

    def attention_input(self, x: Float[Array, "*tokens D"], number: Any = 0) -> Float[Array, "*tokens D"]:
        """What keys and values of block `number` are projections of."""
        return jnp.where(number == 0, x, self.norm1(x))

    def __call__(
        self, x: Float[Array, "B S D"], strategy: Strategy, estimate: Any, block: Block
    ) -> tuple[Float[Array, "B S D"], Any, Report]:
        y = self.attention_input(x, block.number)
        attended, estimate, report = self.attention(y, strategy, estimate, block)
        x = x + attended
        return x + self.mlp(self.norm2(x), strategy), estimate, report


class ModernBertHead(nnx.Module):
    """[B,D] -> [B,C]: a layer with an activation and a norm, and the classes."""

    def __init__(self, config: ModernBertConfig, dtype: Any, rngs: nnx.Rngs):
        D = config.hidden_size
        self.dense = nnx.Linear(D, D, use_bias=config.classifier_bias, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(D, epsilon=config.norm_eps, use_bias=config.norm_bias, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(D, config.num_labels, dtype=dtype, rngs=rngs)
        self.activation = config.classifier_activation

    def __call__(self, features: Float[Array, "B D"]) -> Float[Array, "B C"]:
        return self.out(self.norm(ACTIVATIONS[self.activation](self.dense(features))))


class ModernBert(Bert):
    """ModernBERT as a sentence encoder or a classifier.

    With a class token for every device, a replica stands at the front of the text, so that blocks with a window show it
    what is there, and the others its own shard.
    """

    def __init__(
        self, config: ModernBertConfig, astra: AstraConfig | None = None, *, dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        self.config, self.astra, self.dtype = config, astra, jnp.dtype(dtype)
        D, init = config.hidden_size, nnx.initializers.normal(0.02)
        norm = partial(LayerNorm, epsilon=config.norm_eps, use_bias=config.norm_bias, dtype=dtype, rngs=rngs)
        self.embed = nnx.Embed(config.vocab_size, D, dtype=dtype, embedding_init=init, rngs=rngs)
        self.embed_norm = norm(D)
        self.blocks = stack_blocks(lambda r: ModernBertBlock(config, astra, dtype, r), config.num_hidden_layers, rngs)
        self.norm = norm(D)
        self.pooler = None
        self.head: Any = ModernBertHead(config, dtype, rngs) if config.task == "classification" else None
        biases = (config.classifier_bias, config.norm_bias, config.decoder_bias)
        self.masked_lm = (
            MaskedLMHead(D, config.vocab_size, *biases, dtype=dtype, rngs=rngs) if config.masked_lm else None
        )

    def embedded(self, ids: Int[Array, "B S"], positions: Any) -> Float[Array, "B S D"]:
        return self.embed_norm(self.embed(ids))  # positions come in as rotations

    def finished(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        return self.norm(x)
