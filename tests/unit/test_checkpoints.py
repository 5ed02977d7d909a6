"""The strict reader of Hugging Face folders, the checkpoint store, and the three verbs."""

import dataclasses
import errno
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import checkpoints
from astra_jax.cli import main
from astra_jax.config import AstraConfig
from astra_jax.errors import AstraError
from astra_jax.models.vit import ViTConfig
from checkpoints import huggingface, store
from checkpoints.keys import FAMILIES, build, flat_state, model_keys

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


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_names_every_parameter_once_and_inverts(family: str) -> None:
    model = build(family, CONFIG)
    keys, parameters = model_keys(family, model), flat_state(model)
    assert sorted(key.path for key in keys) == sorted(parameters)
    sizes = {axis: 2 + i for i, axis in enumerate(sorted(FAMILIES[family].sizes(CONFIG)))}
    for key in keys:
        theirs = np.arange(math.prod(key.shape(sizes))).reshape(key.shape(sizes))
        assert np.array_equal(key.to_theirs(key.to_ours(theirs, sizes, (-1,)), sizes), theirs)
        ours = parameters[key.path].shape[1 if key.stacked else 0 :]
        assert math.prod(ours) == math.prod(key.shape(FAMILIES[family].sizes(CONFIG)))


def test_patches_are_row_column_channel() -> None:
    key = next(key for key in FAMILIES["vit"].keys if key.path == "embed.kernel")
    sizes = {"D": 5, "channel": 3, "row": 2, "column": 4}
    theirs = np.random.default_rng(0).normal(size=(5, 3, 2, 4))
    image = np.random.default_rng(1).normal(size=(2, 4, 3))  # row, column, channel
    ours = key.to_ours(theirs, sizes, (24, 5))
    np.testing.assert_allclose(image.reshape(-1) @ ours, np.einsum("rwc,dcrw->d", image, theirs))


def test_no_random_state_is_part_of_a_model() -> None:
    model = build("vit", CONFIG, ASTRA)
    assert not jax.tree.leaves(nnx.state(model, nnx.RngState))


# Reading a Hugging Face folder


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
        ({"architectures": ["ResNetForImageClassification"]}, "known are ViTForImageClassification"),
        ({"architectures": None, "model_type": "resnet"}, "known are ViTForImageClassification"),
        ({"architectures": [[]], "model_type": "vit"}, "known are ViTForImageClassification"),
        ({"image_size": [8, 16]}, "only squares"),
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
    assert asked == [("some/model", {"allow_patterns": ["*.json", "*.safetensors", "*.txt"]})]


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
    hf_config = huggingface.config_to_hf(checkpoint, "float32") | {"id2label": {"0": "old"}, "torch_dtype": "float32"}
    changed = dataclasses.replace(checkpoint, hf_config=hf_config)
    assert changed.hf_config["id2label"] == {"0": "old"}
    content = huggingface.config_to_hf(changed, "bfloat16")
    assert content["id2label"] == {"0": "cat", "1": "dog", "2": "emu"}
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
            patch.setattr(ocp.StandardCheckpointer, "save", raiser(error))
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
    assert weights_of(tmp_path) == ["weights-0003"]
    assert same(checkpoints.load(tmp_path).model, calibrated.model)


def test_a_first_save_that_was_killed_can_be_repeated(checkpoint: checkpoints.Checkpoint, tmp_path: Path) -> None:
    (tmp_path / ".weights-0001").mkdir()
    (tmp_path / ".astra.json.123").write_text("{")
    checkpoints.save(tmp_path, checkpoint)
    assert same(checkpoints.load(tmp_path).model, checkpoint.model)


def test_other_folders_are_not_written_to(checkpoint: checkpoints.Checkpoint, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    before = sorted(folder.iterdir())
    for out in (folder, tmp_path / "file"):
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
        ({"family": "resnet"}, "known are vit"),
        ({"labels": "cat"}, "labels is missing or of the wrong type"),
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
    edit_json(tmp_path / "astra.json", **changes)
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
