"""Low-rank adaptation (LoRA, 2106.09685): beside a frozen kernel a product of two narrow ones is trained.

`add` puts adapters beside the linear layers of a model's blocks, and `merge_into` adds what they learned to kernels.
"""

import dataclasses
import fnmatch
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from astra_jax.cli.arguments import Texts
from astra_jax.errors import AstraError
from astra_jax.models.blocks import stack_blocks
from astra_jax.models.layers import Adapter, ColumnLinear, RowLinear


@dataclasses.dataclass(frozen=True)
class Lora:
    """What `--trains lora` adds to a model.

    Raises:
      AstraError: a value is outside its range.
    """

    rank: int = 16
    """r: how wide the product of an adapter is inside."""
    alpha: float = 32.0
    """What an adapter adds is `alpha / r` times its product."""
    targets: Texts = ("attention.*", "mlp.*")
    """Beside which layers of a block; * stands for anything: attention.q, attention.*, mlp.up."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise AstraError(f"--rank is {self.rank}; it must be at least 1: try 16")
        if not self.alpha > 0:
            raise AstraError(f"--alpha is {self.alpha}; it must be above 0: try {2 * self.rank}")
        if not self.targets:
            raise AstraError("--targets is empty: name layers, such as attention.*")

    def check(self, trains: str) -> None:
        """Raises AstraError where this is set, and nothing is done with it."""
        if trains != "lora" and self != Lora():
            raise AstraError(
                f"--rank, --alpha and --targets are for --trains lora, and not for {trains}: leave them out"
            )


def linears(model: Any) -> Iterator[tuple[str, Any]]:
    """The linear layers of a model's blocks, stacked, under names such as `attention.q`."""
    for path, module in nnx.iter_modules(model.blocks):
        if isinstance(module, ColumnLinear | RowLinear):
            yield ".".join(map(str, path)), module


def add(model: Any, lora: Lora, seed: int) -> int:
    """Puts adapters into a model; returns how many. At first they add nothing.

    Raises:
      AstraError: a target is none of its layers.
    """
    layers = dict(linears(model))
    found = {target: {name for name in layers if fnmatch.fnmatchcase(name, target)} for target in lora.targets}
    for target, names in found.items():
        if not names:
            raise AstraError(f"--targets {target} is no layer of this model: it has {', '.join(layers)}")
    chosen = sorted(set().union(*found.values()))
    for number, name in enumerate(chosen):
        rngs = nnx.Rngs(jax.random.fold_in(jax.random.key(seed), number))
        layers[name].adapter = _adapters(layers[name], lora, rngs)
    return len(chosen)


def _adapters(layer: Any, lora: Lora, rngs: nnx.Rngs) -> Adapter:
    """A stack of them, for that of a layer."""
    L, inputs, outputs = layer.kernel.shape
    return stack_blocks(
        lambda rngs: Adapter(inputs, outputs, lora.rank, lora.alpha, dtype=layer.dtype, rngs=rngs), L, rngs
    )


def merge_into(original: Any, trained: Any) -> None:
    """Adds what the adapters of `trained` learned to the kernels of `original`, the same model without adapters."""
    layers = dict(linears(original))
    for name, layer in linears(trained):
        if layer.adapter is not None:
            kernel = layers[name].kernel
            a, b = (jax.device_get(part[...]) for part in (layer.adapter.lora_a, layer.adapter.lora_b))
            kernel[...] = kernel[...] + layer.adapter.scale * jnp.einsum("lir,lro->lio", a, b)
