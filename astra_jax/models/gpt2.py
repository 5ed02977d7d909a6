"""GPT-2 (`GPT2LMHeadModel`, `GPT2ForSequenceClassification`): the whole forward pass on one page."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from astra_jax.codecs.config import AstraConfig
from astra_jax.inputs import InputKind
from astra_jax.models.attention import MixedPrecisionAttention
from astra_jax.models.blocks import scan_blocks, stack_blocks
from astra_jax.models.decoder import Decoder, Task
from astra_jax.models.interface import Report, Strategy
from astra_jax.models.layers import MLP, LayerNorm, check_activation, check_choice, check_divides, check_numbers
from astra_jax.models.mask import Block


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """The numbers of a GPT-2 under the names of Hugging Face's `GPT2Config`; `num_labels` is C.

    Raises:
      AstraError: a value does not fit the others; the message names value, range and fix.
    """

    input_kind: ClassVar[InputKind] = "text"
    # What Hugging Face's configuration may not ask for, because nothing here computes it.
    FIXED: ClassVar[dict[str, Any]] = {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "is_causal": True,
    }
    # Names of the same fields that every family of Hugging Face's has (`attribute_map`).
    ALIASES: ClassVar[dict[str, str]] = {
        "n_positions": "max_position_embeddings",
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
    }

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True
    task: Task = "causal-lm"
    num_labels: int = 2

    def __post_init__(self) -> None:
        check_numbers(self)
        check_choice(self, "task", Task)
        check_divides(self, "n_embd", "n_head")
        check_activation("activation_function", self.activation_function)

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.n_embd

    @property
    def num_hidden_layers(self) -> int:
        """L."""
        return self.n_layer

    @property
    def max_position_embeddings(self) -> int:
        """The most tokens of a sequence."""
        return self.n_positions

    @property
    def intermediate_size(self) -> int:
        """F."""
        return self.n_inner or 4 * self.n_embd


class GPT2Block(nnx.Module):
    """Pre-norm block: attention, then MLP, each behind a LayerNorm and around a residual."""

    def __init__(self, config: GPT2Config, astra: AstraConfig | None, dtype: Any, rngs: nnx.Rngs):
        D, H, F, eps = config.n_embd, config.n_head, config.intermediate_size, config.layer_norm_epsilon
        self.norm1 = LayerNorm(D, epsilon=eps, dtype=dtype, rngs=rngs)
        self.attention = MixedPrecisionAttention(D, H, H, D // H, qkv_bias=True, astra=astra, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(D, epsilon=eps, dtype=dtype, rngs=rngs)
        self.mlp = MLP(D, F, config.activation_function, dtype=dtype, rngs=rngs)

    def attention_input(self, x: Float[Array, "*tokens D"]) -> Float[Array, "*tokens D"]:
        """What keys and values are projections of."""
        return self.norm1(x)

    def __call__(
        self, x: Float[Array, "B S D"], strategy: Strategy, estimate: Any, block: Block
    ) -> tuple[Float[Array, "B S D"], Any, Report]:
        attended, estimate, report = self.attention(self.attention_input(x), strategy, estimate, block)
        x = x + attended
        return x + self.mlp(self.norm2(x), strategy), estimate, report


class GPT2(Decoder):
    """GPT-2 with a language-model or a classification head.

    Args:
      config: the architecture.
      astra: how it is compressed; None without codebooks.
      dtype: what activations are computed in. Softmax, statistics and logits are float32.
      rngs: initialisation.
    """

    def __init__(
        self, config: GPT2Config, astra: AstraConfig | None = None, *, dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        self.config, self.astra, self.dtype = config, astra, jnp.dtype(dtype)
        D, init = config.n_embd, nnx.initializers.normal(0.02)
        self.embed = nnx.Embed(config.vocab_size, D, dtype=dtype, embedding_init=init, rngs=rngs)
        self.position = nnx.Param(init(rngs.params(), (config.n_positions, D)))
        self.blocks = stack_blocks(lambda r: GPT2Block(config, astra, dtype, r), config.n_layer, rngs)
        self.norm = LayerNorm(D, epsilon=config.layer_norm_epsilon, dtype=dtype, rngs=rngs)
        self.add_head(dtype, rngs)

    def embedded(self, ids: Int[Array, "B S"], positions: Any) -> Float[Array, "B S D"]:
        x = self.embed(ids)
        return x + self.position[...][positions].astype(x.dtype)

    def states(self, ids: Int[Array, "B S"], strategy: Strategy) -> tuple[Float[Array, "B S D"], Report]:
        x = self.embedded(ids, strategy.positions())
        x, reports = scan_blocks(self, x, strategy, ids)
        return self.norm(x), reports
