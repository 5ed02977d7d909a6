"""Gemma 2 and Gemma 3 (`Gemma2ForCausalLM`, `Gemma3ForCausalLM`, ...ForSequenceClassification): the whole forward pass.

Norms stand before and after attention and MLP, and scale with 1 + weight; embeddings are scaled by sqrt(D). Most blocks
have a window. Gemma 2 bends scores and logits by tanh; Gemma 3 normalises queries and keys, and turns them by another
base where there is no window."""

import dataclasses
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from astra_jax.codecs.config import AstraConfig
from astra_jax.errors import AstraError
from astra_jax.models.attention import MixedPrecisionAttention, Scores
from astra_jax.models.decoder import Biases, DecoderConfig, check_layer_types, sliding
from astra_jax.models.interface import Report, Strategy
from astra_jax.models.layers import GatedMLP, GemmaNorm
from astra_jax.models.llama import Llama
from astra_jax.models.mask import Block, Windows
from astra_jax.models.rotary import Rotary, RotaryByBlock, by_block, check_rotary


@dataclasses.dataclass(frozen=True)
class Gemma2Config(DecoderConfig):
    """The numbers of a Gemma 2 under the names of Hugging Face's `Gemma2Config`.

    Attributes:
      query_pre_attn_scalar: scores are products divided by its square root.
      layer_types: which blocks have a window; None for every other one.
      attn_logit_softcapping, final_logit_softcapping: bounds of scores and of logits; None for none.

    Raises:
      AstraError: a value does not fit the others; the message names value, range and fix.
    """

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int | None = 4
    head_dim: int | None = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    query_pre_attn_scalar: int = 256
    sliding_window: int | None = 4096
    layer_types: tuple[str, ...] | None = None
    final_logit_softcapping: float | None = 30.0
    attn_logit_softcapping: float | None = 50.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer_types(self, self.layer_types)
        for bound in (self.final_logit_softcapping, self.attn_logit_softcapping):
            if bound is not None and not 0 < bound < 1e9:
                raise AstraError(f"config.json: a bound of scores or logits is {bound}; it must be above 0")

    @property
    def activation(self) -> tuple[str, str]:
        return "hidden_activation", self.hidden_activation

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of attention of every block."""
        return self.layer_types or _every(2, self.num_hidden_layers)

    @property
    def biases(self) -> Biases:
        return Biases(qkv=self.attention_bias, o=self.attention_bias)

    @property
    def windows(self) -> Windows | None:
        return sliding(self.kinds, self.sliding_window)


@dataclasses.dataclass(frozen=True)
class Gemma3TextConfig(Gemma2Config):
    """The numbers of a Gemma 3 under the names of Hugging Face's `Gemma3TextConfig`.

    Attributes:
      rope_parameters: the rotary embedding of blocks without a window.
      sliding_rope: that of blocks with one (`sliding_attention` in `rope_parameters`).
      sliding_window_pattern: without `layer_types`, every so many blocks one has no window.
    """

    ROTARY = ()
    THETAS = ("rope_theta", "rope_local_base_freq")  # of blocks without a window and with one, in older files

    vocab_size: int = 262_208
    max_position_embeddings: int = 131_072
    rope_parameters: Rotary = Rotary(rope_theta=1_000_000.0)
    sliding_rope: Rotary = Rotary()
    sliding_window_pattern: int = 6
    final_logit_softcapping: float | None = None
    attn_logit_softcapping: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rotary(self.sliding_rope, self.E)
        if self.attn_logit_softcapping is not None:
            raise AstraError("config.json: attn_logit_softcapping must be null: transformers has none in Gemma 3")

    @property
    def kinds(self) -> tuple[str, ...]:
        return self.layer_types or _every(self.sliding_window_pattern, self.num_hidden_layers)

    @property
    def norms_heads(self) -> bool:
        return True

    @property
    def rotary(self) -> Rotary | RotaryByBlock | None:
        of = {"full_attention": self.rope_parameters, "sliding_attention": self.sliding_rope}
        return by_block(tuple(of[kind] for kind in self.kinds))


def _every(pattern: int, L: int) -> tuple[str, ...]:
    """Every `pattern`-th block has no window."""
    return tuple("sliding_attention" if (number + 1) % pattern else "full_attention" for number in range(L))


class GemmaBlock(nnx.Module):
    """Attention, then a gated MLP, each between two norms and within a residual."""

    def __init__(self, config: Gemma2Config, astra: AstraConfig | None, dtype: Any, rngs: nnx.Rngs):
        D, H, J, E = config.hidden_size, config.num_attention_heads, config.J, config.E
        norm = partial(GemmaNorm, epsilon=config.rms_norm_eps, dtype=dtype)
        self.norm1, self.norm1_after = norm(D), norm(D)
        self.attention = MixedPrecisionAttention(
            *(D, H, J, E),
            qkv_bias=config.biases.qkv,
            o_bias=config.biases.o,
            rotary=config.rotary,
            norms=(norm(E, hidden=False), norm(E, hidden=False)) if config.norms_heads else None,
            scores=Scores(config.query_pre_attn_scalar**-0.5, config.attn_logit_softcapping),
            windows=config.windows,
            astra=astra,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm2, self.norm2_after = norm(D), norm(D)
        F, act = config.intermediate_size, config.hidden_activation
        self.mlp = GatedMLP(D, F, act, use_bias=False, dtype=dtype, rngs=rngs)

    def attention_input(self, x: Float[Array, "*tokens D"]) -> Float[Array, "*tokens D"]:
        """What keys and values are projections of."""
        return self.norm1(x)

    def __call__(
        self, x: Float[Array, "B S D"], strategy: Strategy, estimate: Any, block: Block
    ) -> tuple[Float[Array, "B S D"], Any, Report]:
        attended, estimate, report = self.attention(self.attention_input(x), strategy, estimate, block)
        x = x + self.norm1_after(attended)
        return x + self.norm2_after(self.mlp(self.norm2(x), strategy)), estimate, report


class Gemma2(Llama):
    """Gemma 2 with a language-model or a classification head."""

    block = GemmaBlock

    def last_norm(self, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
        return GemmaNorm(self.config.hidden_size, epsilon=self.config.rms_norm_eps, dtype=dtype)

    def embedded(self, ids: Int[Array, "B S"], positions: Any) -> Float[Array, "B S D"]:
        x = self.embed(ids)
        return x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)

    def logits(self, features: Float[Array, "*rows D"]) -> Float[Array, "*rows _"]:
        logits, bound = super().logits(features), self.config.final_logit_softcapping
        return bound * jnp.tanh(logits / bound) if self.per_token and bound is not None else logits


class Gemma3Text(Gemma2):
    """Gemma 3 with a language-model or a classification head."""
