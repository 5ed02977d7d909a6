"""Llama 2, 3, 3.1, 3.2 (`LlamaForCausalLM`, `LlamaForSequenceClassification`): the whole forward pass on one page."""

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from astra_jax.codecs.config import AstraConfig
from astra_jax.models.attention import MixedPrecisionAttention
from astra_jax.models.blocks import scan_blocks, stack_blocks
from astra_jax.models.decoder import Biases, Decoder, DecoderConfig
from astra_jax.models.interface import Report, Strategy
from astra_jax.models.layers import GatedMLP, RMSNorm
from astra_jax.models.mask import Block


@dataclasses.dataclass(frozen=True)
class LlamaConfig(DecoderConfig):
    """The numbers of a Llama under the names of Hugging Face's `LlamaConfig`.

    Raises:
      AstraError: a value does not fit the others; the message names value, range and fix.
    """

    FIXED: ClassVar[dict[str, Any]] = {"rope_interleaved": False, "is_causal": True}

    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False

    @property
    def biases(self) -> Biases:
        return Biases(qkv=self.attention_bias, o=self.attention_bias, mlp=self.mlp_bias)


class LlamaBlock(nnx.Module):
    """Pre-norm block: grouped-query attention with RoPE, then a gated MLP, each behind an RMSNorm, with residuals."""

    def __init__(self, config: DecoderConfig, astra: AstraConfig | None, dtype: Any, rngs: nnx.Rngs):
        D, H, J, E, biases = config.hidden_size, config.num_attention_heads, config.J, config.E, config.biases
        norm = partial(RMSNorm, epsilon=config.rms_norm_eps, dtype=dtype, rngs=rngs)
        self.norm1 = norm(D)
        self.attention = MixedPrecisionAttention(
            *(D, H, J, E),
            qkv_bias=biases.qkv,
            o_bias=biases.o,
            rotary=config.rotary,
            norms=(norm(E, scale_metadata={}), norm(E, scale_metadata={})) if config.norms_heads else None,
            windows=config.windows,
            astra=astra,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm2 = norm(D)
        F, (_, act) = config.intermediate_size, config.activation
        self.mlp = GatedMLP(D, F, act, use_bias=biases.mlp, dtype=dtype, rngs=rngs)

    def attention_input(self, x: Float[Array, "*tokens D"]) -> Float[Array, "*tokens D"]:
        """What keys and values are projections of."""
        return self.norm1(x)

    def __call__(
        self, x: Float[Array, "B S D"], strategy: Strategy, estimate: Any, block: Block
    ) -> tuple[Float[Array, "B S D"], Any, Report]:
        attended, estimate, report = self.attention(self.attention_input(x), strategy, estimate, block)
        x = x + attended
        return x + self.mlp(self.norm2(x), strategy), estimate, report


class Llama(Decoder):
    """Llama with a language-model or a classification head; what is built as one is a subclass.

    Args:
      config: the architecture.
      astra: how it is compressed; None without codebooks.
      dtype: what activations are computed in. Softmax, statistics and logits are float32.
      rngs: initialisation.
    """

    block: ClassVar[Any] = LlamaBlock

    def __init__(
        self, config: DecoderConfig, astra: AstraConfig | None = None, *, dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        self.config, self.astra, self.dtype = config, astra, jnp.dtype(dtype)
        D, init = config.hidden_size, nnx.initializers.normal(0.02)
        self.embed = nnx.Embed(config.vocab_size, D, dtype=dtype, embedding_init=init, rngs=rngs)
        self.blocks = stack_blocks(lambda r: self.block(config, astra, dtype, r), config.num_hidden_layers, rngs)
        self.norm = self.last_norm(dtype, rngs)
        self.add_head(dtype, rngs)

    def last_norm(self, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
        """The norm behind the blocks."""
        return RMSNorm(self.config.hidden_size, epsilon=self.config.rms_norm_eps, dtype=dtype, rngs=rngs)

    def embedded(self, ids: Int[Array, "B S"], positions: Any) -> Float[Array, "B S D"]:
        return self.embed(ids)  # positions come in as rotations

    def states(self, ids: Int[Array, "B S"], strategy: Strategy) -> tuple[Float[Array, "B S D"], Report]:
        x = self.embedded(ids, strategy.positions())
        x, reports = scan_blocks(self, x, strategy, ids)
        return self.norm(x), reports
