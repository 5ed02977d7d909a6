"""Which tensor of a Hugging Face checkpoint is which of our parameters: the families, and models made of their sizes.

To add a family: a file in `checkpoints/families`, and its entry here.
"""

import functools
import importlib
from collections.abc import Collection
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx, traverse_util

from astra_jax.codecs.config import AstraConfig
from checkpoints.families import (
    bert,
    clip,
    deit,
    dinov2,
    distilbert,
    gemma,
    gpt2,
    llama,
    mistral,
    modernbert,
    mpnet,
    olmo2,
    phi3,
    qwen,
    roberta,
    siglip,
    smollm3,
    vit,
)
from checkpoints.families.rows import Architecture, Family, Key

_PICTURES = (vit, deit, dinov2, clip, siglip)
_TEXTS = (gpt2, llama, bert, roberta, distilbert, mpnet, modernbert, qwen, mistral, smollm3, phi3, olmo2, gemma)
# Under Hugging Face's `model_type`. Our modules are named and not imported: a verb imports the one that it needs.
FAMILIES: dict[str, Family] = {name: family for one in (*_PICTURES, *_TEXTS) for name, family in one.FAMILIES.items()}


def config_class(family: str) -> type:
    """The configuration dataclass of a family."""
    return getattr(importlib.import_module(FAMILIES[family].module), FAMILIES[family].config)


def architecture_of(family: str, config: Any) -> str:
    """The Hugging Face class of a configuration."""
    kind = getattr(config, "task", None), getattr(config, "masked_lm", False)

    def is_meant(known: Architecture) -> bool:
        said = all(getattr(config, field) == value for field, value in known.settings.items())
        return said and (known.task, known.masked_lm) == kind

    return next(name for name, known in FAMILIES[family].architectures.items() if is_meant(known))


def has_masked_lm(family: str, names: Collection[str]) -> bool:
    """Whether tensors with these names, without prefix, have something of the head of a masked language model."""
    heads = (known for known in FAMILIES[family].architectures.values() if known.masked_lm)
    return any(key.name in names for head in heads for key in head.keys)


def classifies(config: Any) -> bool:
    """Whether a model's output is classes."""
    return getattr(config, "task", "classification") == "classification"


def embeds(config: Any) -> bool:
    """Whether a model's output is embeddings, of texts or of pictures."""
    return getattr(config, "task", None) in ("embedding", "image-embedding")


def build(
    family: str, config: Any, astra: AstraConfig | None = None, dtype: Any = jnp.float32, *, abstract: bool = True
) -> Any:
    """A model of the family: with shapes in place of weights if `abstract`, else freshly initialised.

    Raises:
      AstraError: `astra` does not fit the model (its groups do not divide the width, say).
    """
    return (
        nnx.clone(_abstract(family, config, astra, jnp.dtype(dtype)))
        if abstract
        else _make(family, config, astra, dtype)
    )


def _make(family: str, config: Any, astra: AstraConfig | None, dtype: Any) -> Any:
    make = getattr(importlib.import_module(FAMILIES[family].module), FAMILIES[family].model)
    return make(config, astra, dtype=dtype, rngs=nnx.Rngs(0))


@functools.lru_cache(64)
def _abstract(family: str, config: Any, astra: AstraConfig | None, dtype: Any) -> Any:
    """Tracing a model takes longer than all else that is done with its shapes."""
    return nnx.eval_shape(lambda: _make(family, config, astra, dtype))


def flat_state(model: Any, kind: Any = nnx.Variable) -> dict[str, Any]:
    """The model's variables of a kind: path, as in the key tables -> array (or shape, of an abstract model)."""
    return traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(model, kind)), sep=".")


def with_state(model: Any, flat: dict[str, Any]) -> Any:
    """`model`, which may be abstract, with the arrays of `flat`: the inverse of `flat_state`."""
    graphdef, state = nnx.split(model)
    nnx.replace_by_pure_dict(state, traverse_util.unflatten_dict(flat, sep="."))
    return nnx.merge(graphdef, state)


class Tensor(NamedTuple):
    """A tensor that a model needs: its row, and its block (None where it is not one of many)."""

    key: Key
    block: int | None


def model_tensors(family: str, model: Any) -> dict[str, Tensor]:
    """Every tensor of a model's Hugging Face checkpoint, by the name that Hugging Face saves it under."""
    known, parameters = FAMILIES[family], flat_state(model, nnx.Param)
    head = known.architectures[architecture_of(family, model.config)].keys
    prefix = known.prefix if head else ""
    rows = [*(key._replace(name=prefix + key.name) for key in known.keys), *head]
    return {
        key.name.format(l=block): Tensor(key, block if key.stacked else None)
        for key in rows
        if key.paths[0] in parameters
        for block in range(key.since, parameters[key.paths[0]].shape[0] if key.stacked else 1)
    }
