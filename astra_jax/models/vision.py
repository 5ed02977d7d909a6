"""What families that read pictures share: patches, their places, the block of most of them, and the forward pass."""

from collections.abc import Callable
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from astra_jax.codecs.base import Quantizer
from astra_jax.codecs.config import AstraConfig, Similarity, class_kind
from astra_jax.errors import AstraError
from astra_jax.inputs import InputKind
from astra_jax.mesh.sharding import Reading, Shards
from astra_jax.models.attention import MixedPrecisionAttention
from astra_jax.models.blocks import scan_blocks, stack_blocks
from astra_jax.models.interface import Report, Strategy
from astra_jax.models.layers import MLP, LayerNorm, check_activation, check_divides, check_numbers
from astra_jax.models.mask import Block


class VisionConfig:
    """What the configurations of all families that read pictures have beside their fields.

    Raises:
      AstraError: a value does not fit the others; the message names value, range and fix.
    """

    input_kind: ClassVar[InputKind] = "images"
    similarity: ClassVar[Similarity] = "cosine"  # how embeddings, where these are the output, are compared

    hidden_size: int
    num_attention_heads: int
    hidden_act: str
    image_size: int
    patch_size: int

    def __post_init__(self) -> None:
        check_numbers(self)
        check_divides(self, "hidden_size", "num_attention_heads")
        check_divides(self, "image_size", "patch_size")
        check_activation("hidden_act", self.hidden_act)

    @property
    def class_count(self) -> int:
        """Class tokens: all that are no patches."""
        return 1

    @property
    def side(self) -> int:
        """Pixels on a side of a picture as the model reads it."""
        return self.image_size

    @property
    def num_patches(self) -> int:
        """T: tokens of an image, class tokens not counted."""
        return (self.side // self.patch_size) ** 2

    @property
    def positions(self) -> int:
        """Rows of the table of places: those of class tokens, and then those of patches."""
        return self.class_count + self.num_patches


class PreNormBlock(nnx.Module):
    """Attention, then MLP, each behind a LayerNorm and around a residual."""

    def __init__(self, config: Any, astra: AstraConfig | None, dtype: Any, rngs: nnx.Rngs):
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


class VisionTransformer(nnx.Module):
    """A transformer over the patches of a picture. Families say what their class tokens and their heads are.

    Args:
      config: the architecture.
      astra: how it is compressed; None without codebooks.
      block: makes a block.
      patch_bias: whether a bias is added to every patch.
      dtype: what activations are computed in. Parameters, softmax and statistics are float32.
      rngs: initialisation.
    """

    input_kind: ClassVar[InputKind] = VisionConfig.input_kind
    per_token = False

    def __init__(
        self,
        config: Any,
        astra: AstraConfig | None,
        block: Callable[..., nnx.Module],
        *,
        patch_bias: bool = True,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.config, self.astra, self.dtype = config, astra, jnp.dtype(dtype)
        D, P, init = config.hidden_size, config.patch_size, nnx.initializers.truncated_normal(0.02)
        self.embed = nnx.Linear(P * P * config.num_channels, D, use_bias=patch_bias, dtype=dtype, rngs=rngs)
        self.position = nnx.Param(init(rngs.params(), (config.positions, D)))
        self.blocks = stack_blocks(lambda r: block(config, astra, dtype, r), config.num_hidden_layers, rngs)
        self.norm = LayerNorm(D, epsilon=config.layer_norm_eps, dtype=dtype, rngs=rngs)

    @property
    def reads(self) -> tuple[Reading, ...]:
        """What the head reads: the class token."""
        return ("class",)

    @property
    def codec(self) -> Quantizer | None:
        """The quantizers of all blocks, stacked on a leading axis L; None without codebooks."""
        return self.blocks.attention.codec

    def shards(self, N: int, images: Any = None) -> Shards:
        """The split of an image's patches over N devices."""
        k = self.config.class_count
        return Shards.split(self.config.num_patches, N, class_kind(self.astra) if k else None, k)

    def to_tokens(self, images: Float[Array, "B height width channels"]) -> Float[Array, "B T PPC"]:
        """Cuts images into patches, row by row; a patch is (row, column, channel)."""
        B, P, n = images.shape[0], self.config.patch_size, self.config.side // self.config.patch_size
        expected = (n * P, n * P, self.config.num_channels)
        if images.shape[1:] != expected:
            raise AstraError(f"images are {images.shape[1:]}; this model takes {expected} (height, width, channels)")
        patches = images.reshape(B, n, P, n, P, -1).swapaxes(2, 3)
        return patches.reshape(B, n * n, -1)

    def class_states(self) -> Float[Array, "k D"]:
        """The class tokens as the first block gets them."""
        raise NotImplementedError

    def patch_positions(self) -> Float[Array, "T D"]:
        """What is added to a patch at every place."""
        return self.position[...][-self.config.num_patches :]

    def embedded(self, patches: Float[Array, "B S PPC"], positions: Any) -> Float[Array, "B S D"]:
        """Patches, whose places are `positions`, as the first block gets them."""
        x = self.embed(patches)
        return x + self.patch_positions()[positions].astype(x.dtype)

    def features(self, patches: Float[Array, "B S PPC"], strategy: Strategy) -> tuple[Float[Array, "B states"], Report]:
        """Patches of the shards that this device holds -> what the head reads, and the strategy's reports."""
        x = self.embedded(patches, strategy.positions())
        x = strategy.prepend_class(self.class_states().astype(x.dtype), x)
        x, reports = scan_blocks(self, x, strategy)
        # A head reads the mean of the final states of a class token's replicas (our choice: after the final norm).
        return self.read(self.norm(x), strategy), reports

    def read(self, x: Float[Array, "B S D"], strategy: Strategy) -> Float[Array, "B states"]:
        """What the head reads of the final states of the shards that this device holds."""
        return strategy.pool(x, *self.reads)

    def logits(self, features: Float[Array, "B states"]) -> Float[Array, "B _"]:
        """What the head makes of what it reads, float32."""
        raise NotImplementedError

    def __call__(self, patches: Float[Array, "B S PPC"], strategy: Strategy) -> tuple[Float[Array, "B _"], Report]:
        """Patches of the shards that this device holds -> logits, and the strategy's reports of all blocks."""
        features, reports = self.features(patches, strategy)
        return self.logits(features), reports
