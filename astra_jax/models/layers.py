"""Small layers and checks that several families share."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from astra_jax.codecs.config import LARGEST
from astra_jax.errors import AstraError


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Exact GELU, `x Phi(x)`. By erf as in torch: `jax.nn.gelu` takes erfc, whose gradient is slow on a CPU."""
    return 0.5 * x * (1 + jax.lax.erf(x * jnp.asarray(0.5**0.5, x.dtype)))


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x sigmoid(1.702 x)`, which CLIP has in place of GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


# Under the names of Hugging Face's `hidden_act`. `gelu` there is the exact one, not JAX's default.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


# What the axes of a block's weights are, said where a weight is made, for strategies that split them: the hidden width,
# or what is within a layer and comes in whole parts, heads and columns of the MLP. A stack has one more axis in front.
HIDDEN, INNER = "hidden", "inner"
OF_HIDDEN, OF_INNER = {"axes": (HIDDEN,)}, {"axes": (INNER,)}


def axis_of(weight: nnx.Variable, name: str) -> int:
    """Which axis of a weight, counted from the last, is called that; 0 for none."""
    axes = weight.get_metadata().get("axes", ())
    return axes.index(name) - len(axes) if name in axes else 0


# flax by default takes the variance as E[x^2] - E[x]^2, which in float32 is wrong where the mean is far larger than the
# deviation: by 4e-3 of the output at a hundred times.
LayerNorm = partial(nnx.LayerNorm, use_fast_variance=False, scale_metadata=OF_HIDDEN, bias_metadata=OF_HIDDEN)
RMSNorm = partial(nnx.RMSNorm, scale_metadata=OF_HIDDEN)


class GemmaNorm(nnx.Module):
    """RMSNorm that multiplies with 1 + scale, in float32.

    Args:
      width: of what is normalised.
      hidden: whether that is the hidden state, and not a head.
    """

    def __init__(self, width: int, *, epsilon: float, dtype: Any, hidden: bool = True):
        axes: dict[str, Any] = OF_HIDDEN if hidden else {}
        self.scale = nnx.Param(jnp.zeros(width), **axes)
        self.epsilon, self.dtype = epsilon, dtype

    def __call__(self, x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
        wide = x.astype(jnp.float32)
        square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(square + self.epsilon) * (1 + self.scale[...].astype(jnp.float32))
        return normed.astype(self.dtype)


def check_activation(field: str, name: str) -> None:
    """Raises AstraError for an activation that is not known."""
    if name not in ACTIVATIONS:
        raise AstraError(f"config.json: {field} is {name!r}; known are {', '.join(sorted(ACTIVATIONS))}")


def check_choice(config: Any, field: str, choices: Any) -> None:
    """Raises AstraError unless a field has one of the values of the Literal `choices`."""
    if getattr(config, field) not in get_args(choices):
        allowed = ", ".join(get_args(choices))
        raise AstraError(f"config.json: {field} is {getattr(config, field)!r}; it must be one of {allowed}")


# The most there can be of what is not only a size: blocks, and pixels on a side.
MOST = dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), 10_000) | {
    "image_size": 16_384,
    "picture_size": 16_384,
}
LEAST = {"pad_token_id": 0}  # of what is no size


def check_numbers(config: Any) -> None:
    """Raises AstraError unless every number of a configuration is one.

    Whole numbers are from 1 or `LEAST` to `MOST` or `LARGEST` (or None if they may be); fractions, which are norms'
    epsilons, from 0 to 1.
    """
    for field in dataclasses.fields(config):
        value, most, least = getattr(config, field.name), MOST.get(field.name, LARGEST), LEAST.get(field.name, 1)
        wanted = None
        if field.type in ("int", int, "int | None", int | None):
            optional = value is None and "None" in str(field.type)
            if not optional and not (isinstance(value, int) and least <= value <= most):
                above = isinstance(value, int) and value > most
                wanted = f"a whole number of at most {most:,}" if above else f"a whole number of at least {least}"
        elif field.type in ("float", float) and not (isinstance(value, int | float) and 0 <= value <= 1):
            wanted = "a number from 0 to 1"
        if wanted:
            raise AstraError(f"config.json: {field.name} is {value!r}; it must be {wanted}")


def check_divides(config: Any, whole: str, part: str) -> None:
    """Raises AstraError unless the field `whole` is a multiple of the field `part`."""
    if getattr(config, whole) % getattr(config, part):
        raise AstraError(
            f"config.json: {whole} {getattr(config, whole)} is not a multiple of {part} {getattr(config, part)}"
        )


class Adapter(nnx.LoRA):
    """What low-rank adaptation adds to a linear layer, `alpha / r x A B` (2106.09685): nothing, at first."""

    def __init__(self, inputs: int, outputs: int, rank: int, alpha: float, *, dtype: Any, rngs: nnx.Rngs):
        super().__init__(inputs, rank, outputs, dtype=dtype, rngs=rngs)
        self.scale = alpha / rank

    def __call__(self, x: Float[Array, "*tokens rows"]) -> Float[Array, "*tokens columns"]:  # type: ignore[override]
        return self.scale * super().__call__(x)


class ColumnLinear(nnx.Linear):
    """A linear layer that reads the hidden state. Some columns of its kernel may be here, and the rest elsewhere."""

    def __init__(self, inputs: int, outputs: int, **options: Any):
        axes = {"axes": (HIDDEN, INNER)}
        super().__init__(inputs, outputs, kernel_metadata=axes, bias_metadata=OF_INNER, **options)
        self.adapter: Adapter | None = nnx.data(None)

    def __call__(self, x: Float[Array, "*tokens rows"]) -> Float[Array, "*tokens columns"]:  # type: ignore[override]
        y = super().__call__(x)
        return y if self.adapter is None else y + self.adapter(x)


class RowLinear(nnx.Linear):
    """A linear layer that writes to the hidden state. Some rows of its kernel may be here, and the rest elsewhere: the
    strategy adds up the parts."""

    def __init__(self, inputs: int, outputs: int, **options: Any):
        axes = {"axes": (INNER, HIDDEN)}
        super().__init__(inputs, outputs, kernel_metadata=axes, bias_metadata=OF_HIDDEN, **options)
        self.adapter: Adapter | None = nnx.data(None)

    def __call__(  # type: ignore[override]  # a strategy where Flax has a sharding
        self, x: Float[Array, "B S rows"], strategy: Any
    ) -> Float[Array, "B S columns"]:
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = self.promote_dtype((x, self.kernel[...], bias), dtype=self.dtype)
        y = strategy.reduce(x @ kernel)
        if self.adapter is not None:
            y = y + self.adapter(x)
        return y if bias is None else y + bias


class MLP(nnx.Module):
    """[B,S,D] -> [B,S,F] -> [B,S,D] with an activation between."""

    def __init__(self, D: int, F: int, activation: str, *, dtype: Any, rngs: nnx.Rngs):
        self.up = ColumnLinear(D, F, dtype=dtype, rngs=rngs)
        self.down = RowLinear(F, D, dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Float[Array, "B S D"], strategy: Any) -> Float[Array, "B S D"]:
        return self.down(ACTIVATIONS[self.activation](self.up(x)), strategy)


class GatedMLP(nnx.Module):
    """[B,S,D] -> [B,S,D]: `down(activation(gate(x)) * up(x))`, F wide inside."""

    def __init__(self, D: int, F: int, activation: str, *, use_bias: bool, dtype: Any, rngs: nnx.Rngs):
        self.gate = ColumnLinear(D, F, use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.up = ColumnLinear(D, F, use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.down = RowLinear(F, D, use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Float[Array, "B S D"], strategy: Any) -> Float[Array, "B S D"]:
        return self.down(ACTIVATIONS[self.activation](self.gate(x)) * self.up(x), strategy)
