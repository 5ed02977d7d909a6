"""DeiT (`DeiTForImageClassification`, `DeiTForImageClassificationWithTeacher`): a ViT with a distillation token."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from astra_jax.codecs.config import AstraConfig
from astra_jax.mesh.sharding import Reading
from astra_jax.models.vision import PreNormBlock, VisionTransformer
from astra_jax.models.vit import ViTConfig


@dataclasses.dataclass(frozen=True)
class DeiTConfig(ViTConfig):
    """The numbers of a DeiT under the names of Hugging Face's `DeiTConfig`, which are ViT's.

    Attributes:
      with_teacher: whether a second head reads the distillation token; the logits are then the mean of both heads'.
    """

    with_teacher: bool = False

    @property
    def class_count(self) -> int:
        """The class token and the distillation token."""
        return 2


class DeiT(VisionTransformer):
    """A ViT with two class tokens, of which the second one learned from a teacher.

    Args:
      config: the architecture.
      astra: how it is compressed; None without codebooks.
      dtype: what activations are computed in. Parameters, softmax and statistics are float32.
      rngs: initialisation.
    """

    def __init__(
        self, config: DeiTConfig, astra: AstraConfig | None = None, *, dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        super().__init__(config, astra, PreNormBlock, dtype=dtype, rngs=rngs)
        D, C = config.hidden_size, config.num_labels
        self.cls, self.distillation = nnx.Param(jnp.zeros((D,))), nnx.Param(jnp.zeros((D,)))
        self.head = nnx.Linear(D, C, dtype=dtype, rngs=rngs)
        self.teacher_head = nnx.Linear(D, C, dtype=dtype, rngs=rngs) if config.with_teacher else None

    @property
    def reads(self) -> tuple[Reading, ...]:
        """The class token, and if there is a head for it the distillation token."""
        return ("class", "second class") if self.config.with_teacher else ("class",)

    def class_states(self) -> Float[Array, "2 D"]:
        """The class token and the distillation token at their places."""
        return jnp.stack([self.cls[...], self.distillation[...]]) + self.position[...][:2]

    def logits(self, features: Float[Array, "B states"]) -> Float[Array, "B C"]:
        """The classes of final class states, float32."""
        if self.teacher_head is None:
            return self.head(features).astype(jnp.float32)
        student, teacher = jnp.split(features, 2, axis=-1)
        return ((self.head(student) + self.teacher_head(teacher)) / 2).astype(jnp.float32)
