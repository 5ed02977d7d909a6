"""Language models of transformers that ours are compared with, and on what."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

from astra_jax.inputs.token_batches import Text
from astra_jax.strategies.base import Single
from tests.parity import decoders, encoders
from tests.parity.theirs import PAD, T, V

BASE = decoders.BASE | encoders.BASE
VARIANTS = decoders.VARIANTS | encoders.VARIANTS
MODULES = decoders.MODULES | encoders.MODULES


def torch_model(name: str, randomised: Callable[[Any], Any], **more: Any) -> Any:
    """A tiny random model of transformers."""
    architecture, options = (VARIANTS | encoders.MASKED_LM)[name]
    cls, family = getattr(transformers, architecture), name.split(",")[0]
    options = {"vocab_size": V, "initializer_range": 0.1, **BASE[family], **options, **more}
    return randomised(cls(cls.config_class(**options, attn_implementation="eager")))


def batch(lengths: tuple[int, ...]) -> Text:
    """Random sequences of these lengths, padded to T."""
    ids = np.random.default_rng(1).integers(0, PAD, (len(lengths), T)).astype(np.int32)
    ids = np.where(ids == 1, 2, ids)  # which MPNet takes for padding, wherever it is
    return Text(np.where(np.arange(T) < np.array(lengths)[:, None], ids, PAD), np.array(lengths, np.int32))


def to_torch(text: Text) -> dict[str, torch.Tensor]:
    mask = np.arange(T) < np.asarray(text.lengths)[:, None]
    return {"input_ids": torch.tensor(np.asarray(text.ids)).long(), "attention_mask": torch.tensor(mask).long()}


@nnx.jit
def run(model: Any, text: Text) -> jax.Array:
    """The output of a model on one device."""
    shards = model.shards(1, text)
    return model(shards.scatter(model.to_tokens(text)), Single(shards))[0]


def recorded(model: Any, text: Text) -> tuple[Any, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """The output of a torch model, and what went into every one of its modules and came out of it."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def hook(name: str) -> Any:
        def keep(_: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
            given = args[0] if args else kwargs.get("hidden_states")
            seen[name] = given, out[0] if isinstance(out, tuple) else out

        return keep

    handles = [m.register_forward_hook(hook(n), with_kwargs=True) for n, m in model.named_modules()]
    with torch.no_grad():
        out = model(**to_torch(text))
    for handle in handles:
        handle.remove()
    return out, seen


def jnp_of(tensor: torch.Tensor) -> jax.Array:
    return jnp.asarray(tensor.detach().numpy())
