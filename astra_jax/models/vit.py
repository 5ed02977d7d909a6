"""ViT (`ViTForImageClassification`): the whole forward pass on one page."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from astra_jax.codecs.base import Quantizer
from astra_jax.codecs.config import AstraConfig, class_kind
from astra_jax.errors import AstraError
from astra_jax.inputs import InputKind
from astra_jax.mesh.sharding import Shards
from astra_jax.models.attention import MixedPrecisionAttention
from astra_jax.models.blocks import scan_blocks, stack_blocks
from astra_jax.models.interface import Report, Strategy
from astra_jax.models.layers import MLP, LayerNorm, check_activation, check_divides, check_numbers
from astra_jax.models.mask import Block


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """The numbers of a ViT under the names of Hugging Face's `ViTConfig`; `num_labels` is C.

    Raises:
      AstraError: a value does not fit the others; the message names value, range and fix.
    """

    input_kind: ClassVar[InputKind] = "images"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    qkv_bias: bool = True
    num_labels: int = 1000

    def __post_init__(self) -> None:
        check_numbers(self)
        check_divides(self, "hidden_size", "num_attention_heads")
        check_divides(self, "image_size", "patch_size")
        check_activation("hidden_act", self.hidden_act)

    @property
    def num_patches(self) -> int:
        """T: tokens of an image, class token not counted."""
        return (self.image_size // self.patch_size) ** 2


class ViTBlock(nnx.Module):
    """Pre-norm block: attention, then MLP, each behind a LayerNorm and around a residual."""

    def __init__(self, config: ViTConfig, astra: AstraConfig | None, dtype: Any, rngs: nnx.Rngs):
        D, H, F, eps = config.hidden_size, config.num_attention_heads, config.intermediate_size, config.layer_norm_eps
        self.norm1 = LayerNorm(D, epsilon=eps, dtype=dtype, rngs=rngs)
        self.attention = MixedPrecisionAttention(
            D, H, H, D // H, qkv_bias=config.qkv_bias, astra=astra, dtype=dtype, rngs=rngs
        )
        self.norm2 = LayerNorm(D, epsilon=eps, dtype=dtype, rngs=rngs)
        self.mlp = MLP(D, F, config.hidden_act, dtype=dtype, rngs=rngs)

    def attention_input(self, x: Float[Array, "*tokens D"]) -> Float[Array, "*tokens D"]:
        """What keys and values are projections of."""
        return self.norm1(x)

    def __call__(
        self, x: Float[Array, "B S D"], strategy: Strategy, estimate: Any, block: Block
    ) -> tuple[Float[Array, "B S D"], Any, Report]:
        attended, estimate, report = self.attention(self.attention_input(x), strategy, estimate, block)
        x = x + attended
        return x + self.mlp(self.norm2(x), strategy), estimate, report


class ViT(nnx.Module):
    """Vision Transformer with a class token and a linear head.

    Args:
      config: the architecture.
      astra: how it is compressed; None without codebooks.
      dtype: what activations are computed in. Parameters, softmax and statistics are float32.
      rngs: initialisation.
    """

    input_kind: ClassVar[InputKind] = ViTConfig.input_kind
    per_token = False

    def __init__(
        self, config: ViTConfig, astra: AstraConfig | None = None, *, dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        self.config, self.astra, self.dtype = config, astra, jnp.dtype(dtype)
        D, P, init = config.hidden_size, config.patch_size, nnx.initializers.truncated_normal(0.02)
        self.embed = nnx.Linear(P * P * config.num_channels, D, dtype=dtype, rngs=rngs)
        self.cls = nnx.Param(jnp.zeros((D,)))
        self.position = nnx.Param(init(rngs.params(), (1 + config.num_patches, D)))
        self.blocks = stack_blocks(lambda r: ViTBlock(config, astra, dtype, r), config.num_hidden_layers, rngs)
        self.norm = LayerNorm(D, epsilon=config.layer_norm_eps, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(D, config.num_labels, dtype=dtype, rngs=rngs)

    @property
    def codec(self) -> Quantizer | None:
        """The quantizers of all blocks, stacked on a leading axis L; None without codebooks."""
        return self.blocks.attention.codec

    def shards(self, N: int, images: Any = None) -> Shards:
        """The split of an image's patches over N devices."""
        return Shards.split(self.config.num_patches, N, class_kind(self.astra))

    def to_tokens(self, images: Float[Array, "B height width channels"]) -> Float[Array, "B T PPC"]:
        """Cuts images into patches, row by row; a patch is (row, column, channel)."""
        B, P, n = images.shape[0], self.config.patch_size, self.config.image_size // self.config.patch_size
        expected = (n * P, n * P, self.config.num_channels)
        if images.shape[1:] != expected:
            raise AstraError(f"images are {images.shape[1:]}; this model takes {expected} (height, width, channels)")
        patches = images.reshape(B, n, P, n, P, -1).swapaxes(2, 3)
        return patches.reshape(B, n * n, -1)

    def features(self, patches: Float[Array, "B S PPC"], strategy: Strategy) -> tuple[Float[Array, "B D"], Report]:
        """Patches of the shards that this device holds -> what the head reads, and the strategy's reports."""
        positions = self.position[...]
        x = self.embed(patches)
        x = x + positions[1 + strategy.positions()].astype(x.dtype)
        x = strategy.prepend_class((self.cls[...] + positions[0]).astype(x.dtype), x)
        x, reports = scan_blocks(self, x, strategy)
        # The head reads the mean of the final class states (our choice: after the final norm).
        return strategy.pool(self.norm(x), "class"), reports

    def logits(self, features: Float[Array, "B D"]) -> Float[Array, "B C"]:
        """What the head makes of what it reads, float32."""
        return self.head(features).astype(jnp.float32)

    def __call__(self, patches: Float[Array, "B S PPC"], strategy: Strategy) -> tuple[Float[Array, "B C"], Report]:
        """Patches of the shards that this device holds -> logits, and the strategy's reports of all blocks."""
        features, reports = self.features(patches, strategy)
        return self.logits(features), reports
