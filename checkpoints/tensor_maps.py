"""Which tensor of a Hugging Face checkpoint is which of our parameters: one table per family, data and not code.

A row reads: the tensor `name` ({l} is the number of the block) has the axes `axes`; with its axes in the order `order`
it is our parameter `path`, or several of them side by side on its last axis. Parameters under `blocks` are stacked over
blocks on a leading axis L. A row whose parameters a model does not have (biases with qkv_bias=False) does not count for
it. The same rows serve reading and writing, so the two cannot disagree.

To add a family: a table and its sizes here, and a line in `FAMILIES`.
"""

import functools
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jaxtyping import Shaped

from astra_jax.codecs.config import AstraConfig


class Key(NamedTuple):
    """One row of a key table.

    Attributes:
      name: the tensor in a Hugging Face checkpoint; {l} stands for the number of the block.
      axes: its axes, each named in the family's sizes; 1 is an axis of length 1.
      path: our parameter, from the model down; several, separated by spaces, share the tensor's last axis equally.
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

    @property
    def paths(self) -> tuple[str, ...]:
        """Our parameters, in the order in which the tensor holds them."""
        return tuple(self.path.split())

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of the Hugging Face tensor."""
        return tuple(1 if axis == "1" else sizes[axis] for axis in self.axes.split())

    def as_theirs(
        self, ours: Sequence[Shaped[np.ndarray, "..."]], sizes: Mapping[str, int]
    ) -> list[Shaped[np.ndarray, "..."]]:
        """Our parameters of one block, contiguous, as views with the axes of the Hugging Face tensor.

        The tensor is these side by side on its last axis, so that reading fills them and writing joins them.
        """
        *first, last = self.shape(sizes)
        theirs = dict(zip(self.axes.split(), (*first, last // len(self.paths)), strict=True))
        axes = [axis for axis in theirs if axis != "1"]
        order = self.order.split() or axes
        turned = [part.reshape([theirs[axis] for axis in order]) for part in ours]
        back = [order.index(axis) for axis in axes]
        return [part.transpose(back).reshape(*first, last // len(self.paths)) for part in turned]


def _linear(name: str, path: str, outputs: str, inputs: str) -> tuple[Key, Key]:
    """torch keeps the weight of a linear layer as (outputs, inputs), Flax as (inputs, outputs)."""
    return (
        Key(f"{name}.weight", f"{outputs} {inputs}", f"{path}.kernel", f"{inputs} {outputs}"),
        Key(f"{name}.bias", outputs, f"{path}.bias"),
    )


def _conv1d(name: str, paths: str, inputs: str, outputs: str) -> tuple[Key, Key]:
    """GPT-2's own linear layer, which is kept as (inputs, outputs)."""
    kernels, biases = (" ".join(f"{path}.{kind}" for path in paths.split()) for kind in ("kernel", "bias"))
    return Key(f"{name}.weight", f"{inputs} {outputs}", kernels), Key(f"{name}.bias", outputs, biases)


def _norm(name: str, path: str) -> tuple[Key, Key]:
    return Key(f"{name}.weight", "D", f"{path}.scale"), Key(f"{name}.bias", "D", f"{path}.bias")


VIT = (
    Key("embeddings.cls_token", "1 1 D", "cls"),
    Key("embeddings.position_embeddings", "1 T D", "position"),
    Key(
        "embeddings.patch_embeddings.projection.weight", "D channel row column", "embed.kernel", "row column channel D"
    ),
    Key("embeddings.patch_embeddings.projection.bias", "D", "embed.bias"),
    *_norm("encoder.layer.{l}.layernorm_before", "blocks.norm1"),
    *_linear("encoder.layer.{l}.attention.attention.query", "blocks.attention.q", "HE", "D"),
    *_linear("encoder.layer.{l}.attention.attention.key", "blocks.attention.k", "JE", "D"),
    *_linear("encoder.layer.{l}.attention.attention.value", "blocks.attention.v", "JE", "D"),
    *_linear("encoder.layer.{l}.attention.output.dense", "blocks.attention.o", "D", "HE"),
    *_norm("encoder.layer.{l}.layernorm_after", "blocks.norm2"),
    *_linear("encoder.layer.{l}.intermediate.dense", "blocks.mlp.up", "F", "D"),
    *_linear("encoder.layer.{l}.output.dense", "blocks.mlp.down", "D", "F"),
    *_norm("layernorm", "norm"),
)

GPT2 = (
    Key("wte.weight", "V D", "embed.embedding"),
    Key("wpe.weight", "T D", "position"),
    *_norm("h.{l}.ln_1", "blocks.norm1"),
    *_conv1d("h.{l}.attn.c_attn", "blocks.attention.q blocks.attention.k blocks.attention.v", "D", "QKV"),
    *_conv1d("h.{l}.attn.c_proj", "blocks.attention.o", "HE", "D"),
    *_norm("h.{l}.ln_2", "blocks.norm2"),
    *_conv1d("h.{l}.mlp.c_fc", "blocks.mlp.up", "D", "F"),
    *_conv1d("h.{l}.mlp.c_proj", "blocks.mlp.down", "F", "D"),
    *_norm("ln_f", "norm"),
)

LLAMA = (
    Key("embed_tokens.weight", "V D", "embed.embedding"),
    Key("layers.{l}.input_layernorm.weight", "D", "blocks.norm1.scale"),
    *_linear("layers.{l}.self_attn.q_proj", "blocks.attention.q", "HE", "D"),
    *_linear("layers.{l}.self_attn.k_proj", "blocks.attention.k", "JE", "D"),
    *_linear("layers.{l}.self_attn.v_proj", "blocks.attention.v", "JE", "D"),
    *_linear("layers.{l}.self_attn.o_proj", "blocks.attention.o", "D", "HE"),
    Key("layers.{l}.post_attention_layernorm.weight", "D", "blocks.norm2.scale"),
    *_linear("layers.{l}.mlp.gate_proj", "blocks.mlp.gate", "F", "D"),
    *_linear("layers.{l}.mlp.up_proj", "blocks.mlp.up", "F", "D"),
    *_linear("layers.{l}.mlp.down_proj", "blocks.mlp.down", "D", "F"),
    Key("norm.weight", "D", "norm.scale"),
)

BERT = (
    Key("embeddings.word_embeddings.weight", "V D", "embed.embedding"),
    Key("embeddings.position_embeddings.weight", "T D", "position"),
    Key("embeddings.token_type_embeddings.weight", "type D", "token_type"),
    *_norm("embeddings.LayerNorm", "embed_norm"),
    *_linear("encoder.layer.{l}.attention.self.query", "blocks.attention.q", "HE", "D"),
    *_linear("encoder.layer.{l}.attention.self.key", "blocks.attention.k", "JE", "D"),
    *_linear("encoder.layer.{l}.attention.self.value", "blocks.attention.v", "JE", "D"),
    *_linear("encoder.layer.{l}.attention.output.dense", "blocks.attention.o", "D", "HE"),
    *_norm("encoder.layer.{l}.attention.output.LayerNorm", "blocks.norm1"),
    *_linear("encoder.layer.{l}.intermediate.dense", "blocks.mlp.up", "F", "D"),
    *_linear("encoder.layer.{l}.output.dense", "blocks.mlp.down", "D", "F"),
    *_norm("encoder.layer.{l}.output.LayerNorm", "blocks.norm2"),
    *_linear("pooler.dense", "pooler", "pooled", "D"),
)


def _sizes(D: int, HE: int, JE: int, config: Any) -> dict[str, int]:
    return {"D": D, "HE": HE, "JE": JE, "F": config.intermediate_size, "C": config.num_labels}


def vit_sizes(config: Any) -> dict[str, int]:
    """Lengths of the axes in `VIT`: the letters of docs/guide.md; T counts the class token."""
    D, P = config.hidden_size, config.patch_size
    more = {"T": 1 + config.num_patches, "channel": config.num_channels, "row": P, "column": P}
    return _sizes(D, D, D, config) | more


def gpt2_sizes(config: Any) -> dict[str, int]:
    """Lengths of the axes in `GPT2`; QKV are queries, keys and values of all heads, side by side."""
    D = config.n_embd
    return _sizes(D, D, D, config) | {"QKV": 3 * D, "V": config.vocab_size, "T": config.n_positions}


def llama_sizes(config: Any) -> dict[str, int]:
    """Lengths of the axes in `LLAMA`."""
    HE, JE = config.num_attention_heads * config.E, config.J * config.E
    return _sizes(config.hidden_size, HE, JE, config) | {"V": config.vocab_size}


def bert_sizes(config: Any) -> dict[str, int]:
    """Lengths of the axes in `BERT`; `type` counts the kinds of sentences."""
    D = config.hidden_size
    more = {"V": config.vocab_size, "T": config.max_position_embeddings, "type": config.type_vocab_size, "pooled": D}
    return _sizes(D, D, D, config) | more


class Architecture(NamedTuple):
    """One of a family's Hugging Face classes: what stands on top of the family's common part.

    Attributes:
      task: the configuration's `task`; None for a family that has but one.
      keys: rows of the head; none for the common part alone, whose tensors Hugging Face then saves without prefix.
      tied: the tensor of the common part that the head repeats where `tie_word_embeddings` is set.
    """

    task: str | None
    keys: tuple[Key, ...] = ()
    tied: str = ""


class Family(NamedTuple):
    """A model family: where its classes are, and what Hugging Face calls it and its tensors.

    Attributes:
      module, model, config: our module and its classes.
      prefix: of the common part's tensors in a class with a head. In a file it may be there or not.
      keys: the key table of the common part, names without the prefix.
      architectures: the Hugging Face classes; the first is meant where config.json names none.
      sizes: a configuration -> lengths of the tables' axes.
      skipped: patterns of tensors that are no parameters, names without the prefix.
      renamed: old parts of names -> what they are called today.
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

    def bare(self, name: str) -> str:
        """What a tensor in a file is called today, without the prefix."""
        for old, new in self.renamed:
            name = name.replace(old, new)
        return name.removeprefix(self.prefix)

    def is_skipped(self, bare: str) -> bool:
        """Whether a tensor is none of a model's parameters."""
        return any(re.fullmatch(pattern, bare) for pattern in self.skipped)

    def is_mapped(self, bare: str) -> bool:
        """Whether a row of some class of the family is for a tensor."""
        rows = [*self.keys, *(key for architecture in self.architectures.values() for key in architecture.keys)]
        return any(re.fullmatch(re.escape(key.name).replace(r"\{l\}", r"\d+"), bare) for key in rows)


_LM_HEAD, _SCORE = _linear("lm_head", "head", "V", "D"), _linear("score", "head", "C", "D")
_CLASSIFIER = _linear("classifier", "head", "C", "D")

# Under Hugging Face's `model_type`. Modules are named and not imported: a verb imports the one family that it needs.
FAMILIES = {
    "vit": Family(
        *("astra_jax.models.vit", "ViT", "ViTConfig", "vit.", VIT),
        {"ViTForImageClassification": Architecture(None, _CLASSIFIER)},
        vit_sizes,
    ),
    "gpt2": Family(
        *("astra_jax.models.gpt2", "GPT2", "GPT2Config", "transformer.", GPT2),
        {
            "GPT2LMHeadModel": Architecture("causal-lm", _LM_HEAD, tied="wte.weight"),
            "GPT2ForSequenceClassification": Architecture("classification", _SCORE),
        },
        gpt2_sizes,
        skipped=(r"h\.\d+\.attn\.(masked_)?bias",),
    ),
    "llama": Family(
        *("astra_jax.models.llama", "Llama", "LlamaConfig", "model.", LLAMA),
        {
            "LlamaForCausalLM": Architecture("causal-lm", _LM_HEAD, tied="embed_tokens.weight"),
            "LlamaForSequenceClassification": Architecture("classification", _SCORE),
        },
        llama_sizes,
        skipped=(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
    ),
    "bert": Family(
        *("astra_jax.models.bert", "Bert", "BertConfig", "bert.", BERT),
        {
            "BertModel": Architecture("embedding"),
            "BertForSequenceClassification": Architecture("classification", _CLASSIFIER),
        },
        bert_sizes,
        skipped=(r"embeddings\.position_ids",),
        renamed=(("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")),
    ),
}


def config_class(family: str) -> type:
    """The configuration dataclass of a family."""
    return getattr(importlib.import_module(FAMILIES[family].module), FAMILIES[family].config)


def architecture_of(family: str, config: Any) -> str:
    """The Hugging Face class of a configuration."""
    task = getattr(config, "task", None)
    return next(name for name, known in FAMILIES[family].architectures.items() if known.task == task)


def classifies(config: Any) -> bool:
    """Whether a model's output is classes."""
    return getattr(config, "task", "classification") == "classification"


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
        for block in range(parameters[key.paths[0]].shape[0] if key.stacked else 1)
    }
