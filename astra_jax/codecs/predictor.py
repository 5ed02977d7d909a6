"""Prediction across blocks: what is expected of a token before its codes arrive, so that these need say less.

Every device keeps an estimate x^ of what each token's codec saw in the block before, and all make the same prediction
of what it will see in the next one. The token's own device quantizes how it differs from that, so that errors do not
add up: `p_l = f_l(x^_{l-1}); z = encode(y_l - p_l); x^_l = p_l + decode(z)` (our choice; differential coding in a
closed loop). Before the first block the estimate is 0.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from astra_jax.codecs.config import AstraConfig

DECAY = 0.8  # of a decoder's mean over the tokens before: about the last five count (our choice)


class Prediction(nnx.Variable):
    """Weights of a predictor, float32."""


Around = Callable[[Array], Array]  # `around` of all tokens' estimates, as whoever has these knows their shards


def around(
    x: Float[Array, "*shards S W"], there: Bool[Array, "*#shards #S"], causal: bool
) -> Float[Array, "*shards S W"]:
    """What is around every token of a shard: in an encoder the mean of the shard's tokens, in a decoder the running
    mean `h_t = DECAY h_{t-1} + (1 - DECAY) x_t`, which knows no later ones (our choice).

    Args:
      there: which slots hold a token that is sent; others count as zero. In a decoder they are behind all others.
    """
    x = jnp.where(there[..., None], x, 0)
    if not causal:
        count = jnp.maximum(jnp.sum(there, axis=-1), 1)[..., None, None]
        return jnp.broadcast_to(jnp.sum(x, axis=-2, keepdims=True) / count, x.shape)
    h, step = (1 - DECAY) * x, 1
    while step < x.shape[-2] and DECAY**step > 1e-8:  # sums over twice as many tokens, until the rest is rounding
        h = h + DECAY**step * jnp.pad(h[..., :-step, :], [(0, 0)] * (h.ndim - 2) + [(step, 0), (0, 0)])
        step *= 2
    return h


class Predictor(nnx.Module):
    """f: `p = x weight + bias`. `mlp` adds `relu([x, c] down + offset) up`, where c is what is `around` the token in
    its shard: a block's attention adds what depends on other tokens, and its MLP what is not linear.

    Args:
      config: which kind, and how many hidden units.
      width: W, of what the codec quantizes.
    """

    def __init__(self, config: AstraConfig, width: int):
        mlp, units, self.width = config.predictor == "mlp", config.hidden_units, width

        def zeros(*shape: int) -> Prediction:
            return Prediction(jnp.zeros(shape, jnp.float32))

        self.weight, self.bias = zeros(width, width), zeros(width)
        self.down: Any = nnx.data(zeros(2 * width, units) if mlp else None)
        self.offset: Any = nnx.data(zeros(units) if mlp else None)
        self.up: Any = nnx.data(zeros(units, width) if mlp else None)

    def __call__(self, estimate: Float[Array, "*tokens W"], around: Around) -> Float[Array, "*tokens W"]:
        """The prediction of a block's vectors from the estimate of the block before, and from what is around each."""
        with jax.default_matmul_precision("highest"):  # an accelerator's default would lose what codes have said
            p = estimate @ self.weight[...] + self.bias[...]
            if self.down is None:
                return p
            seen = jnp.concatenate([estimate, around(estimate)], axis=-1)
            return p + jax.nn.relu(seen @ self.down[...] + self.offset[...]) @ self.up[...]
