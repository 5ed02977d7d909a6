"""The strict reader of Hugging Face folders, the checkpoint store, and the three verbs."""

import dataclasses
import errno
import json
import math
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

import checkpoints
from astra_jax.cli.main import main
from astra_jax.codecs.config import AstraConfig
from astra_jax.errors import AstraError
from astra_jax.mesh.sharding import make_mesh
from astra_jax.models.bert import BertConfig
from astra_jax.models.gpt2 import GPT2Config
from astra_jax.models.llama import LlamaConfig
from astra_jax.models.vit import ViTConfig
from astra_jax.serving.compile import shardings
from astra_jax.strategies.rivals import TensorParallel
from checkpoints import configs, huggingface, store
from checkpoints.info import parameters
from checkpoints.streaming import cut
from checkpoints.tensor_maps import FAMILIES, Key, build, flat_state, model_tensors, with_state

CONFIG = ViTConfig(
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=12,
    image_size=8,
    patch_size=4,
    num_labels=3,
)
ASTRA = AstraConfig(groups=2, codewords=8)
QUERY = "vit.encoder.layer.1.attention.attention.query.weight"
NORM = "vit.layernorm.weight"


@pytest.fixture
def checkpoint() -> checkpoints.Checkpoint:
    return checkpoints.Checkpoint(
        family="vit",
        config=CONFIG,
        astra=None,
        labels=("cat", "dog", "emu"),
        preprocessing={"size": {"height": 8, "width": 8}},
        hf_config={},
        dtype="float32",
        history=({"verb": "convert", "source": "somewhere"},),
        model=build("vit", CONFIG, abstract=False),
    )


@pytest.fixture
def folder(checkpoint: checkpoints.Checkpoint, tmp_path: Path) -> Path:
    """A Hugging Face folder that can be read."""
    huggingface.write_folder(checkpoint, tmp_path / "hf")
    return tmp_path / "hf"


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
    a, b = flat_state(a), flat_state(b)
    return a.keys() == b.keys() and all(bool(jnp.array_equal(a[path], b[path])) for path in a)


# Key tables


GPT2 = GPT2Config(vocab_size=11, n_positions=6, n_embd=8, n_layer=2, n_head=2)
LLAMA = LlamaConfig(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=16,
)
BERT = BertConfig(
    vocab_size=11,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=6,
)
CONFIGS = {
    "vit": ("vit", CONFIG),
    "gpt2": ("gpt2", GPT2),
    "gpt2, untied": ("gpt2", dataclasses.replace(GPT2, tie_word_embeddings=False, n_inner=20)),
    "gpt2, classes": ("gpt2", dataclasses.replace(GPT2, task="classification", num_labels=3)),
    "llama": ("llama", LLAMA),
    "llama, tied": ("llama", dataclasses.replace(LLAMA, tie_word_embeddings=True, attention_bias=True)),
    "llama, classes": ("llama", dataclasses.replace(LLAMA, task="classification", num_labels=3, mlp_bias=True)),
    "bert": ("bert", BERT),
    "bert, no pooler": ("bert", dataclasses.replace(BERT, pooler=False, pooling="last", normalize=True)),
    "bert, classes": ("bert", dataclasses.replace(BERT, task="classification", pooling="class")),
}
each_model = pytest.mark.parametrize("name", CONFIGS)


def drawn(family: str, config: Any, dtype: Any = np.float32) -> Any:
    """A model with random weights, which take no compiling."""
    rng, model = np.random.default_rng(0), build(family, config)
    return with_state(
        model, {p: jnp.asarray(rng.normal(size=a.shape).astype(dtype)) for p, a in flat_state(model).items()}
    )


def described(family: str, config: Any, **more: Any) -> checkpoints.Checkpoint:
    """A checkpoint that came from nowhere."""
    defaults: dict[str, Any] = dict(
        family=family,
        config=config,
        astra=None,
        labels=None,
        preprocessing=None,
        hf_config={},
        dtype="float32",
        history=(),
        model=None,
    )
    return checkpoints.Checkpoint(**{**defaults, **more})


@each_model
def test_the_table_names_every_parameter_once(name: str) -> None:
    family, config = CONFIGS[name]
    model = build(family, config)
    tensors, parameters, sizes = model_tensors(family, model), flat_state(model), FAMILIES[family].sizes(config)
    blocks = {path: a.shape[0] if path.startswith("blocks.") else 1 for path, a in parameters.items()}
    named = [(path, block or 0) for key, block in tensors.values() for path in key.paths]
    assert sorted(named) == sorted((path, block) for path, L in blocks.items() for block in range(L))
    for key, _ in tensors.values():
        ours = sum(math.prod(parameters[path].shape[1 if key.stacked else 0 :]) for path in key.paths)
        assert ours == math.prod(key.shape(sizes))


def test_patches_are_row_column_channel() -> None:
    key = next(key for key in FAMILIES["vit"].keys if key.path == "embed.kernel")
    theirs = np.random.default_rng(0).normal(size=(5, 3, 2, 4))
    image = np.random.default_rng(1).normal(size=(2, 4, 3))  # row, column, channel
    ours = np.empty((24, 5))
    key.as_theirs([ours], {"D": 5, "channel": 3, "row": 2, "column": 4})[0][...] = theirs
    np.testing.assert_allclose(image.reshape(-1) @ ours, np.einsum("rwc,dcrw->d", image, theirs))


def test_several_parameters_are_views_side_by_side() -> None:
    key = Key("c_attn.weight", "Q D", "q k v", "D Q")
    ours = [np.arange(8.0).reshape(4, 2) + 10 * i for i in range(3)]
    views = key.as_theirs(ours, {"D": 12, "Q": 2})
    assert all(np.shares_memory(view, part) for view, part in zip(views, ours, strict=True))
    np.testing.assert_array_equal(np.concatenate(views, -1), np.concatenate([part.T for part in ours], -1))


def test_no_random_state_is_part_of_a_model() -> None:
    model = build("vit", CONFIG, ASTRA)
    assert not jax.tree.leaves(nnx.state(model, nnx.RngState))


# Reading a Hugging Face folder


@each_model
def test_every_model_is_read_as_it_was_written(name: str, tmp_path: Path) -> None:
    family, config = CONFIGS[name]
    checkpoint = described(family, config, model=drawn(family, config))
    huggingface.write_folder(checkpoint, tmp_path)
    read = huggingface.read(str(tmp_path))
    assert same(read.model, checkpoint.model) and read.config == config


def test_names_have_the_prefix_unless_the_class_is_the_base(tmp_path: Path) -> None:
    firsts = {}
    for name in ("gpt2", "llama", "bert, classes", "bert"):
        write(tmp_path / name, name)
        firsts[name] = {tensor.split(".")[0] for tensor in load_file(tmp_path / name / "model.safetensors")}
    assert firsts == {
        "gpt2": {"transformer"},
        "llama": {"model", "lm_head"},
        "bert, classes": {"bert", "classifier"},
        "bert": {"embeddings", "encoder", "pooler"},
    }


def test_what_was_written_is_read(folder: Path, checkpoint: checkpoints.Checkpoint) -> None:
    read = huggingface.read(str(folder))
    assert same(read.model, checkpoint.model)
    assert (read.config, read.labels, read.preprocessing) == (CONFIG, checkpoint.labels, checkpoint.preprocessing)
    assert read.astra is None and read.dtype == "float32"
    assert read.history == ({"verb": "convert", "source": str(folder)},)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"vit__pooler__dense__weight": np.zeros(3, np.float32)}, "1 unmapped: vit.pooler.dense.weight"),
        ({"vit__encoder__layer__7__output__dense__bias": np.zeros(8, np.float32)}, "1 unexpected: vit.encoder.layer.7"),
        ({QUERY: None}, f"1 unfilled: {QUERY}"),
        ({QUERY: np.zeros((8, 7), np.float32)}, f"1 wrong shape: {QUERY} [8, 7] instead of [8, 8]"),
        ({NORM: np.full(8, np.nan, np.float32)}, f"1 NaN or infinite: {NORM}"),
        ({NORM: np.full(8, -np.inf, np.float16)}, f"1 NaN or infinite: {NORM}"),
        ({NORM: np.zeros(8, np.float64)}, f"1 dtype other than float32, float16, bfloat16: {NORM} (F64)"),
        ({NORM: np.zeros(8, np.int8)}, f"{NORM} (I8)"),
    ],
)
def test_each_fault_is_named(folder: Path, changes: dict[str, Any], expected: str) -> None:
    edit(folder, **changes)
    assert expected in fault(folder)


def test_all_faults_are_in_one_message(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(
        folder,
        other=np.zeros(2, np.float32),
        vit__encoder__layer__7__output__dense__bias=np.zeros(8, np.float32),
        classifier__bias=None,
        classifier__weight=np.full((3, 9), np.nan, np.float32),
        **{NORM: np.full(8, np.inf, np.float32), QUERY: tensors[QUERY].astype(np.float64)},
    )
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({"vit.layernorm.bias": np.zeros(8, np.float32)}, folder / "b.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    message = fault(folder)
    for part in (
        "1 duplicated: vit.layernorm.bias",
        "1 unfilled: classifier.bias",
        "1 unmapped: other",
        "1 unexpected: vit.encoder.layer.7.output.dense.bias",
        "1 wrong shape: classifier.weight [3, 9] instead of [3, 8]",
        "2 NaN or infinite: classifier.weight",
        f"{QUERY} (F64)",
    ):
        assert part in message


def test_biases_that_the_configuration_excludes_are_unexpected(folder: Path) -> None:
    edit_json(folder / "config.json", qkv_bias=False)
    assert "6 unexpected" in fault(folder)


@pytest.mark.parametrize("name", ["../hf/model.safetensors", "/etc/passwd", "..", "a\\b.safetensors", 3, "model.bin"])
def test_an_index_cannot_name_files_elsewhere(folder: Path, name: Any) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {QUERY: name}}))
    assert "in the same folder" in fault(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {QUERY: "b.safetensors"}}))
    assert "b.safetensors is missing" in fault(folder)


def test_a_truncated_file(folder: Path) -> None:
    weights = folder / "model.safetensors"
    for size in (0, 5, 200, weights.stat().st_size - 4):
        weights.write_bytes(weights.read_bytes()[:size])
        assert "truncated" in fault(folder)


def test_only_safetensors_are_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "safetensors" in fault(folder) and "pytorch_model.bin" in fault(folder)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"architectures": ["ResNetForImageClassification"]}, "known are BertForSequenceClassification, "),
        ({"architectures": None, "model_type": "resnet"}, "known are BertForSequenceClassification, "),
        ({"architectures": [[]], "model_type": "vit"}, "known are BertForSequenceClassification, "),
        ({"image_size": [8, 16]}, "only squares"),
        ({"image_size": [8, 8.0]}, "only squares"),
        ({"hidden_size": "8"}, "hidden_size is '8'"),
        ({"layer_norm_eps": None}, "layer_norm_eps is None"),
        ({"hidden_act": "swoosh"}, "hidden_act is 'swoosh'"),
        ({"num_attention_heads": 3}, "not a multiple"),
        ({"id2label": {"0": "a", "2": "b"}}, "without a gap"),
        ({"id2label": ["a"]}, "without a gap"),
    ],
)
def test_a_configuration_that_is_not_understood(folder: Path, changes: dict[str, Any], expected: str) -> None:
    edit_json(folder / "config.json", **changes)
    assert expected in fault(folder)


def test_a_configuration_may_be_terse(folder: Path) -> None:
    edit_json(folder / "config.json", architectures=None, image_size=[8, 8], patch_size=[4, 4])
    assert huggingface.read(str(folder)).config == CONFIG
    (folder / "preprocessor_config.json").unlink()
    assert huggingface.read(str(folder)).preprocessing is None


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff"])
def test_a_damaged_configuration(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin1"))
    assert "config.json" in fault(folder)


def test_sources_that_are_no_folders(tmp_path: Path) -> None:
    assert "no such folder" in fault(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert "is a file" in fault(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in fault(tmp_path / "empty")


def test_a_hub_id_is_downloaded_without_code_or_pickles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(hub_id: str, **options: Any) -> str:
        asked.append((hub_id, options))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert huggingface.read("some/model").history[0]["source"] == "some/model"
    assert asked == [("some/model", {"allow_patterns": ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]})]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionError("no route\nto host"), "resumes the download"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
    ],
)
def test_a_download_that_fails(error: Exception, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(AstraError, match=expected):
        huggingface.read("some/model")


# Names in the wild


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


MASK = np.ones((1, 1, 6, 6), bool)
IN_THE_WILD: dict[str, tuple[str, Any, dict[str, np.ndarray]]] = {
    "gpt2 of the hub": (
        "gpt2",
        lambda name: name.removeprefix("transformer."),
        {"h.0.attn.bias": MASK, "h.1.attn.masked_bias": np.zeros((), np.float32)},
    ),
    "gpt2 with a head and masks": ("gpt2, untied", str, {"transformer.h.0.attn.bias": MASK}),
    "llama without its prefix": ("llama", lambda name: name.removeprefix("model."), {}),
    "llama with frequencies": (
        "llama",
        str,
        {"model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32), "model.rotary_emb.inv_freq": MASK},
    ),
    "bert of old": (
        "bert",
        lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"),
        {"embeddings.position_ids": np.arange(6)[None]},
    ),
    "bert with the prefix": ("bert", "bert.{}".format, {"bert.embeddings.position_ids": np.arange(6)[None]}),
    "bert with a classifier, without the prefix": ("bert, classes", lambda name: name.removeprefix("bert."), {}),
    "bert without a pooler, with the prefix": ("bert, no pooler", "bert.{}".format, {}),
}


@pytest.mark.parametrize("case", IN_THE_WILD)
def test_names_in_the_wild(case: str, tmp_path: Path) -> None:
    name, change, more = IN_THE_WILD[case]
    checkpoint = write(tmp_path, name)
    rename(tmp_path, change, **more)
    assert same(huggingface.read(str(tmp_path)).model, checkpoint.model)


@pytest.mark.parametrize(
    ("name", "extra", "expected"),
    [
        ("gpt2", "h.0.attn.c_attn.weight", "1 duplicated: transformer.h.0.attn.c_attn.weight"),
        ("gpt2", "transformer.h.0.attn.mask", "1 unmapped: transformer.h.0.attn.mask"),
        ("gpt2", "score.weight", "1 unexpected: score.weight"),
        ("llama", "model.layers.0.self_attn.q_proj.bias", "1 unexpected: model.layers.0.self_attn.q_proj.bias"),
        ("llama", "layers.7.input_layernorm.weight", "1 unexpected: layers.7.input_layernorm.weight"),
        ("bert", "cls.predictions.bias", "1 unmapped: cls.predictions.bias"),
    ],
)
def test_tensors_that_are_too_many(name: str, extra: str, expected: str, tmp_path: Path) -> None:
    write(tmp_path, name)
    rename(tmp_path, str, **{extra: np.zeros(3, np.float32)})
    assert expected in fault(tmp_path)


@pytest.mark.parametrize(
    ("name", "embedding", "prefix"),
    [("gpt2", "transformer.wte.weight", "transformer."), ("llama, tied", "model.embed_tokens.weight", "model.")],
)
def test_a_tied_head_that_is_stored_too(name: str, embedding: str, prefix: str, tmp_path: Path) -> None:
    checkpoint = write(tmp_path, name)
    table = load_file(tmp_path / "model.safetensors")[embedding]
    rename(tmp_path, lambda name: name.removeprefix(prefix), **{"lm_head.weight": table})
    read = huggingface.read(str(tmp_path))
    assert same(read.model, checkpoint.model) and read.model.head is None
    edit(tmp_path, lm_head__weight=table + 1)  # then transformers does not tie them either
    untied = huggingface.read(str(tmp_path))
    assert not untied.config.tie_word_embeddings
    np.testing.assert_array_equal(untied.model.head.kernel[...], table.T + 1)
    assert configs.config_to_hf(untied, "float32")["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True; only False"),
        ("gpt2", {"n_embd": 9}, "n_embd 9 is not a multiple"),
        ("gpt2", {"n_inner": 2.5}, "n_inner is 2.5; it must be of type int or null"),
        ("gpt2", {"n_layer": True}, "n_layer is True; it must be of type int"),
        ("gpt2", {"activation_function": "gelu_fast"}, "activation_function is 'gelu_fast'"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ("bert", {"is_decoder": True}, "is_decoder is True"),
        ("llama", {"head_dim": 5}, "even width"),
        ("llama", {"num_key_value_heads": 3}, "not a multiple"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ("llama", {"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0]}}, "rope_type 'longrope'; known"),
        ("llama", {"rope_scaling": {"type": "proportional"}}, "rope_scaling has rope_type 'proportional'; known"),
        ("llama", {"rope_scaling": {"rope_type": ["yarn"]}}, "rope_type ['yarn']"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling of type linear has no factor"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            "has no low_freq_factor and no high_freq_factor",
        ),
        ("llama", {"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor is '2'"),
        (
            "llama",
            {"rope_scaling": {"type": "default", "mrope_section": [1]}},
            "has mrope_section [1], which is not known",
        ),
        (
            "llama",
            {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
            "has full_attention {'rope_theta': 1.0}, which",
        ),
        ("llama", {"rope_parameters": [1]}, "rope_parameters is [1]"),
        ("gpt2", {"n_positions": None}, "n_positions is None"),
        (
            "bert, classes",
            {"num_labels": 7, "id2label": {"0": "a", "1": "b"}},
            "num_labels is 7, but id2label names 2 classes",
        ),
        ("llama", {"rope_parameters": {"rope_theta": -1.0}}, "rope_theta of the rotary embedding is -1.0"),
        ("llama", {"architectures": ["LlamaModel"]}, "known are BertForSequenceClassification, BertModel, GPT2"),
        (
            "bert",
            {"architectures": ["BertForSequenceClassification"]},
            "2 unfilled: classifier.bias, classifier.weight",
        ),
    ],
)
def test_what_a_configuration_may_not_say(name: str, changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    write(tmp_path, name)
    edit_json(tmp_path / "config.json", **changes)
    message = fault(tmp_path)
    assert expected in message and "config.json" in message


def test_a_classifier_without_pooler_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "bert, classes")
    edit(tmp_path, bert__pooler__dense__weight=None, bert__pooler__dense__bias=None)
    assert "pooler" in fault(tmp_path)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_a_model_type_stands_for_the_first_class(family: str, tmp_path: Path) -> None:
    checkpoint = write(tmp_path, family)
    edit_json(tmp_path / "config.json", architectures=None)
    assert huggingface.read(str(tmp_path)).config == checkpoint.config


# Sentence-transformers

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]


def write_modules(folder: Path, modules: Any, **pooling: Any) -> None:
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


@pytest.mark.parametrize(
    ("changes", "pooling", "expected"),
    [
        ({}, {"pooling_mode_max_tokens": True}, "has pooling_mode_max_tokens; supported is one of"),
        ({}, {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "supported is one of"),
        ({}, {"pooling_mode_mean_tokens": False}, "has no pooling_mode"),
        ({1: {"path": "../1_Pooling"}}, {}, "must be the name of a folder"),
        ({1: {"path": "/etc"}}, {}, "must be the name of a folder"),
        ({1: {"path": None}}, {}, "must be the name of a folder"),
        ({1: {"path": "2_Pooling"}}, {}, "2_Pooling: has no config.json"),
        ({0: {"path": "0_Transformer"}}, {}, "must be the folder itself"),
        ({1: {"type": "sentence_transformers.models.Dense"}}, {}, "modules Transformer, Dense; supported"),
        ({1: {"type": "custom.Pooling"}}, {}, "modules Transformer, custom.Pooling; supported"),
        ({1: {"type": 3}}, {}, "must be an object with a type"),
    ],
)
def test_sentence_transformers_that_are_not_supported(
    changes: dict[int, dict], pooling: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    write(tmp_path, "bert")
    write_modules(tmp_path, [m | changes.get(i, {}) for i, m in enumerate(MODULES)], **pooling)
    assert expected in fault(tmp_path)


def test_a_list_of_modules_that_is_none(tmp_path: Path) -> None:
    write(tmp_path, "bert")
    write_modules(tmp_path, {"0": MODULES[0]})
    assert "must be a JSON array" in fault(tmp_path)
    write_modules(tmp_path, [*MODULES, MODULES[1]])
    assert "Transformer, Pooling, Pooling; supported" in fault(tmp_path)


def test_how_sentences_are_pooled_is_exported(tmp_path: Path) -> None:
    write(tmp_path, "bert, no pooler")
    assert [m["type"].split(".")[-1] for m in json.loads((tmp_path / "modules.json").read_text())][1:] == [
        "Pooling",
        "Normalize",
    ]
    config = huggingface.read(str(tmp_path)).config
    assert config.pooling == "last" and config.normalize and not config.pooler
    (tmp_path / "modules.json").unlink()
    assert huggingface.read(str(tmp_path)).config.pooling == "mean"


# A large model, in shapes

LLAMA3 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
LLAMA31 = LLAMA3 | {
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}


@pytest.mark.parametrize("hf_config", [LLAMA3, LLAMA31])
def test_llama_3_8b_has_exactly_the_tensors_of_its_index(hf_config: dict[str, Any]) -> None:
    config, _ = configs.config_from_hf("llama", hf_config, Path())
    assert config.rope_parameters.rope_type == ("llama3" if hf_config is LLAMA31 else "default")
    model, sizes = build("llama", config), FAMILIES["llama"].sizes(config)
    block = {
        "input_layernorm": (4096,),
        "self_attn.q_proj": (4096, 4096),
        "self_attn.k_proj": (1024, 4096),
        "self_attn.v_proj": (1024, 4096),
        "self_attn.o_proj": (4096, 4096),
        "post_attention_layernorm": (4096,),
        "mlp.gate_proj": (14336, 4096),
        "mlp.up_proj": (14336, 4096),
        "mlp.down_proj": (4096, 14336),
    }
    index = {
        "model.embed_tokens.weight": (128256, 4096),
        "model.norm.weight": (4096,),
        "lm_head.weight": (128256, 4096),
    }
    index |= {f"model.layers.{n}.{name}.weight": shape for n in range(32) for name, shape in block.items()}
    shapes = {name: key.shape(sizes) for name, (key, _) in model_tensors("llama", model).items()}
    assert shapes == index and len(index) == 291
    assert parameters(model) == sum(map(math.prod, index.values())) == 8_030_261_248
    assert {type(a) for a in flat_state(model).values()} == {jax.ShapeDtypeStruct}  # nothing was allocated


# Writing a Hugging Face folder


def test_an_export_overwrites_only_exports(folder: Path, checkpoint: checkpoints.Checkpoint, tmp_path: Path) -> None:
    huggingface.write_folder(checkpoint, folder, "float16")
    assert huggingface.read(str(folder)).dtype == "float16"
    edit(folder)  # another program's file from now on
    (tmp_path / "file").write_text("")
    for out in (folder, tmp_path, tmp_path / "file"):
        with pytest.raises(AstraError, match="choose another"):
            huggingface.write_folder(checkpoint, out)


def test_weights_that_do_not_fit_the_dtype(checkpoint: checkpoints.Checkpoint, tmp_path: Path) -> None:
    checkpoint.model.head.bias[...] = jnp.full(3, 1e6)
    with pytest.raises(AstraError, match="float16 cannot hold"):
        huggingface.write_folder(checkpoint, tmp_path, "float16")
    with pytest.raises(AstraError, match="must be one of"):
        huggingface.write_folder(checkpoint, tmp_path, "float64")
    assert not list(tmp_path.iterdir())


def test_an_export_to_a_full_disk(
    checkpoint: checkpoints.Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Any, path: Path, **__: Any) -> None:
        path.write_text("half")
        raise huggingface.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(huggingface, "save_file", full)
    with pytest.raises(AstraError, match="disk is full"):
        huggingface.write_folder(checkpoint, tmp_path)
    assert not list(tmp_path.iterdir())


def test_changed_labels_are_exported(checkpoint: checkpoints.Checkpoint, tmp_path: Path) -> None:
    hf_config = configs.config_to_hf(checkpoint, "float32") | {"id2label": {"0": "old"}, "torch_dtype": "float32"}
    hf_config["num_labels"] = 1  # transformers would go by it, and have a head of another shape
    changed = dataclasses.replace(checkpoint, hf_config=hf_config)
    assert changed.hf_config["id2label"] == {"0": "old"}
    content = configs.config_to_hf(changed, "bfloat16")
    assert content["id2label"] == {"0": "cat", "1": "dog", "2": "emu"} and "num_labels" not in content
    assert content["dtype"] == content["torch_dtype"] == "bfloat16"


# The store


@pytest.fixture
def calibrated(checkpoint: checkpoints.Checkpoint) -> checkpoints.Checkpoint:
    """With codebooks that are not zero."""
    with_codebooks = checkpoints.with_codebooks(checkpoint, ASTRA)
    codec = with_codebooks.model.codec
    codec.codebook[...] = jax.random.normal(jax.random.key(0), codec.codebook[...].shape)
    codec.count[...] = jax.random.uniform(jax.random.key(1), codec.count[...].shape)
    return with_codebooks


def refused(path: Path) -> str:
    """The one line that loading a checkpoint ends in."""
    with pytest.raises(AstraError) as caught:
        checkpoints.load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def weights_of(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if "weights" in entry.name)


def test_what_was_saved_is_loaded(calibrated: checkpoints.Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "new" / "checkpoint"
    checkpoints.save(out, calibrated)
    loaded = checkpoints.load(out)
    assert same(loaded.model, calibrated.model)
    assert dataclasses.replace(loaded, model=None) == dataclasses.replace(calibrated, model=None)
    assert checkpoints.read_meta(out) == dataclasses.replace(calibrated, model=None)


def test_the_compute_dtype_is_chosen_at_load(checkpoint: checkpoints.Checkpoint, tmp_path: Path) -> None:
    checkpoints.save(tmp_path, checkpoint)
    model = checkpoints.load(tmp_path, dtype=jnp.bfloat16).model
    assert model.head.dtype == jnp.bfloat16
    assert {a.dtype for a in flat_state(model).values()} == {jnp.dtype("float32")}


def test_codebooks_are_added_to_the_same_weights(calibrated: checkpoints.Checkpoint) -> None:
    again = checkpoints.with_codebooks(calibrated, AstraConfig(groups=4, codewords=16))
    assert again.model.codec.codebook[...].shape == (2, 4, 16, 2)
    assert not again.model.codec.codebook[...].any()
    assert jnp.array_equal(again.model.head.kernel[...], calibrated.model.head.kernel[...])
    with pytest.raises(AstraError, match="does not divide"):
        checkpoints.with_codebooks(calibrated, AstraConfig(groups=3))


def test_saving_over_a_checkpoint(calibrated: checkpoints.Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train.jsonl").write_text("log")
    for number in (1, 2, 3):
        checkpoints.save(tmp_path, calibrated)
        assert weights_of(tmp_path) == [f"weights-{number:04d}"]
    assert (tmp_path / "train").is_dir() and (tmp_path / "train.jsonl").read_text() == "log"


class Killed(BaseException):
    """Stands in for a process that ends here."""


def raiser(error: BaseException) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


WRAPPED = ValueError("tensorstore: Error writing: No space left on device [os_error_code='28']")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), WRAPPED])
@pytest.mark.parametrize("step", ["weights", "json"])
def test_a_full_disk_leaves_the_old_checkpoint(
    step: str, error: Exception, calibrated: checkpoints.Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.save(tmp_path, calibrated)
    with monkeypatch.context() as patch:
        if step == "weights":
            patch.setattr(ocp.Checkpointer, "save", raiser(error))
        else:
            patch.setattr(store, "write_atomically", raiser(error))
        with pytest.raises(AstraError, match="the disk is full"):
            checkpoints.save(tmp_path, checkpoints.with_codebooks(calibrated, ASTRA))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["astra.json", "weights-0001"]
    assert same(checkpoints.load(tmp_path).model, calibrated.model)


def test_a_kill_between_weights_and_json_leaves_the_old_checkpoint(
    calibrated: checkpoints.Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.save(tmp_path, calibrated)
    with monkeypatch.context() as patch:
        patch.setattr(store, "write_atomically", raiser(Killed()))
        with pytest.raises(Killed):
            checkpoints.save(tmp_path, checkpoints.with_codebooks(calibrated, ASTRA))
    (tmp_path / ".weights-0009").mkdir()
    assert same(checkpoints.load(tmp_path).model, calibrated.model)
    checkpoints.save(tmp_path, calibrated)
    assert weights_of(tmp_path) == ["weights-0002"]  # what raised on its way out was tidied up
    assert same(checkpoints.load(tmp_path).model, calibrated.model)


def test_a_first_save_that_was_killed_can_be_repeated(checkpoint: checkpoints.Checkpoint, tmp_path: Path) -> None:
    (tmp_path / ".weights-0001").mkdir()
    (tmp_path / ".astra.json.123").write_text("{")
    checkpoints.save(tmp_path, checkpoint)
    assert same(checkpoints.load(tmp_path).model, checkpoint.model)


def test_other_folders_are_not_written_to(checkpoint: checkpoints.Checkpoint, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text("{}")
    before = sorted(folder.iterdir())
    for out in (folder, tmp_path / "file", tmp_path / "other"):
        with pytest.raises(AstraError, match="choose another"):
            checkpoints.save(out, checkpoint)
    assert sorted(folder.iterdir()) == before


def test_folders_that_are_no_checkpoints(folder: Path, tmp_path: Path) -> None:
    assert "no such checkpoint" in refused(tmp_path / "nowhere")
    assert "astra convert" in refused(folder)
    assert "is not a checkpoint" in refused(tmp_path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"format": 99}, "upgrade astra-jax"),
        ({"format": None}, "damaged"),
        ({"weights": "../weights-0001"}, "must be the name"),
        ({"weights": "/weights-0001"}, "must be the name"),
        ({"weights": ".."}, "must be the name"),
        ({"weights": 7}, "must be the name"),
        ({"weights": "weights-0007"}, "weights are missing"),
        ({"family": "resnet"}, "known are bert, gpt2, llama, vit"),
        ({"labels": "cat"}, "labels is missing or of the wrong type"),
        ({"labels": ["cat", "dog"]}, "labels are no names of the 3 classes"),
        ({"labels": ["cat", "dog", None]}, "labels are no names of the 3 classes"),
        ({"dtype": "int8"}, "dtype is missing or of the wrong type"),
        ({"history": ["convert"]}, "history is missing or of the wrong type"),
        ({"astra": {"groups": "2"}}, "wrong type"),
        ({"astra": {"bits": 2}}, "unknown ['bits']"),
        ({"astra": {"groups": 4, "codewords": 8}}, "do not fit"),
        ({"astra": None}, "do not fit"),
        ({"config": dataclasses.asdict(CONFIG) | {"intermediate_size": 13}}, "do not fit"),
        ({"colour": "red"}, "unknown ['colour']"),
    ],
)
def test_a_description_that_does_not_fit(
    changes: dict[str, Any], expected: str, calibrated: checkpoints.Checkpoint, tmp_path: Path
) -> None:
    checkpoints.save(tmp_path, calibrated)
    meta = json.loads((tmp_path / "astra.json").read_text()) | changes
    (tmp_path / "astra.json").write_text(json.dumps(store.sealed(meta)))
    assert expected in refused(tmp_path)


def test_damaged_weights(checkpoint: checkpoints.Checkpoint, tmp_path: Path) -> None:
    checkpoints.save(tmp_path, checkpoint)
    files = [file for file in (tmp_path / "weights-0001").rglob("*") if file.is_file()]
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert "damaged or incomplete" in refused(tmp_path)
    for file in files:
        file.unlink()
    assert "damaged or incomplete" in refused(tmp_path)


def test_weights_are_kept_as_they_are_in_the_files(tmp_path: Path) -> None:
    write(tmp_path / "hf", "llama")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    save_file({n: t.astype(jnp.bfloat16) for n, t in tensors.items()}, tmp_path / "hf" / "model.safetensors")
    folder = huggingface.open_folder(str(tmp_path / "hf"))
    checkpoints.save(tmp_path / "out", folder.checkpoint, folder.parts())
    stored = checkpoints.load(tmp_path / "out", param_dtype=None)
    assert {a.dtype for a in flat_state(stored.model).values()} == {jnp.dtype("bfloat16")}
    assert {a.dtype for a in flat_state(checkpoints.load(tmp_path / "out").model).values()} == {jnp.dtype("float32")}
    # Codebooks and their statistics are float32 whatever the parameters are.
    checkpoints.save(tmp_path / "codes", checkpoints.with_codebooks(stored, ASTRA))
    model = checkpoints.load(tmp_path / "codes", param_dtype=jnp.bfloat16).model
    assert {a.dtype for a in flat_state(model, nnx.Param).values()} == {jnp.dtype("bfloat16")}
    assert {a.dtype for a in jax.tree.leaves(nnx.state(model.codec))} == {jnp.dtype("float32")}


def test_files_of_several_dtypes_are_kept_in_float32(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "hf", "gpt2")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    half = "transformer.h.1.attn.c_attn.weight"
    edit(tmp_path / "hf", **{half: tensors[half].astype(np.float16)})
    folder = huggingface.open_folder(str(tmp_path / "hf"))
    checkpoints.save(tmp_path / "out", folder.checkpoint, folder.parts())
    kept = checkpoints.load(tmp_path / "out", param_dtype=None)
    assert kept.dtype == "float32"
    q, k = (flat_state(c.model)["blocks.attention.k.kernel"] for c in (kept, checkpoint))
    np.testing.assert_array_equal(q[0], k[0])
    np.testing.assert_array_equal(q[1], k[1].astype(np.float16))


def test_weights_go_straight_to_where_they_shall_be(calibrated: checkpoints.Checkpoint, tmp_path: Path) -> None:
    checkpoints.save(tmp_path, calibrated)
    mesh = make_mesh(4, 2)
    everywhere = NamedSharding(mesh, P())
    model = checkpoints.load(tmp_path, shardings=lambda model: shardings(model, mesh)).model
    assert same(model, calibrated.model)
    assert all(a.sharding.is_equivalent_to(everywhere, a.ndim) for a in flat_state(model).values())
    checkpoints.save(tmp_path, dataclasses.replace(calibrated, model=model))  # and come back from there
    assert same(checkpoints.load(tmp_path).model, calibrated.model)


def test_cpu_devices_share_the_blocks_and_do_not_spoil_them_for_each_other(
    calibrated: checkpoints.Checkpoint, tmp_path: Path
) -> None:
    checkpoints.save(tmp_path, calibrated)
    mesh = make_mesh(4, 2)
    flat = flat_state(checkpoints.load(tmp_path, shardings=lambda model: shardings(model, mesh)).model)
    blocks = {path: a for path, a in flat.items() if path.startswith("blocks.")}
    for path, a in blocks.items():
        assert len({shard.data.unsafe_buffer_pointer() for shard in a.addressable_shards}) == 1, path
    expected = {path: np.asarray(a) + 1 for path, a in blocks.items()}
    given_away = jax.jit(lambda state: jax.tree.map(lambda a: a + 1, state), donate_argnums=0)(blocks)
    for path, a in given_away.items():
        for shard in a.addressable_shards:
            np.testing.assert_array_equal(shard.data, expected[path])


def test_a_device_gets_its_part_of_the_weights_alone(tiny_vit: Any, tmp_path: Path) -> None:
    """Heads and MLP columns, as tensor parallelism splits them."""
    model = tiny_vit()
    checkpoints.save(tmp_path, checkpoints.Checkpoint("vit", model.config, None, None, None, {}, "float32", (), model))
    mesh = make_mesh(2)
    loaded = checkpoints.load(tmp_path, shardings=lambda model: shardings(model, mesh, TensorParallel.of)).model
    assert same(loaded, model)
    sizes = {path: a.addressable_shards[0].data.shape for path, a in flat_state(loaded).items()}
    assert sizes["blocks.attention.q.kernel"] == (2, 16, 8)
    assert sizes["blocks.attention.o.kernel"] == (2, 8, 16)
    assert sizes["blocks.mlp.up.bias"] == (2, 16)
    assert sizes["blocks.mlp.down.bias"] == (2, 16)
    assert sizes["embed.kernel"] == (16, 16)


def test_one_part_of_the_weights_is_there_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "hf", "gpt2, untied")
    folder = huggingface.open_folder(str(tmp_path / "hf"))
    checkpoints.save(tmp_path / "out", folder.checkpoint, folder.parts())
    names = sorted(part.name for part in (tmp_path / "out" / "weights-0001").iterdir())
    assert names == ["block-0000", "block-0001", "embed", "head", "norm", "position"]
    alive: list[weakref.ref] = []

    def watched(parts: Any) -> Any:
        for name, arrays in parts:
            assert not any(ref() is not None for ref in alive), name
            alive[:] = [weakref.ref(a) for a in arrays.values()]
            yield name, arrays
            del arrays

    checkpoints.save(tmp_path / "again", folder.checkpoint, watched(folder.parts()))
    assert len(alive) > 0


def test_not_a_number_is_found_while_converting_and_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path / "hf", "gpt2")
    names = ["transformer.h.1.attn.c_attn.bias", "transformer.wpe.weight"]
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    edit(tmp_path / "hf", **{name: np.full_like(tensors[name], np.nan) for name in names})
    folder = huggingface.open_folder(str(tmp_path / "hf"))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(AstraError, match="2 NaN or infinite: transformer.h.1.attn.c_attn.bias, transformer.wpe.weight"):
        checkpoints.save(tmp_path / "new" / "out", folder.checkpoint, folder.parts())
    assert sorted(tmp_path.iterdir()) == before


def test_a_conversion_that_fails_leaves_the_old_checkpoint(calibrated: checkpoints.Checkpoint, tmp_path: Path) -> None:
    checkpoints.save(tmp_path, calibrated)

    def half() -> Any:
        yield next(cut(calibrated.model))
        raise AstraError("no")

    with pytest.raises(AstraError, match="^no$"):
        checkpoints.save(tmp_path, calibrated, half())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["astra.json", "weights-0001"]
    assert same(checkpoints.load(tmp_path).model, calibrated.model)


def test_checkpoints_of_format_1_are_read(calibrated: checkpoints.Checkpoint, tmp_path: Path) -> None:
    checkpoints.save(tmp_path, calibrated)
    meta = json.loads((tmp_path / "astra.json").read_text())
    shutil.rmtree(tmp_path / "weights-0001")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "weights-0001", nnx.to_pure_dict(nnx.state(calibrated.model)))
    del meta["generation"]
    (tmp_path / "astra.json").write_text(json.dumps(meta | {"format": 1}))
    loaded = checkpoints.load(tmp_path)
    assert same(loaded.model, calibrated.model) and loaded.generation is None
    checkpoints.save(tmp_path, loaded)
    assert json.loads((tmp_path / "astra.json").read_text())["format"] == 3
    assert same(checkpoints.load(tmp_path).model, calibrated.model)


@pytest.mark.parametrize("change", ["missing", "foreign", "truncated"])
def test_a_damaged_part(change: str, checkpoint: checkpoints.Checkpoint, tmp_path: Path) -> None:
    checkpoints.save(tmp_path, checkpoint)
    block = tmp_path / "weights-0001" / "block-0001"
    if change == "truncated":
        (file,) = [file for file in (block / "blocks.mlp.up.kernel").iterdir() if not file.name.startswith(".")]
        file.write_bytes(file.read_bytes()[:-1])
        assert "block-0001: the weights cannot be read" in refused(tmp_path)
        return
    block.rename(block.with_name("block-0002")) if change == "foreign" else shutil.rmtree(block)
    assert "do not fit astra.json, such as block-0001" in refused(tmp_path)


@each_model
def test_every_model_is_kept(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    family, config = CONFIGS[name]
    plain = described(family, config, model=drawn(family, config), generation={"eos_token_id": [2, 1]})
    coded = checkpoints.with_codebooks(plain, ASTRA)
    assert all(
        bool((a == flat_state(plain.model)[path]).all()) for path, a in flat_state(coded.model, nnx.Param).items()
    )
    checkpoints.save(tmp_path / "out", coded)
    loaded = checkpoints.load(tmp_path / "out")
    assert same(loaded.model, coded.model)
    assert dataclasses.replace(loaded, model=None) == dataclasses.replace(coded, model=None)
    assert main(["info", str(tmp_path / "out"), "--json", str(tmp_path / "info.json")]) == 0
    facts = {row["name"]: row["value"] for row in json.loads((tmp_path / "info.json").read_text())["facts"]}
    assert facts["family"] == family and facts["parameters"] == parameters(plain.model)
    assert facts.get("rope_theta") == (1e4 if family == "llama" else None) and facts["bits per token and block"] == 6


# Tokenizers


def test_a_tokenizer_goes_all_the_way(tmp_path: Path, word_tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    hf, out, copy, back = (tmp_path / name for name in ("hf", "out", "copy", "back"))
    write(hf, "gpt2")
    shutil.copytree(word_tokenizer(7), hf, dirs_exist_ok=True)
    (hf / "generation_config.json").write_text('{"eos_token_id": 3}')
    (hf / "tokenizer.py").write_text("raise SystemExit")  # no file of a tokenizer
    assert main(["convert", str(hf), str(out)]) == 0
    assert "warning" not in capsys.readouterr().out
    files = {"tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in (out / "tokenizer-0001").iterdir()} == files | {"config.json"}
    checkpoint = checkpoints.load(out)
    assert checkpoint.tokenizer.encode("w3 w6 nothing") == [7, 10, 0] and checkpoint.eos_ids == (3,)
    checkpoints.save(copy, checkpoint)
    checkpoints.save(out, checkpoint)  # onto itself
    assert checkpoints.load(copy).tokenizer.decode([7, 10]) == checkpoints.load(out).tokenizer.decode([7, 10])
    assert main(["export", str(copy), str(back)]) == 0
    for file in files:
        assert (back / file).read_bytes() == (hf / file).read_bytes()
    assert huggingface.read_json(back / "generation_config.json") == {"eos_token_id": 3}
    checkpoints.save(copy, dataclasses.replace(checkpoint, tokenizer_files=None))
    assert not list(copy.glob("tokenizer*"))


def test_a_language_model_without_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "hf", "llama")
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "warning" in printed and "tokenizer.json" in printed and "labels" not in printed
    checkpoint = checkpoints.read_meta(tmp_path / "out")
    assert not list((tmp_path / "out").glob("tokenizer*"))
    with pytest.raises(AstraError, match="has no tokenizer.*convert it again"):
        checkpoint.tokenizer  # noqa: B018


@pytest.mark.parametrize(
    ("damage", "expected"), [(None, "ids up to 11, but vocab_size in config.json is 11"), ("{", "cannot be read")]
)
def test_a_tokenizer_that_does_not_fit(
    damage: str | None, expected: str, tmp_path: Path, word_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "hf", "gpt2")
    shutil.copytree(word_tokenizer(8), tmp_path / "hf", dirs_exist_ok=True)
    if damage:
        (tmp_path / "hf" / "tokenizer.json").write_text(damage)
    assert expected in fails(capsys, "convert", str(tmp_path / "hf"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("generation", "hf_config", "expected"),
    [
        ({"eos_token_id": [2, 1]}, {"eos_token_id": 9}, (2, 1)),
        ({"eos_token_id": 0}, {"eos_token_id": 9}, (0,)),
        ({"eos_token_id": None}, {"eos_token_id": 9}, (9,)),
        (None, {"eos_token_id": [9, 8]}, (9, 8)),
        ({}, {"eos_token_id": None}, ()),
        (None, {}, ()),
        (None, {"eos_token_id": -1}, (-1,)),  # of configurations that have none
        ({"eos_token_id": []}, {"eos_token_id": 9}, ()),
    ],
)
def test_what_ends_a_text(generation: Any, hf_config: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert described("gpt2", GPT2, generation=generation, hf_config=hf_config).eos_ids == expected


@pytest.mark.parametrize("ids", ["</s>", 2.0, True, [2, None], [[2]], -2, 2**31, {"id": 2}, math.nan], ids=repr)
def test_what_cannot_end_a_text(ids: Any) -> None:
    """It would be left out without a word, and texts would go on and on."""
    with pytest.raises(AstraError, match="eos_token_id is .*; it must be the number of a token, or a list of them"):
        _ = described("gpt2", GPT2, generation={"eos_token_id": ids}).eos_ids


# Memory

MEASURE = """
import json, os, sys, threading, time
import jax
import orbax.checkpoint
from flax import nnx
import checkpoints
from checkpoints import huggingface

def anonymous():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))

def peak(work):
    # Sampled every millisecond: the kernel keeps no high-water mark of memory that is not file-backed.
    start, most, done = anonymous(), [0], threading.Event()
    def watch():
        while not done.wait(0.001):
            most[0] = max(most[0], anonymous())
    watcher = threading.Thread(target=watch)
    watcher.start()
    result = work()
    done.set()
    watcher.join()
    return most[0] - start, result

source, out = sys.argv[1:]
jax.devices()
def convert():
    folder = huggingface.open_folder(source)
    checkpoints.save(out, folder.checkpoint, folder.parts())
def load():
    return jax.block_until_ready(nnx.state(checkpoints.load(out).model))
converting, _ = peak(convert)
loading, state = peak(load)
print(json.dumps([converting, loading, sum(a.nbytes for a in jax.tree.leaves(state))]))
"""


@pytest.mark.slow
def test_converting_needs_memory_for_one_shard_file_and_loading_for_one_model(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=7,
        num_attention_heads=16,
        num_key_value_heads=8,
    )
    tensors, sizes = model_tensors("llama", build("llama", config)), FAMILIES["llama"].sizes(config)
    shards: list[dict[str, np.ndarray]] = [{}]
    rng = np.random.default_rng(0)
    for name, (key, _) in tensors.items():
        tensor = rng.standard_normal(key.shape(sizes), np.float32)
        if sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > 90e6:
            shards.append({})
        shards[-1][name] = tensor
    assert len(shards) >= 4
    source = tmp_path / "hf"
    source.mkdir()
    for number, shard in enumerate(shards):
        save_file(shard, source / f"{number}.safetensors")
    largest = max(file.stat().st_size for file in source.iterdir())
    index = {name: f"{number}.safetensors" for number, shard in enumerate(shards) for name in shard}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    content = configs.config_to_hf(described("llama", config), "float32")
    (source / "config.json").write_text(json.dumps(content))
    del shards
    # What is freed goes back at once, so that what is measured is what is held.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "PYTHONPATH": str(Path(__file__).parents[4])}
    command = [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    converting, loading, model = json.loads(done.stdout.splitlines()[-1])
    assert 0 < converting < 1.3 * largest
    assert model < loading < 1.5 * model


# The verbs


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The line on stderr of a command that must end in exit code 2."""
    assert main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("astra: error: ")
    return lines[0]


def test_the_verbs_in_a_row(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, back, report = tmp_path / "out", tmp_path / "back", tmp_path / "report.json"
    assert main(["convert", str(folder), str(out), "--json", str(report)]) == 0
    printed = capsys.readouterr().out
    assert "vit: " in printed and "3 labels" in printed and f"next: astra calibrate {out}" in printed.replace("\n", "")
    converted = json.loads(report.read_text())
    assert converted["parameters"] == sum(t.size for t in load_file(folder / "model.safetensors").values())
    assert main(["export", str(out), str(back)]) == 0
    before, after = load_file(folder / "model.safetensors"), load_file(back / "model.safetensors")
    assert {n: t.tobytes() for n, t in before.items()} == {n: t.tobytes() for n, t in after.items()}
    assert main(["info", str(out)]) == 0
    assert "codebooks: none" in capsys.readouterr().out


def test_info_and_export_of_codebooks(
    calibrated: checkpoints.Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints.save(tmp_path / "out", calibrated)
    report = tmp_path / "report.json"
    assert main(["info", str(tmp_path / "out"), "--json", str(report)]) == 0
    content = json.loads(report.read_text())
    facts = {row["name"]: row["value"] for row in content["facts"]}
    assert facts["bits per token and block"] == 6
    assert facts["compression ratio"] == pytest.approx(8 * 32 / 6)
    assert [row["block"] for row in content["blocks"]] == [0, 1]
    assert all(1 < row["perplexity"] <= 8 for row in content["blocks"])
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "hf")]) == 0
    assert "codebooks are left out" in capsys.readouterr().out


def test_errors_are_one_line_and_exit_code_2(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(folder, other=np.zeros(1, np.float32))
    assert "unmapped" in fails(capsys, "convert", str(folder), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert "astra convert" in fails(capsys, "info", str(folder))
    assert "astra convert" in fails(capsys, "export", str(folder), str(tmp_path / "out"))
    assert "no such checkpoint" in fails(capsys, "info", str(tmp_path / "out"))
    assert "no such folder" in fails(capsys, "convert", str(tmp_path / "none"), str(tmp_path / "out"))
