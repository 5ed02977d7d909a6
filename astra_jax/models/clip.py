"""CLIP's encoder of pictures (`CLIPVisionModelWithProjection`): a ViT behind one more norm, projected."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from astra_jax.codecs.config import AstraConfig
from astra_jax.models.layers import LayerNorm
from astra_jax.models.vision import PreNormBlock, VisionConfig, VisionTransformer


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig(VisionConfig):
    """The numbers of CLIP's encoder of pictures under the names of Hugging Face's `CLIPVisionConfig`.

    Raises:
      AstraError: a value does not fit the others; the message names value, range and fix.
    """

    task: ClassVar[str] = "image-embedding"
    qkv_bias: ClassVar[bool] = True

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    num_labels: int = 2


class CLIPVision(VisionTransformer):
    """A ViT that gives embeddings, in the space that CLIP has for pictures and texts.

    Args:
      config: the architecture.
      astra: how it is compressed; None without codebooks.
      dtype: what activations are computed in. Parameters, softmax and statistics are float32.
      rngs: initialisation.
    """

    def __init__(
        self, config: CLIPVisionConfig, astra: AstraConfig | None = None, *, dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        super().__init__(config, astra, PreNormBlock, patch_bias=False, dtype=dtype, rngs=rngs)
        D = config.hidden_size
        self.cls = nnx.Param(jnp.zeros((D,)))
        self.embed_norm = LayerNorm(D, epsilon=config.layer_norm_eps, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(D, config.projection_dim, use_bias=False, dtype=dtype, rngs=rngs)

    def class_states(self) -> Float[Array, "1 D"]:
        """The class token at its place, normalised."""
        return self.embed_norm((self.cls[...] + self.position[...][0])[None])

    def embedded(self, patches: Float[Array, "B S PPC"], positions: Any) -> Float[Array, "B S D"]:
        """Patches at their places, normalised."""
        return self.embed_norm(super().embedded(patches, positions))

    def logits(self, features: Float[Array, "B D"]) -> Float[Array, "B projection"]:
        """The embeddings of final class states, float32."""
        return self.head(features).astype(jnp.float32)
