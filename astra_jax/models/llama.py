"""Llama 2, 3, 3.1, 3.2 (`LlamaForCausalLM`, `LlamaForSequenceClassification`): the whole forward pass on one page."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from astra_jax.codecs.config import AstraConfig
from astra_jax.errors import AstraError
from astra_jax.inputs import InputKind
from astra_jax.models.attention import MixedPrecisionAttention
from astra_jax.models.blocks import scan_blocks, stack_blocks
from astra_jax.models.decoder import Decoder, Task
from astra_jax.models.interface import Report, Strategy
from astra_jax.models.layers import GatedMLP, RMSNorm, check_activation, check_choice, check_divides, check_numbers
from astra_jax.models.mask import Block
from astra_jax.models.rotary import Rotary


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The numbers of a Llama under the names of Hugging Face's `LlamaConfig`; `num_labels` is C.

    Raises:
      AstraError: a value does not fit the others; the message names value, range and fix.
    """

    input_kind: ClassVar[InputKind] = "text"
    FIXED: ClassVar[dict[str, Any]] = {"rope_interleaved": False, "is_causal": True}

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_parameters: Rotary = Rotary()
    attention_bias: bool = False
    mlp_bias: bool = False
    task: Task = "causal-lm"
    num_labels: int = 2

    def __post_init__(self) -> None:
        check_numbers(self)
        check_choice(self, "task", Task)
        if self.head_dim is None:
            check_divides(self, "hidden_size", "num_attention_heads")
        if self.num_key_value_heads is not None:
            check_divides(self, "num_attention_heads", "num_key_value_heads")
        check_activation("hidden_act", self.hidden_act)
        if self.E % 2:
            raise AstraError(f"config.json: heads are {self.E} wide; rotary embeddings need an even width")

    @property
    def J(self) -> int:
        """Key/value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def E(self) -> int:
        """Width of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


class LlamaBlock(nnx.Module):
    """Pre-norm block: grouped-query attention with RoPE, then a gated MLP, each behind an RMSNorm, with residuals."""

    def __init__(self, config: LlamaConfig, astra: AstraConfig | None, dtype: Any, rngs: nnx.Rngs):
        D, H, J, E, eps = config.hidden_size, config.num_attention_heads, config.J, config.E, config.rms_norm_eps
        self.norm1 = RMSNorm(D, epsilon=eps, dtype=dtype, rngs=rngs)
        self.attention = MixedPrecisionAttention(
            *(D, H, J, E),
            qkv_bias=config.attention_bias,
            o_bias=config.attention_bias,
            rotary=config.rope_parameters,
            astra=astra,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm2 = RMSNorm(D, epsilon=eps, dtype=dtype, rngs=rngs)
        F, act, bias = config.intermediate_size, config.hidden_act, config.mlp_bias
        self.mlp = GatedMLP(D, F, act, use_bias=bias, dtype=dtype, rngs=rngs)

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
    """Llama with a language-model or a classification head.

    Args:
      config: the architecture.
      astra: how it is compressed; None without codebooks.
      dtype: what activations are computed in. Softmax, statistics and logits are float32.
      rngs: initialisation.
    """

    def __init__(
        self, config: LlamaConfig, astra: AstraConfig | None = None, *, dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        self.config, self.astra, self.dtype = config, astra, jnp.dtype(dtype)
        D, init = config.hidden_size, nnx.initializers.normal(0.02)
        self.embed = nnx.Embed(config.vocab_size, D, dtype=dtype, embedding_init=init, rngs=rngs)
        self.blocks = stack_blocks(lambda r: LlamaBlock(config, astra, dtype, r), config.num_hidden_layers, rngs)
        self.norm = RMSNorm(D, epsilon=config.rms_norm_eps, dtype=dtype, rngs=rngs)
        self.add_head(dtype, rngs)

    def embedded(self, ids: Int[Array, "B S"], positions: Any) -> Float[Array, "B S D"]:
        return self.embed(ids)  # positions come in as rotations

    def states(self, ids: Int[Array, "B S"], strategy: Strategy) -> tuple[Float[Array, "B S D"], Report]:
        x = self.embedded(ids, strategy.positions())
        x, reports = scan_blocks(self, x, strategy, ids)
        return self.norm(x), reports
