"""Small layers that several families share."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from astra_jax.errors import AstraError


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Exact GELU, `x Phi(x)`. By erf as in torch: `jax.nn.gelu` takes erfc, whose gradient is slow on a CPU."""
    return 0.5 * x * (1 + jax.lax.erf(x * jnp.asarray(0.5**0.5, x.dtype)))


# Under the names of Hugging Face's `hidden_act`. `gelu` there is the exact one, not JAX's default.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def check_activation(name: str) -> None:
    """Raises AstraError for an activation that is not known."""
    if name not in ACTIVATIONS:
        raise AstraError(f"config.json: hidden_act is {name!r}; known are {', '.join(sorted(ACTIVATIONS))}")


class MLP(nnx.Module):
    """[B,S,D] -> [B,S,F] -> [B,S,D] with an activation between."""

    def __init__(self, D: int, F: int, activation: str, *, dtype: Any, rngs: nnx.Rngs):
        self.up = nnx.Linear(D, F, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(F, D, dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        return self.down(ACTIVATIONS[self.activation](self.up(x)))
