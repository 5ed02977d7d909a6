"""The strict reader and the writer of Hugging Face folders."""

import dataclasses
import errno
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import checkpoints
from astra_jax.cli.main import main
from astra_jax.errors import AstraError
from checkpoints import configs, huggingface
from tests.helpers.folders import (
    CONFIGS,
    NORM,
    QUERY,
    VIT,
    described,
    drawn,
    each_model,
    edit,
    edit_json,
    fault,
    rename,
    same,
    write,
)


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


def old_masked_lm(folder: Path) -> dict[str, np.ndarray]:
    """A BERT for masked words as old versions of transformers save it: with tied tensors, a pooler, another head, and
    other names. Returns the tensors."""
    write(folder, "bert, masked words")
    tensors = load_file(folder / "model.safetensors")
    head, D = "cls.predictions", 8
    more = {f"{head}.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"]}
    more |= {f"{head}.decoder.bias": tensors[f"{head}.bias"], "bert.embeddings.position_ids": np.arange(6)[None]}
    more |= {"bert.pooler.dense.weight": np.ones((D, D), np.float32), "bert.pooler.dense.bias": np.ones(D, np.float32)}
    more |= {"cls.seq_relationship.weight": np.ones((2, D), np.float32), "cls.seq_relationship.bias": np.ones(2)}
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def change(name: str) -> str:
        stem = ".".join(name.split(".")[-2:])
        return name.replace(stem, old.get(stem, stem))

    rename(folder, change, **more)
    return tensors


def test_an_old_masked_language_model_is_read_and_what_is_left_out_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = old_masked_lm(tmp_path / "hf")
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "kept")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "note: 2 tensor(s) of another head or model are left out: cls.seq_relationship" in said
    assert "note: the head that fills in masked words is kept for `astra export`, and not computed" in said
    kept = checkpoints.load(tmp_path / "kept")
    assert (kept.config.task, kept.config.pooling, kept.config.pooler) == ("embedding", "mean", True)
    huggingface.write_folder(kept, tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert set(back) - set(tensors) == {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert all(np.array_equal(back[name], tensor) for name, tensor in tensors.items())


def test_a_masked_language_model_of_another_decoder(tmp_path: Path) -> None:
    old_masked_lm(tmp_path)
    edit(tmp_path, cls__predictions__decoder__bias=np.ones(11, np.float32))
    assert "the decoder of a masked language model must be its embedding" in fault(tmp_path)
    edit(tmp_path, cls__predictions__decoder__bias=None, cls__predictions__bias=None)
    assert "1 unfilled: cls.predictions.bias" in fault(tmp_path)


def test_a_class_with_a_head_that_the_tensors_do_not_have(tmp_path: Path) -> None:
    """As published models of sentence-transformers are, whose config.json names the class they began as."""
    written = write(tmp_path, "bert")
    edit_json(tmp_path / "config.json", architectures=["BertForMaskedLM"])
    read = huggingface.read(str(tmp_path))
    assert read.config == written.config and same(read.model, written.model)


def test_what_was_written_is_read(folder: Path, checkpoint: checkpoints.Checkpoint) -> None:
    read = huggingface.read(str(folder))
    assert same(read.model, checkpoint.model)
    assert (read.config, read.labels, read.preprocessing) == (VIT, checkpoint.labels, checkpoint.preprocessing)
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
        ({"architectures": ["ResNetForImageClassification"]}, "of vit there are ViTForImageClassification"),
        ({"architectures": None, "model_type": "resnet"}, "there are those of bert, "),
        ({"architectures": [[]], "model_type": "vit"}, "of vit there are ViTForImageClassification"),
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
    assert huggingface.read(str(folder)).config == VIT
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
        ("bert", "qa_outputs.bias", "1 unmapped: qa_outputs.bias"),
        ("bert, classes", "cls.predictions.bias", "1 unexpected: cls.predictions.bias"),
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
        ("llama", {"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0]}}, "longrope has no short_factor"),
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
        ("llama", {"architectures": ["LlamaModel"]}, "of llama there are LlamaForCausalLM, Llama"),
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
