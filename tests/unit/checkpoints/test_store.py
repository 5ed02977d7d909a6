"""The store of checkpoints: what was saved is loaded, whole or not at all, where it shall be."""

import dataclasses
import errno
import json
import math
import shutil
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
from astra_jax.codecs.config import VQConfig
from astra_jax.errors import AstraError
from astra_jax.mesh.sharding import make_mesh
from astra_jax.serving.compile import shardings
from astra_jax.strategies.rivals import TensorParallel
from checkpoints import description, huggingface, store
from checkpoints.info import parameters
from checkpoints.streaming import cut
from checkpoints.tensor_maps import flat_state
from eval.cost.presets import LLAMA_S
from tests.helpers.folders import (
    ASTRA,
    CONFIGS,
    GPT2,
    VIT,
    described,
    drawn,
    each_model,
    edit,
    refused,
    same,
    write,
)


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
    again = checkpoints.with_codebooks(calibrated, VQConfig(groups=4, codewords=16))
    assert again.model.codec.codebook[...].shape == (2, 4, 16, 2)
    assert not np.any(again.model.codec.codebook[...])
    assert np.array_equal(again.model.head.kernel[...], calibrated.model.head.kernel[...])
    with pytest.raises(AstraError, match="does not divide"):
        checkpoints.with_codebooks(calibrated, VQConfig(groups=3))


def test_saving_over_a_checkpoint(calibrated: checkpoints.Checkpoint, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train.jsonl").write_text("log")
    for number in (2, 3):
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


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("step", "error"), [("weights", FULL), ("weights", WRAPPED), ("json", FULL)])
def test_a_full_disk_leaves_the_old_checkpoint(
    step: str,
    error: Exception,
    calibrated: checkpoints.Checkpoint,
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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
    calibrated: checkpoints.Checkpoint, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(store, "write_atomically", raiser(Killed()))
        with pytest.raises(Killed):
            checkpoints.save(tmp_path, checkpoints.with_codebooks(calibrated, ASTRA))
    (tmp_path / "weights-0002").mkdir()
    assert same(checkpoints.load(tmp_path).model, calibrated.model)
    checkpoints.save(tmp_path, calibrated)
    assert weights_of(tmp_path) == ["weights-0003"]  # what was left is gone
    assert same(checkpoints.load(tmp_path).model, calibrated.model)


def test_a_first_save_that_was_killed_can_be_repeated(checkpoint: checkpoints.Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "weights-0001").mkdir()
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
        ({"format": 2}, "convert the model again"),
        ({"format": None}, "damaged"),
        ({"weights": "../weights-0001"}, "must be the name"),
        ({"weights": "/weights-0001"}, "must be the name"),
        ({"weights": ".."}, "must be the name"),
        ({"weights": 7}, "must be the name"),
        ({"weights": "weights-0007"}, "weights are missing"),
        ({"family": "resnet"}, "known are bert, clip_vision_model"),
        ({"labels": "cat"}, "labels is missing or of the wrong type"),
        ({"labels": ["cat", "dog"]}, "labels are no names of the 3 classes"),
        ({"labels": ["cat", "dog", None]}, "labels are no names of the 3 classes"),
        ({"dtype": "int8"}, "dtype is missing or of the wrong type"),
        ({"history": ["convert"]}, "history is missing or of the wrong type"),
        ({"astra": {"codec": "vq", "groups": "2"}}, "groups is '2'; it must be a whole number"),
        ({"astra": {"codec": "vq", "bits": 2}}, "unknown ['bits']"),
        ({"astra": {"codec": "vq", "groups": 4, "codewords": 8}}, "do not fit"),
        ({"astra": None}, "do not fit"),
        ({"config": dataclasses.asdict(VIT) | {"intermediate_size": 13}}, "do not fit"),
        ({"colour": "red"}, "unknown ['colour']"),
        (
            {"family": "llama", "config": dataclasses.asdict(LLAMA_S) | {"rope_parameters": ""}},
            "Rotary is ''; it must be an object",
        ),
    ],
)
def test_a_description_that_does_not_fit(changes: dict[str, Any], expected: str, saved: Path) -> None:
    meta = json.loads((saved / "astra.json").read_text()) | changes
    (saved / "astra.json").write_text(json.dumps(description.sealed(meta)))
    assert expected in refused(saved)


def test_a_description_without_its_digest(saved: Path) -> None:
    meta = json.loads((saved / "astra.json").read_text())
    del meta["sha256"]
    (saved / "astra.json").write_text(json.dumps(meta))
    assert "sha256 is missing or of the wrong type" in refused(saved)


def test_damaged_weights(saved: Path) -> None:
    files = [file for file in (saved / "weights-0001").rglob("*") if file.is_file()]
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert "damaged or incomplete" in refused(saved)
    for file in files:
        file.unlink()
    assert "damaged or incomplete" in refused(saved)


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


def test_weights_go_straight_to_where_they_shall_be(
    calibrated: checkpoints.Checkpoint, saved: Path, tmp_path: Path
) -> None:
    mesh = make_mesh(4, 2)
    everywhere = NamedSharding(mesh, P())
    model = checkpoints.load(tmp_path, shardings=lambda model: shardings(model, mesh)).model
    assert same(model, calibrated.model)
    assert all(a.sharding.is_equivalent_to(everywhere, a.ndim) for a in flat_state(model).values())
    checkpoints.save(tmp_path, dataclasses.replace(calibrated, model=model))  # and come back from there
    assert same(checkpoints.load(tmp_path).model, calibrated.model)


def test_cpu_devices_share_the_blocks_and_do_not_spoil_them_for_each_other(saved: Path) -> None:
    mesh = make_mesh(4, 2)
    flat = flat_state(checkpoints.load(saved, shardings=lambda model: shardings(model, mesh)).model)
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


def test_a_conversion_that_fails_leaves_the_old_checkpoint(
    calibrated: checkpoints.Checkpoint, saved: Path, tmp_path: Path
) -> None:

    def half() -> Any:
        yield next(cut(calibrated.model))
        raise AstraError("no")

    with pytest.raises(AstraError, match="^no$"):
        checkpoints.save(tmp_path, calibrated, half())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["astra.json", "weights-0001"]
    assert same(checkpoints.load(tmp_path).model, calibrated.model)


@pytest.mark.parametrize("change", ["missing", "foreign", "truncated"])
def test_a_damaged_part(change: str, saved: Path) -> None:
    block = saved / "weights-0001" / "block-0001"
    if change == "truncated":
        (file,) = [file for file in (block / "blocks.mlp.up.kernel").iterdir() if not file.name.startswith(".")]
        file.write_bytes(file.read_bytes()[:-1])
        assert "block-0001: the weights cannot be read" in refused(saved)
        return
    block.rename(block.with_name("block-0002")) if change == "foreign" else shutil.rmtree(block)
    assert "do not fit astra.json, such as block-0001" in refused(saved)


@each_model
def test_every_model_is_kept(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    family, config = CONFIGS[name]
    plain = described(family, config, model=drawn(family, config), generation={"eos_token_id": [2, 1]})
    coded = checkpoints.with_codebooks(plain, ASTRA)
    assert all(
        np.array_equal(a, flat_state(plain.model)[path]) for path, a in flat_state(coded.model, nnx.Param).items()
    )
    checkpoints.save(tmp_path / "out", coded)
    loaded = checkpoints.load(tmp_path / "out")
    assert same(loaded.model, coded.model)
    assert dataclasses.replace(loaded, model=None) == dataclasses.replace(coded, model=None)
    assert main(["info", str(tmp_path / "out"), "--json", str(tmp_path / "info.json")]) == 0
    facts = {row["name"]: row["value"] for row in json.loads((tmp_path / "info.json").read_text())["facts"]}
    assert facts["family"] == family and facts["parameters"] == parameters(plain.model)
    rotary = getattr(config, "rope_parameters", None)
    assert facts.get("rope_theta") == (rotary and rotary.rope_theta) and facts["bits per token and block"] == 6


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
