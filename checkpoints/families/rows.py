"""What a key table is made of: rows, and what a family says of itself.

A row reads: the tensor `name` ({l} is the number of the block) has the axes `axes`; with its axes in the order `order`
it is our parameter `path`, or several of them side by side. Parameters under `blocks` are stacked over blocks on a
leading axis L. A row whose parameters a model does not have (biases with qkv_bias=False) does not count for it. The
same rows serve reading and writing, so the two cannot disagree.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped


class Key(NamedTuple):
    """One row of a key table.

    Attributes:
      name: the tensor in a Hugging Face checkpoint; {l} stands for the number of the block.
      axes: its axes, each named in the family's sizes; 1 is an axis of length 1. `HE+JE+JE` is an axis on which
        several parameters stand side by side.
      path: our parameter, from the model down; several, separated by spaces, share such an axis.
      order: the order of the axes in our parameter, which may join neighbours; axes of length 1 are dropped.
        Empty for the same order.
      since: the first block that has such a tensor. What our parameter holds of the blocks before counts for nothing.
    """

    name: str
    axes: str
    path: str
    order: str = ""
    since: int = 0

    @property
    def stacked(self) -> bool:
        """Whether there is one such tensor per block."""
        return "{l}" in self.name

    @property
    def paths(self) -> tuple[str, ...]:
        """Our parameters, in the order in which the tensor holds them."""
        return tuple(self.path.split())

    @property
    def shared(self) -> int:
        """The axis of the tensor on which our parameters stand side by side."""
        return next((n for n, axis in enumerate(self.axes.split()) if "+" in axis), 0)

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of the Hugging Face tensor."""
        return tuple(sum(_lengths(axis, sizes)) for axis in self.axes.split())

    def as_theirs(
        self, ours: Sequence[Shaped[np.ndarray, "..."]], sizes: Mapping[str, int]
    ) -> list[Shaped[np.ndarray, "..."]]:
        """Our parameters of one block, contiguous, as views with the axes of the Hugging Face tensor.

        The tensor is these side by side on its axis `shared`, so that reading fills them and writing joins them.
        """
        names = self.axes.split()
        axes = [axis for axis in names if axis != "1"]
        order = self.order.split() or axes
        back = [order.index(axis) for axis in axes]

        def view(part: Shaped[np.ndarray, "..."], number: int) -> Shaped[np.ndarray, "..."]:
            lengths = {axis: _lengths(axis, sizes)[number if "+" in axis else 0] for axis in names}
            turned = part.reshape([lengths[axis] for axis in order])
            return turned.transpose(back).reshape([lengths[axis] for axis in names])

        return [view(part, number) for number, part in enumerate(ours)]

    def fill(self, views: Sequence[Shaped[np.ndarray, "..."]], rows: slice, piece: Shaped[np.ndarray, "..."]) -> None:
        """Puts some rows of the Hugging Face tensor where they belong in what `as_theirs` made."""
        start = 0
        for view in views:
            length = view.shape[self.shared]
            if self.shared:
                columns = [slice(None)] * self.shared + [slice(start, start + length)]
                view[rows] = piece[tuple(columns)]
            else:
                first, last = max(rows.start, start), min(rows.stop, start + length)
                if first < last:
                    view[first - start : last - start] = piece[first - rows.start : last - rows.start]
            start += length


def _lengths(axis: str, sizes: Mapping[str, int]) -> list[int]:
    """Of every part of an axis."""
    return [1 if part == "1" else sizes[part] for part in axis.split("+")]


def linear(name: str, path: str, outputs: str, inputs: str) -> tuple[Key, Key]:
    """torch keeps the weight of a linear layer as (outputs, inputs), Flax as (inputs, outputs). Several of them may be
    one tensor: `path` and `outputs` then name each (`q k v`, `HE+JE+JE`)."""
    kernels, biases = (" ".join(f"{one}.{kind}" for one in path.split()) for kind in ("kernel", "bias"))
    return (
        Key(f"{name}.weight", f"{outputs} {inputs}", kernels, f"{inputs} {outputs}"),
        Key(f"{name}.bias", outputs, biases),
    )


def norm(name: str, path: str, axis: str = "D") -> tuple[Key, Key]:
    """A LayerNorm, or an RMSNorm, which has no bias."""
    return Key(f"{name}.weight", axis, f"{path}.scale"), Key(f"{name}.bias", axis, f"{path}.bias")


def common_sizes(D: int, HE: int, JE: int, config: Any) -> dict[str, int]:
    """Lengths of the axes that all families have, under the letters of docs/guide.md."""
    return {"D": D, "HE": HE, "JE": JE, "F": config.intermediate_size, "C": config.num_labels}


class Architecture(NamedTuple):
    """One of a family's Hugging Face classes: what stands on top of the family's common part.

    Attributes:
      task: the configuration's `task`; None for a family that has but one.
      keys: rows of the head; none for the common part alone, whose tensors Hugging Face then saves without prefix.
      tied: what the first rows of the head repeat where `tie_word_embeddings` is set, a tensor each, separated by
        spaces.
      masked_lm: whether the head is that of a masked language model, which is kept and not computed.
      settings: fields of the configuration that say which class it is, where `task` is not enough.
    """

    task: str | None
    keys: tuple[Key, ...] = ()
    tied: str = ""
    masked_lm: bool = False
    settings: Mapping[str, Any] = MappingProxyType({})

    @property
    def ties(self) -> dict[str, str]:
        """Tensors of the head, and those that they repeat where `tie_word_embeddings` is set."""
        return dict(zip((key.name for key in self.keys), self.tied.split(), strict=False))


def masked_lm(
    dense: str, norm_name: str, decoder: str, bias: str, embedding: str = "embeddings.word_embeddings"
) -> Architecture:
    """The head of a masked language model. Its decoder is the embedding; its bias is stored by itself, in some families
    also as the decoder's.

    Args:
      dense, norm_name, decoder, bias, embedding: what Hugging Face calls its layers, and the tensor of its bias.
    """
    # No model here has parameters of these rows: tied tensors are their others.
    weight, other_bias = Key(f"{decoder}.weight", "V D", "decoder"), Key(f"{decoder}.bias", "V", "decoder")
    tied = (weight, other_bias) if other_bias.name != bias else (weight,)
    own = (*linear(dense, "masked_lm.dense", "pooled", "D"), *norm(norm_name, "masked_lm.norm"))
    return Architecture(
        "embedding",
        (*tied, Key(bias, "V", "masked_lm.bias"), *own),
        " ".join((f"{embedding}.weight", bias)[: len(tied)]),
        masked_lm=True,
    )


class Family(NamedTuple):
    """A model family: where its classes are, and what Hugging Face calls it and its tensors.

    Attributes:
      module, model, config: our module and its classes.
      prefix: of the common part's tensors in a class with a head. In a file it may be there or not.
      keys: the key table of the common part, names without the prefix.
      architectures: the Hugging Face classes; the first is meant where config.json names none.
      sizes: a configuration -> lengths of the tables' axes.
      skipped: patterns of tensors that are no parameters, names without the prefix.
      left_out: patterns of heads and models that a file may have besides, and that are neither computed nor kept.
      renamed: old parts of names -> what they are called today.
      harmless: fields of a config.json that change nothing of what is computed, besides those of all families.
    """

    module: str
    model: str
    config: str
    prefix: str
    keys: tuple[Key, ...]
    architectures: dict[str, Architecture]
    sizes: Callable[[Any], dict[str, int]]
    skipped: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    harmless: str = ""
    left_out: tuple[str, ...] = ()

    def bare(self, name: str) -> str:
        """What a tensor in a file is called today, without the prefix."""
        for old, new in self.renamed:
            name = name.replace(old, new)
        return name.removeprefix(self.prefix)

    def is_skipped(self, bare: str) -> bool:
        """Whether a tensor is none of a model's parameters."""
        return any(re.fullmatch(pattern, bare) for pattern in self.skipped)

    def is_left_out(self, bare: str) -> bool:
        """Whether a tensor is of a head or model that is neither computed nor kept."""
        return any(re.fullmatch(pattern, bare) for pattern in self.left_out)

    def is_mapped(self, bare: str) -> bool:
        """Whether a row of some class of the family is for a tensor."""
        rows = [*self.keys, *(key for architecture in self.architectures.values() for key in architecture.keys)]
        return any(re.fullmatch(re.escape(key.name).replace(r"\{l\}", r"\d+"), bare) for key in rows)
