"""Prediction across blocks: what is expected of a token before its codes arrive, so that these need say less.

Every device keeps an estimate x^ of what each token's codec saw in the block before, and all make the same prediction
of what it will see in the next one. The token's own device quantizes how it differs from that, so that errors do not
add up: `p_l = f_l(x^_{l-1}); z = encode(y_l - p_l); x^_l = p_l + decode(z)` (our choice; differential coding in a
closed loop).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from astra_jax.config import AstraConfig


class Prediction(nnx.Variable):
    """Weights of a predictor, float32. Calibration finds them; training leaves them as they are."""


class SideInfo(NamedTuple):
    """What devices tell each other of their tokens besides codes.

    Attributes:
      ids: of the tokens that are here.
      vocabulary: how many ids there are.
      vectors_of: what the first block's codec sees of tokens with these ids [B,S] at these positions [*B,S]: [B,S,W].
    """

    ids: Int[Array, "B S"]
    vocabulary: int
    vectors_of: Callable[[Array, Any], Array]


class Known(NamedTuple):
    """What the first block's codec sees of all tokens, exactly, so that it needs no codes; None if it is not known."""

    vectors: Float[Array, "*tokens W"] | None


def is_exact(carry: Any) -> bool:
    """Whether a carry is what a block's codec sees."""
    return isinstance(carry, Known) and carry.vectors is not None


class Predictor(nnx.Module):
    """f: `p = x * scale + x down up + bias`, or `p = x weight + bias` where it is linear.

    Args:
      config: which kind, and the rank of `down` and `up`.
      width: W, of what the codec quantizes.
    """

    def __init__(self, config: AstraConfig, width: int):
        linear, low_rank = config.predictor == "linear", config.predictor == "low-rank"

        def zeros(*shape: int) -> Prediction:
            return Prediction(jnp.zeros(shape, jnp.float32))

        self.bias = zeros(width)
        self.scale: Any = nnx.data(None if linear else zeros(width))
        self.down: Any = nnx.data(zeros(width, config.rank) if low_rank else None)
        self.up: Any = nnx.data(zeros(config.rank, width) if low_rank else None)
        self.weight: Any = nnx.data(zeros(width, width) if linear else None)

    def __call__(self, estimate: Float[Array, "*tokens W"]) -> Float[Array, "*tokens W"]:
        """The prediction of a block's vectors from the estimate of the block before."""
        with jax.default_matmul_precision("highest"):  # an accelerator's default would lose what codes have said
            if self.weight is not None:
                return estimate @ self.weight[...] + self.bias[...]
            p = estimate * self.scale[...] + self.bias[...]
            return p if self.down is None else p + (estimate @ self.down[...]) @ self.up[...]
