"""SigLIP's encoder of pictures (`SiglipVisionModel`): no class token, but a query that reads all patches at the end."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from astra_jax.codecs.config import AstraConfig
from astra_jax.mesh.sharding import Reading
from astra_jax.models.interface import Strategy
from astra_jax.models.layers import ACTIVATIONS, LayerNorm
from astra_jax.models.vision import PreNormBlock, VisionConfig, VisionTransformer


@dataclasses.dataclass(frozen=True)
class SiglipVisionConfig(VisionConfig):
    """The numbers of SigLIP's encoder of pictures under the names of Hugging Face's `SiglipVisionConfig`.

    Raises:
      AstraError: a value does not fit the others; the message names value, range and fix.
    """

    FIXED: ClassVar[dict[str, Any]] = {"vision_use_head": True}
    task: ClassVar[str] = "image-embedding"
    qkv_bias: ClassVar[bool] = True

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 16
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    num_labels: int = 2

    @property
    def class_count(self) -> int:
        """None."""
        return 0


class AttentionPool(nnx.Module):
    """A learned query reads all tokens of a picture by attention, and an MLP goes on from what it read."""

    def __init__(self, config: SiglipVisionConfig, dtype: Any, rngs: nnx.Rngs):
        D, F, self.H = config.hidden_size, config.intermediate_size, config.num_attention_heads
        self.probe = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (D,)))
        self.q, self.k, self.v, self.o = (nnx.Linear(D, D, dtype=dtype, rngs=rngs) for _ in range(4))
        self.norm = LayerNorm(D, epsilon=config.layer_norm_eps, dtype=dtype, rngs=rngs)
        self.up, self.down = nnx.Linear(D, F, dtype=dtype, rngs=rngs), nnx.Linear(F, D, dtype=dtype, rngs=rngs)
        self.activation = config.hidden_act

    def read(self, x: Float[Array, "B S D"], strategy: Strategy) -> Float[Array, "B D"]:
        """What the query attends to, of the tokens of all devices."""

        def heads(y: Float[Array, "*rows D"]) -> Float[Array, "*rows H E"]:
            return y.reshape(*y.shape[:-1], self.H, -1)

        query = jnp.broadcast_to(self.q(self.probe[...]), (x.shape[0], 1, x.shape[-1]))
        attended = strategy.attend(heads(query), heads(self.k(x)), heads(self.v(x)))
        return attended.reshape(x.shape[0], -1).astype(x.dtype)

    def __call__(self, attended: Float[Array, "B D"]) -> Float[Array, "B D"]:
        """The embedding."""
        x = self.o(attended)
        return x + self.down(ACTIVATIONS[self.activation](self.up(self.norm(x))))


class SiglipVision(VisionTransformer):
    """A ViT without a class token that gives embeddings, in the space that SigLIP has for pictures and texts.

    Args:
      config: the architecture.
      astra: how it is compressed; None without codebooks.
      dtype: what activations are computed in. Parameters, softmax and statistics are float32.
      rngs: initialisation.
    """

    def __init__(
        self, config: SiglipVisionConfig, astra: AstraConfig | None = None, *, dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        super().__init__(config, astra, PreNormBlock, dtype=dtype, rngs=rngs)
        self.head = AttentionPool(config, dtype, rngs)

    @property
    def reads(self) -> tuple[Reading, ...]:
        """All patches, by attention."""
        return ("attention",)

    def class_states(self) -> Float[Array, "0 D"]:
        """None."""
        return jnp.zeros((0, self.config.hidden_size))

    def read(self, x: Float[Array, "B S D"], strategy: Strategy) -> Float[Array, "B D"]:
        """What the query of the head attends to."""
        return self.head.read(x, strategy)

    def logits(self, features: Float[Array, "B D"]) -> Float[Array, "B D"]:
        """The embeddings of what the query attended to, float32."""
        return self.head(features).astype(jnp.float32)
