"""OLMo 2 (`Olmo2ForCausalLM`, `Olmo2ForSequenceClassification`): a Llama with norms behind attention and MLP, not
before them, and with norms of all heads' queries and of all heads' keys."""

import dataclasses
from functools import partial
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from astra_jax.codecs.config import AstraConfig
from astra_jax.models.attention import MixedPrecisionAttention
from astra_jax.models.decoder import Biases, DecoderConfig
from astra_jax.models.interface import Report, Strategy
from astra_jax.models.layers import GatedMLP, RMSNorm
from astra_jax.models.llama import Llama
from astra_jax.models.mask import Block


@dataclasses.dataclass(frozen=True)
class Olmo2Config(DecoderConfig):
    """The numbers of an OLMo 2 under the names of Hugging Face's `Olmo2Config`."""

    vocab_size: int = 50304
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    attention_bias: bool = False

    @property
    def biases(self) -> Biases:
        return Biases(qkv=self.attention_bias, o=self.attention_bias)


class Olmo2Block(nnx.Module):
    """Attention, then a gated MLP, each followed by an RMSNorm and within a residual."""

    def __init__(self, config: Olmo2Config, astra: AstraConfig | None, dtype: Any, rngs: nnx.Rngs):
        D, H, J, E = config.hidden_size, config.num_attention_heads, config.J, config.E
        norm = partial(RMSNorm, epsilon=config.rms_norm_eps, dtype=dtype, rngs=rngs)
        self.attention = MixedPrecisionAttention(
            *(D, H, J, E),
            qkv_bias=config.biases.qkv,
            o_bias=config.biases.o,
            rotary=config.rotary,
            norms=(norm(H * E, scale_metadata={}), norm(J * E, scale_metadata={})),
            astra=astra,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm1 = norm(D)
        F, (_, act) = config.intermediate_size, config.activation
        self.mlp = GatedMLP(D, F, act, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm2 = norm(D)

    def attention_input(self, x: Float[Array, "*tokens D"]) -> Float[Array, "*tokens D"]:
        """What keys and values are projections of."""
        return x

    def __call__(
        self, x: Float[Array, "B S D"], strategy: Strategy, estimate: Any, block: Block
    ) -> tuple[Float[Array, "B S D"], Any, Report]:
        attended, estimate, report = self.attention(x, strategy, estimate, block)
        x = x + self.norm1(attended)
        return x + self.norm2(self.mlp(x, strategy)), estimate, report


class Olmo2(Llama):
    """OLMo 2 with a language-model or a classification head."""

    block = Olmo2Block
