"""The verbs as a user calls them: the whole way on a tiny model, and what wrong input gets."""

import json
import os
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import checkpoints
from astra_jax import make_mesh, parallelize
from astra_jax.cli import main
from astra_jax.models.vit import ViT, ViTConfig
from astra_jax.preprocess import decode_image
from checkpoints.huggingface import write_folder

CLASSES = ("black", "dark", "light", "white")
CONFIG = ViTConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    image_size=16,
    patch_size=4,
    num_labels=4,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with `pictures/{train,test}/CLASS/*.png` and a Hugging Face folder `hf`."""
    place = tmp_path_factory.mktemp("verbs")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 5)):
        for label, name in enumerate(CLASSES):
            folder = place / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(label * 80 + rng.integers(0, 16, (16, 16, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    half = {"size": {"height": 16, "width": 16}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    checkpoint = checkpoints.Checkpoint(
        family="vit",
        config=CONFIG,
        astra=None,
        labels=CLASSES,
        preprocessing=half,
        hf_config={},
        dtype="float32",
        history=(),
        model=ViT(CONFIG, rngs=nnx.Rngs(0)),
    )
    write_folder(checkpoint, place / "hf")
    return place


@pytest.fixture(scope="module")
def done(place) -> dict[str, dict]:
    """Every verb once; verb -> its JSON."""
    data = ["--data", str(place / "pictures")]
    calls = {
        "convert": [place / "hf", place / "original"],
        "calibrate": [
            *(place / "original", place / "calibrated", *data),
            *("--groups", 4, "--codewords", 16, "--tokens", 512),
        ],
        "finetune": [
            *(place / "calibrated", place / "tuned", *data),
            *("--steps", 4, "--batch-size", 8, "--save-every", 2, "--no-flip"),
        ],
        "eval": [
            *(place / "original", place / "calibrated", place / "tuned", *data),
            *("--batch-size", 8, "--rates", "10mbit", "100mbit", "--plot", place / "plot.png"),
        ],
        "run": [
            *(place / "tuned", "--devices", 4, "--top", 2),
            *(
                "--image",
                place / "pictures" / "test" / "white" / "0.png",
                place / "pictures" / "test" / "dark" / "1.png",
            ),
        ],
        "info": [place / "tuned"],
        "export": [place / "original", place / "exported"],
    }
    found = {}
    for verb, arguments in calls.items():
        report = place / f"{verb}.json"
        assert main([verb, *map(str, arguments), "--json", str(report)]) == 0, verb
        found[verb] = json.loads(report.read_text())
    return found


def test_eval_compares_the_original_with_four_devices(done, place):
    original, calibrated, tuned = done["eval"]["rows"]
    assert (original["N"], calibrated["N"], tuned["N"]) == (1, 4, 4)
    assert original["bytes"] == 0 and original["bits"] is None
    # 4 groups of 4 bits: 4 tokens of a shard, 2 blocks, 16 bits each; and a class state of 16 floats at the end.
    assert tuned["bits"] == 16 and tuned["bytes"] == 2 * 4 * 16 // 8 + 4 * 16
    assert tuned["10mbit"] == pytest.approx(tuned["compute ms"] + 1e3 * 8 * tuned["bytes"] / 10e6)
    assert (place / "plot.png").stat().st_size > 10_000


def test_eval_says_what_the_model_says(done, place):
    """Accuracy counted here, picture by picture."""
    checkpoint = checkpoints.load(place / "tuned")
    classify = parallelize(checkpoint.model, make_mesh(4))
    processor = checkpoint.processor
    right = [
        checkpoint.labels[int(np.argmax(classify(jnp.asarray(processor([decode_image(path)])))))] == path.parent.name
        for path in sorted((place / "pictures" / "test").glob("*/*.png"))
    ]
    assert done["eval"]["rows"][2]["accuracy %"] == pytest.approx(100 * np.mean(right))


def test_virtual_shards_give_the_same_on_a_single_device(done, place, monkeypatch):
    def no_mesh(*_: object) -> None:
        raise AssertionError("one device has no mesh")

    monkeypatch.setattr("eval.evaluate.make_mesh", no_mesh)
    report = place / "virtual.json"
    arguments = [str(place / "tuned"), "--data", str(place / "pictures"), "--batch-size", "8", "--virtual"]
    assert main(["eval", *arguments, "--json", str(report)]) == 0
    (row,) = json.loads(report.read_text())["rows"]
    assert all(row[column] == done["eval"]["rows"][2][column] for column in ("accuracy %", "N", "bits", "bytes"))


def test_calibrate_reports_every_block_and_keeps_the_weights(done, place):
    rows = done["calibrate"]["blocks"]
    assert [row["block"] for row in rows] == [0, 1] and all(0 < row["relative error"] < 1 for row in rows)
    before = nnx.state(checkpoints.load(place / "original").model, nnx.Param)
    after = nnx.state(checkpoints.load(place / "calibrated").model, nnx.Param)
    for a, b in zip(before.flat_state().leaves, after.flat_state().leaves, strict=True):
        np.testing.assert_array_equal(np.asarray(a[...]), np.asarray(b[...]))


def test_finetune_leaves_a_log_and_its_history(done, place):
    log = [json.loads(line) for line in (place / "tuned" / "train.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3, 4] and all(row["shards"] == 4 for row in log)
    history = checkpoints.read_meta(place / "tuned").history
    assert [step["verb"] for step in history] == ["convert", "calibrate", "finetune"] and history[-1]["steps"] == 4


def test_run_names_classes(done):
    rows = done["run"]["classes"]
    assert len(rows) == 4 and {row["class"] for row in rows} <= set(CLASSES)
    assert rows[0]["probability"] >= rows[1]["probability"]
    assert done["run"]["code_bytes_per_input"] == 2 * 4 * 16 // 8


@pytest.mark.slow
def test_a_checkpoint_of_site_kv_runs(done, place):
    data = ["--data", str(place / "pictures")]
    out = str(place / "kv")
    calibrate = ["calibrate", str(place / "original"), out, *data, "--site", "kv", "--class-token", "single"]
    assert main([*calibrate, "--groups", "8", "--codewords", "16", "--tokens", "256"]) == 0
    assert main(["run", out, "--devices", "2", "--image", str(place / "pictures" / "test" / "dark" / "0.png")]) == 0


BAD = {
    "no such checkpoint": ("info {place}/nothing", "nothing"),
    "Hugging Face folder instead of a checkpoint": ("info {place}/hf", "astra convert"),
    "no codebooks": ("finetune {place}/original {place}/new {data}", "astra calibrate"),
    "no codebooks to run with": ("run {place}/original --devices 2 --image {picture}", "astra calibrate"),
    "more devices than tokens": ("run {place}/tuned --devices 1x17 --image {picture}", "use at most|17 devices"),
    "devices that are no number": ("run {place}/tuned --devices four --image {picture}", "try 4 or 2x4"),
    "groups that do not divide": ("calibrate {place}/original {place}/new {data} --groups 5", "try 2 or 4 or 8|try 4"),
    "codewords that are no power of two": (
        "calibrate {place}/original {place}/new {data} --groups 4 --codewords 1000",
        "power of two.*try 512",
    ),
    "too few tokens": (
        "calibrate {place}/original {place}/new {data} --groups 4 --tokens 100",
        "100 tokens are too few",
    ),
    "a split that is not there": ("eval {place}/tuned {data} --split dev", "train"),
    "no such data": ("eval {place}/tuned --data {place}/nowhere", "nowhere"),
    "a rate without a unit": ("eval {place}/tuned {data} --rates 10", "such as 10mbit"),
    "no checkpoint given": ("eval {data}", "no checkpoint"),
    "a corrupt picture": ("run {place}/tuned --image {place}/corrupt.png", "corrupt.png"),
    "json into no folder": ("info {place}/tuned --json {place}/no/where.json", "does not exist"),
    "a plot of an unknown kind": ("eval {place}/tuned {data} --plot {place}/plot.xyz", "plot.xyz"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line(case, done, place, capsys):
    call, expected = BAD[case]
    picture = place / "pictures" / "test" / "dark" / "0.png"
    (place / "corrupt.png").write_bytes(picture.read_bytes()[:60])
    before = sorted(os.listdir(place))
    capsys.readouterr()
    filled = call.format(place=place, data=f"--data {place}/pictures", picture=picture)
    assert main(filled.split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("astra: error: ") and re.search(expected, lines[0]), lines
    assert sorted(os.listdir(place)) == before  # nothing half-written


def test_a_model_without_preprocessing_says_so(place, tmp_path, capsys):
    shutil.copytree(place / "hf", tmp_path / "hf")
    (tmp_path / "hf" / "preprocessor_config.json").unlink()
    picture = place / "pictures" / "test" / "dark" / "0.png"
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "bare")]) == 0
    assert main(["run", str(tmp_path / "bare"), "--image", str(picture)]) == 2
    assert "preprocessor_config.json" in capsys.readouterr().err


def test_a_label_outside_the_classes_is_named(done, place, tmp_path, capsys):
    for name in (*CLASSES, "violet"):
        folder = tmp_path / "test" / name
        folder.mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(folder / "0.png")
    assert main(["eval", str(place / "tuned"), "--data", str(tmp_path)]) == 2
    assert "5 classes" in capsys.readouterr().err
