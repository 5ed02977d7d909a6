"""Which tensor of a Hugging Face checkpoint is which of our parameters: one table per family, data and not code.

A row reads: the tensor `name` ({l} is the number of the block) has the axes `axes`; with its axes in the order `order`
it is our parameter `path`. Parameters under `blocks` are stacked over blocks on a leading axis L. A row whose parameter
a model does not have (projection biases with qkv_bias=False) does not count for it. The same rows serve reading and
writing, so the two cannot disagree.

To add a family: a table and its sizes here, and a line in `FAMILIES`.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jaxtyping import Shaped

from astra_jax.config import AstraConfig


class Key(NamedTuple):
    """One row of a key table.

    Attributes:
      name: the tensor in a Hugging Face checkpoint; {l} stands for the number of the block.
      axes: its axes, each named in the family's sizes; 1 is an axis of length 1.
      path: our parameter, from the model down.
      order: the order of the axes in our parameter, which may join neighbours; axes of length 1 are dropped.
        Empty for the same order.
    """

    name: str
    axes: str
    path: str
    order: str = ""

    @property
    def stacked(self) -> bool:
        """Whether there is one such tensor per block."""
        return "{l}" in self.name

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of the Hugging Face tensor."""
        return tuple(1 if axis == "1" else sizes[axis] for axis in self.axes.split())

    def _transpose(self) -> tuple[list[str], list[int]]:
        axes = [axis for axis in self.axes.split() if axis != "1"]
        return axes, [axes.index(axis) for axis in self.order.split() or axes]

    def to_ours(
        self, theirs: Shaped[np.ndarray, "*theirs"], sizes: Mapping[str, int], shape: tuple[int, ...]
    ) -> Shaped[np.ndarray, "*ours"]:
        """A Hugging Face tensor -> our parameter of one block, which has `shape`."""
        axes, order = self._transpose()
        return theirs.reshape([sizes[axis] for axis in axes]).transpose(order).reshape(shape)

    def to_theirs(self, ours: Shaped[np.ndarray, "*ours"], sizes: Mapping[str, int]) -> Shaped[np.ndarray, "*theirs"]:
        """The inverse of `to_ours`."""
        axes, order = self._transpose()
        return ours.reshape([sizes[axes[i]] for i in order]).transpose(np.argsort(order)).reshape(self.shape(sizes))


def _linear(name: str, path: str, outputs: str, inputs: str) -> tuple[Key, Key]:
    """torch keeps the weight of a linear layer as (outputs, inputs), Flax as (inputs, outputs)."""
    return (
        Key(f"{name}.weight", f"{outputs} {inputs}", f"{path}.kernel", f"{inputs} {outputs}"),
        Key(f"{name}.bias", outputs, f"{path}.bias"),
    )


def _norm(name: str, path: str) -> tuple[Key, Key]:
    return Key(f"{name}.weight", "D", f"{path}.scale"), Key(f"{name}.bias", "D", f"{path}.bias")


_LAYER = "vit.encoder.layer.{l}"

VIT = (
    Key("vit.embeddings.cls_token", "1 1 D", "cls"),
    Key("vit.embeddings.position_embeddings", "1 T D", "position"),
    Key(
        "vit.embeddings.patch_embeddings.projection.weight",
        "D channel row column",
        "embed.kernel",
        "row column channel D",
    ),
    Key("vit.embeddings.patch_embeddings.projection.bias", "D", "embed.bias"),
    *_norm(f"{_LAYER}.layernorm_before", "blocks.norm1"),
    *_linear(f"{_LAYER}.attention.attention.query", "blocks.attention.q", "HE", "D"),
    *_linear(f"{_LAYER}.attention.attention.key", "blocks.attention.k", "JE", "D"),
    *_linear(f"{_LAYER}.attention.attention.value", "blocks.attention.v", "JE", "D"),
    *_linear(f"{_LAYER}.attention.output.dense", "blocks.attention.o", "D", "HE"),
    *_norm(f"{_LAYER}.layernorm_after", "blocks.norm2"),
    *_linear(f"{_LAYER}.intermediate.dense", "blocks.mlp.up", "F", "D"),
    *_linear(f"{_LAYER}.output.dense", "blocks.mlp.down", "D", "F"),
    *_norm("vit.layernorm", "norm"),
    *_linear("classifier", "head", "C", "D"),
)


def vit_sizes(config: Any) -> dict[str, int]:
    """Lengths of the axes in `VIT`: the letters of DESIGN section 2; T counts the class token."""
    D, P = config.hidden_size, config.patch_size
    return {
        "D": D,
        "HE": D,
        "JE": D,
        "F": config.intermediate_size,
        "C": config.num_labels,
        "T": 1 + config.num_patches,
        "channel": config.num_channels,
        "row": P,
        "column": P,
    }


class Family(NamedTuple):
    """A model family: where its classes are, what Hugging Face calls it, and its key table."""

    module: str
    model: str
    config: str
    architecture: str
    keys: tuple[Key, ...]
    sizes: Callable[[Any], dict[str, int]]


# Under Hugging Face's `model_type`. Modules are named and not imported: a verb imports the one family that it needs.
FAMILIES = {"vit": Family("astra_jax.models.vit", "ViT", "ViTConfig", "ViTForImageClassification", VIT, vit_sizes)}


def config_class(family: str) -> type:
    """The configuration dataclass of a family."""
    return getattr(importlib.import_module(FAMILIES[family].module), FAMILIES[family].config)


def build(
    family: str, config: Any, astra: AstraConfig | None = None, dtype: Any = jnp.float32, *, abstract: bool = True
) -> Any:
    """A model of the family: with shapes in place of weights if `abstract`, else freshly initialised.

    Raises:
      AstraError: `astra` does not fit the model (its groups do not divide the width, say).
    """
    make = getattr(importlib.import_module(FAMILIES[family].module), FAMILIES[family].model)

    def model() -> Any:
        return make(config, astra, dtype=dtype, rngs=nnx.Rngs(0))

    return nnx.eval_shape(model) if abstract else model()


def flat_state(model: Any, kind: Any = nnx.Variable) -> dict[str, Any]:
    """The model's variables of a kind: path, as in the key tables -> array (or shape, of an abstract model)."""
    return traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(model, kind)), sep=".")


def with_state(model: Any, flat: dict[str, Any]) -> Any:
    """`model`, which may be abstract, with the arrays of `flat`: the inverse of `flat_state`."""
    graphdef, state = nnx.split(model)
    nnx.replace_by_pure_dict(state, traverse_util.unflatten_dict(flat, sep="."))
    return nnx.merge(graphdef, state)


def model_keys(family: str, model: Any) -> tuple[Key, ...]:
    """The rows of the family's table whose parameter this model has."""
    parameters = flat_state(model, nnx.Param)
    return tuple(key for key in FAMILIES[family].keys if key.path in parameters)
