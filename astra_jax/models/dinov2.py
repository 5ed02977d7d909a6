"""DINOv2, with registers or without (`Dinov2Model`, `Dinov2ForImageClassification`, `Dinov2WithRegisters...`)."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from astra_jax.codecs.config import AstraConfig
from astra_jax.mesh.sharding import Reading
from astra_jax.models.attention import MixedPrecisionAttention
from astra_jax.models.interface import Report, Strategy
from astra_jax.models.interpolation import resized
from astra_jax.models.layers import HIDDEN, MLP, GatedMLP, LayerNorm, check_choice, check_divides
from astra_jax.models.mask import Block
from astra_jax.models.vision import VisionConfig, VisionTransformer

Task = Literal["classification", "image-embedding"]


@dataclasses.dataclass(frozen=True)
class Dinov2Config(VisionConfig):
    """The numbers of a DINOv2 under the names of Hugging Face's `Dinov2Config`; `num_labels` is C.

    Attributes:
      image_size: pixels on a side of pictures that the table of places was trained for.
      use_mask_token: whether there is a token for masked patches. Only pretraining reads it.
      task: `classification`, or `image-embedding` for a model without a classifier.
      picture_size: pixels on a side of what the preprocessing makes of pictures, to which the table of places is
        interpolated; None for `image_size`.

    Raises:
      AstraError: a value does not fit the others; the message names value, range and fix.
    """

    num_register_tokens: ClassVar[int] = 0
    antialias: ClassVar[bool] = False  # whether the table is interpolated so

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: int = 4
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    image_size: int = 224
    patch_size: int = 14
    num_channels: int = 3
    qkv_bias: bool = True
    use_swiglu_ffn: bool = False
    use_mask_token: bool = True
    num_labels: int = 2
    task: Task = "image-embedding"
    picture_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "task", Task)
        if self.picture_size is not None:
            check_divides(self, "picture_size", "patch_size")

    @property
    def class_count(self) -> int:
        """The class token and the registers."""
        return 1 + self.num_register_tokens

    @property
    def positions(self) -> int:
        """Rows of the table of places: the class token's, and those of patches of `image_size`. Registers have none."""
        return 1 + (self.image_size // self.patch_size) ** 2

    @property
    def side(self) -> int:
        """Pixels on a side of a picture as the model reads it."""
        return self.picture_size or self.image_size

    @property
    def intermediate_size(self) -> int:
        """F; of a gated MLP two thirds of it, rounded up to a multiple of 8."""
        F = self.hidden_size * self.mlp_ratio
        return (int(F * 2 / 3) + 7) // 8 * 8 if self.use_swiglu_ffn else F


@dataclasses.dataclass(frozen=True)
class Dinov2WithRegistersConfig(Dinov2Config):
    """The same of Hugging Face's `Dinov2WithRegistersConfig`."""

    antialias: ClassVar[bool] = True
    use_mask_token: ClassVar[bool] = True  # type: ignore[misc]  # there always is one

    patch_size: int = 16
    num_register_tokens: int = 4  # type: ignore[misc]  # there are none without this field


class Dinov2Block(nnx.Module):
    """Attention, then MLP, each behind a LayerNorm and around a residual, to which a part of every channel is added."""

    def __init__(self, config: Dinov2Config, astra: AstraConfig | None, dtype: Any, rngs: nnx.Rngs):
        D, H, F, eps = config.hidden_size, config.num_attention_heads, config.intermediate_size, config.layer_norm_eps
        self.norm1 = LayerNorm(D, epsilon=eps, dtype=dtype, rngs=rngs)
        self.attention = MixedPrecisionAttention(
            D, H, H, D // H, qkv_bias=config.qkv_bias, astra=astra, dtype=dtype, rngs=rngs
        )
        self.scale1 = nnx.Param(jnp.ones((D,)), axes=(HIDDEN,))
        self.norm2 = LayerNorm(D, epsilon=eps, dtype=dtype, rngs=rngs)
        gated = config.use_swiglu_ffn
        self.mlp = None if gated else MLP(D, F, config.hidden_act, dtype=dtype, rngs=rngs)
        self.swiglu = GatedMLP(D, F, "silu", use_bias=True, dtype=dtype, rngs=rngs) if gated else None
        self.scale2 = nnx.Param(jnp.ones((D,)), axes=(HIDDEN,))

    def attention_input(self, x: Float[Array, "*tokens D"]) -> Float[Array, "*tokens D"]:
        """What keys and values are projections of."""
        return self.norm1(x)

    def __call__(
        self, x: Float[Array, "B S D"], strategy: Strategy, estimate: Any, block: Block
    ) -> tuple[Float[Array, "B S D"], Any, Report]:
        attended, estimate, report = self.attention(self.attention_input(x), strategy, estimate, block)
        x = x + self.scale1[...].astype(x.dtype) * attended
        mlp: Any = self.mlp or self.swiglu
        return x + self.scale2[...].astype(x.dtype) * mlp(self.norm2(x), strategy), estimate, report


class Dinov2(VisionTransformer):
    """A transformer whose class token, and all patches together, are features of a picture as they are.

    Its registers are class tokens as any other: `distributed` puts replicas of them at the head of every shard.

    Args:
      config: the architecture.
      astra: how it is compressed; None without codebooks.
      dtype: what activations are computed in. Parameters, softmax and statistics are float32.
      rngs: initialisation.
    """

    def __init__(
        self, config: Dinov2Config, astra: AstraConfig | None = None, *, dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        super().__init__(config, astra, Dinov2Block, dtype=dtype, rngs=rngs)
        D, R = config.hidden_size, config.num_register_tokens
        self.cls = nnx.Param(jnp.zeros((D,)))
        self.registers = nnx.Param(jnp.zeros((R, D))) if R else None
        self.mask = nnx.Param(jnp.zeros((D,))) if config.use_mask_token else None
        classifier = config.task == "classification"
        self.head = nnx.Linear(2 * D, config.num_labels, dtype=dtype, rngs=rngs) if classifier else None

    @property
    def reads(self) -> tuple[Reading, ...]:
        """A classifier reads the class token and the mean of all patches; an embedding is the class token."""
        return ("class",) if self.head is None else ("class", "input")

    def class_states(self) -> Float[Array, "k D"]:
        """The class token at its place, and the registers."""
        cls = (self.cls[...] + self.position[...][0])[None]
        return cls if self.registers is None else jnp.concatenate([cls, self.registers[...]])

    def patch_positions(self) -> Float[Array, "T D"]:
        """The places of patches, interpolated where there are other patches than the table is for."""
        return resized(self.position[...][1:], self.config.side // self.config.patch_size, self.config.antialias)

    def logits(self, features: Float[Array, "B states"]) -> Float[Array, "B _"]:
        """The classes [B,C], or of a model without a classifier what it reads [B,D], float32."""
        return (features if self.head is None else self.head(features)).astype(jnp.float32)
