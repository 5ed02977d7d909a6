"""Tiny models of every family, their Hugging Face folders and checkpoints, and what is done to those in tests."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import checkpoints
from astra_jax.cli.main import main
from astra_jax.codecs.config import VQConfig
from astra_jax.errors import AstraError
from astra_jax.models.bert import BertConfig
from astra_jax.models.clip import CLIPVisionConfig
from astra_jax.models.deit import DeiTConfig
from astra_jax.models.dinov2 import Dinov2Config, Dinov2WithRegistersConfig
from astra_jax.models.distilbert import DistilBertConfig
from astra_jax.models.gemma import Gemma3TextConfig
from astra_jax.models.gpt2 import GPT2Config
from astra_jax.models.llama import LlamaConfig
from astra_jax.models.modernbert import ModernBertConfig
from astra_jax.models.mpnet import MPNetConfig
from astra_jax.models.olmo2 import Olmo2Config
from astra_jax.models.phi3 import Phi3Config
from astra_jax.models.qwen import Qwen3Config
from astra_jax.models.roberta import RobertaConfig
from astra_jax.models.rotary import Rotary
from astra_jax.models.siglip import SiglipVisionConfig
from astra_jax.models.vit import ViTConfig
from checkpoints import huggingface
from checkpoints.tensor_maps import FAMILIES, build, flat_state, with_state

VIT = ViTConfig(
    hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4,
    num_labels=3,
)  # fmt: skip
GPT2 = GPT2Config(vocab_size=11, n_positions=6, n_embd=8, n_layer=2, n_head=2)
SMALL: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 16,
}
LONG: dict[str, Any] = {
    "factor": 2.0,
    "original_max_position_embeddings": 8,
    "short_factor": (1.0, 1.5, 2.0),
    "long_factor": (1.0, 2.0, 4.0),
}
LLAMA = LlamaConfig(**SMALL)
BERT = BertConfig(
    vocab_size=11,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=6,
)
DINOV2 = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2, "image_size": 8}
CONFIGS = {
    "vit": ("vit", VIT),
    "deit, teacher": ("deit", DeiTConfig(**dataclasses.asdict(VIT), with_teacher=True)),
    "dinov2": ("dinov2", Dinov2Config(**DINOV2, patch_size=4, use_swiglu_ffn=True, use_mask_token=False)),
    "dinov2, registers, classes": (
        "dinov2_with_registers",
        Dinov2WithRegistersConfig(**DINOV2, patch_size=4, task="classification", num_labels=3),
    ),
    "clip": (
        "clip_vision_model",
        CLIPVisionConfig(
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=12,
            image_size=8,
            patch_size=4,
            projection_dim=6,
        ),
    ),
    "siglip": (
        "siglip_vision_model",
        SiglipVisionConfig(
            hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4
        ),
    ),
    "gpt2": ("gpt2", GPT2),
    "gpt2, untied": ("gpt2", dataclasses.replace(GPT2, tie_word_embeddings=False, n_inner=20)),
    "gpt2, classes": ("gpt2", dataclasses.replace(GPT2, task="classification", num_labels=3)),
    "llama": ("llama", LLAMA),
    "llama, tied": ("llama", dataclasses.replace(LLAMA, tie_word_embeddings=True, attention_bias=True)),
    "llama, classes": ("llama", dataclasses.replace(LLAMA, task="classification", num_labels=3, mlp_bias=True)),
    "qwen3": ("qwen3", Qwen3Config(**SMALL)),
    "phi3": ("phi3", Phi3Config(**SMALL, rope_parameters=Rotary("longrope", **LONG))),
    "olmo2": ("olmo2", Olmo2Config(**SMALL, attention_bias=True)),
    "gemma3": ("gemma3_text", Gemma3TextConfig(**SMALL, layer_types=("sliding_attention", "full_attention"))),
    "modernbert": (
        "modernbert",
        ModernBertConfig(
            vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2
        ),
    ),
    "bert": ("bert", BERT),
    "bert, no pooler": ("bert", dataclasses.replace(BERT, pooler=False, pooling="last", normalize=True)),
    "bert, classes": ("bert", dataclasses.replace(BERT, task="classification", pooling="class")),
    "bert, masked words": ("bert", dataclasses.replace(BERT, masked_lm=True, pooler=False)),
    "roberta, classes": (
        "roberta",
        RobertaConfig(**{**vars(BERT), "task": "classification", "pooling": "class", "pooler": False}),
    ),
    "mpnet": (
        "mpnet",
        MPNetConfig(
            **{name: getattr(BERT, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")},
            **{name: getattr(BERT, name) for name in ("num_attention_heads", "intermediate_size")},
            max_position_embeddings=8,
        ),
    ),
    "distilbert": (
        "distilbert",
        DistilBertConfig(vocab_size=11, dim=8, n_layers=2, n_heads=2, hidden_dim=12, max_position_embeddings=6),
    ),
}
each_model = pytest.mark.parametrize("name", CONFIGS)
ASTRA = VQConfig(groups=2, codewords=8)
NUMBERED = GPT2Config(vocab_size=14, n_positions=6, n_embd=8, n_layer=1, n_head=2)
QUERY = "vit.encoder.layer.1.attention.attention.query.weight"
NORM = "vit.layernorm.weight"


def drawn(family: str, config: Any, dtype: Any = np.float32) -> Any:
    """A model with random weights, which take no compiling."""
    rng, model = np.random.default_rng(0), build(family, config)
    flat = {path: rng.normal(size=a.shape).astype(dtype) for path, a in flat_state(model).items()}
    for key in FAMILIES[family].keys:
        if key.since and key.path in flat:  # no file says it
            flat[key.path][: key.since] = 1
    return with_state(model, {path: jnp.asarray(a) for path, a in flat.items()})


def described(family: str, config: Any, **more: Any) -> checkpoints.Checkpoint:
    """A checkpoint that came from nowhere."""
    nothing = dict.fromkeys(("astra", "labels", "preprocessing", "model"))
    known = nothing | {"hf_config": {}, "dtype": "float32", "history": ()}
    return checkpoints.Checkpoint(family, config, **(known | more))


def write(folder: Path, name: str) -> checkpoints.Checkpoint:
    """Writes the model of that name as a Hugging Face folder."""
    family, config = CONFIGS[name]
    checkpoint = described(family, config, model=drawn(family, config))
    huggingface.write_folder(checkpoint, folder)
    return checkpoint


def rename(folder: Path, change: Any, **more: Any) -> None:
    """Changes the names of all tensors, and adds some."""
    tensors = {change(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file({**tensors, **more}, folder / "model.safetensors")


def edit(folder: Path, **changes: Any) -> None:
    """Replaces tensors (None removes one); the names of changes have `__` for dots."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        tensors[name.replace("__", ".")] = tensor
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def fault(folder: Path) -> str:
    """The one line that reading the folder ends in."""
    with pytest.raises(AstraError) as caught:
        huggingface.read(str(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(a: Any, b: Any) -> bool:
    """Whether two models have equal variables. Compared by numpy, as jnp compiles a program for every shape."""
    a, b = flat_state(a), flat_state(b)
    return a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)


def refused(path: Path) -> str:
    """The one line that loading a checkpoint ends in."""
    with pytest.raises(AstraError) as caught:
        checkpoints.load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The line on stderr of a command that must end in exit code 2."""
    assert main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("astra: error: ")
    return lines[0]


def is_whole(path: Path, expected: checkpoints.Checkpoint) -> bool:
    """Whether a checkpoint is all as expected; fails where it is in part."""
    found = checkpoints.load(path)
    ours, theirs = flat_state(found.model), flat_state(expected.model)
    assert found.tokenizer_files and expected.tokenizer_files
    tokenizers = [
        (files / "tokenizer.json").read_bytes() for files in (found.tokenizer_files, expected.tokenizer_files)
    ]
    same = {
        "weights": all(np.array_equal(ours[name], theirs[name]) for name in theirs),
        "tokenizer": tokenizers[0] == tokenizers[1],
        "history": found.history == expected.history,
    }
    assert len(set(same.values())) == 1, same
    return same["weights"]


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())
