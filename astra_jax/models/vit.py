"""ViT (`ViTForImageClassification`): a class token and a linear head around the pass of `vision.py`."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from astra_jax.codecs.config import AstraConfig
from astra_jax.models.vision import PreNormBlock, VisionConfig, VisionTransformer


@dataclasses.dataclass(frozen=True)
class ViTConfig(VisionConfig):
    """The numbers of a ViT under the names of Hugging Face's `ViTConfig`; `num_labels` is C.

    Raises:
      AstraError: a value does not fit the others; the message names value, range and fix.
    """

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


class ViT(VisionTransformer):
    """Vision Transformer with a class token and a linear head.

    Args:
      config: the architecture.
      astra: how it is compressed; None without codebooks.
      dtype: what activations are computed in. Parameters, softmax and statistics are float32.
      rngs: initialisation.
    """

    def __init__(
        self, config: ViTConfig, astra: AstraConfig | None = None, *, dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        super().__init__(config, astra, PreNormBlock, dtype=dtype, rngs=rngs)
        self.cls = nnx.Param(jnp.zeros((config.hidden_size,)))
        self.head = nnx.Linear(config.hidden_size, config.num_labels, dtype=dtype, rngs=rngs)

    def class_states(self) -> Float[Array, "1 D"]:
        """The class token at its place."""
        return (self.cls[...] + self.position[...][0])[None]

    def logits(self, features: Float[Array, "B D"]) -> Float[Array, "B C"]:
        """The classes of final class states, float32."""
        return self.head(features).astype(jnp.float32)
