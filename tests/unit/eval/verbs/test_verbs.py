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
from astra_jax.cli.main import main
from astra_jax.inputs.images import decode_image
from astra_jax.mesh.sharding import Shards
from astra_jax.models.vit import ViT, ViTConfig
from astra_jax.strategies.coded import Astra
from checkpoints.huggingface import write_folder
from eval.network.packet_loss import arrived
from eval.quality.reached import read_quality
from tests.helpers.models import draw

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
        model=draw(ViT, CONFIG),
    )
    write_folder(checkpoint, place / "hf")
    return place


def call(place: Path, verb: str, *arguments: object) -> dict:
    """Runs a verb and returns its JSON."""
    report = place / f"{verb}.json"
    assert main([verb, *map(str, arguments), "--json", str(report)]) == 0, verb
    return json.loads(report.read_text())


@pytest.fixture(scope="module")
def converted(place) -> dict:
    """The JSON of `astra convert`, which made the checkpoint `original`."""
    return call(place, "convert", place / "hf", place / "original")


@pytest.fixture(scope="module")
def done(place, converted) -> dict[str, dict]:
    """Every verb once; verb -> its JSON."""
    data = ["--data", str(place / "pictures")]
    calls = {
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
    return {"convert": converted} | {verb: call(place, verb, *arguments) for verb, arguments in calls.items()}


def test_eval_compares_the_original_with_four_devices(done, place):
    original, calibrated, tuned = done["eval"]["rows"]
    assert (original["N"], calibrated["N"], tuned["N"]) == (1, 4, 4)
    assert original["bytes"] == 0 and original["bits"] is None
    # 4 groups of 4 bits: 4 tokens of a shard, 2 blocks, 16 bits each; and a class state of 16 floats at the end.
    assert tuned["bits"] == 16 and tuned["bytes"] == 2 * 4 * 16 // 8 + 4 * 16
    assert tuned["10mbit"] == pytest.approx(tuned["compute ms"] + 1e3 * 8 * tuned["bytes"] / 10e6)
    assert (place / "plot.png").stat().st_size > 10_000


def test_plan_reads_what_eval_wrote(done, place):
    astra, rows = checkpoints.read_meta(place / "tuned").astra, done["eval"]["rows"]
    quality = read_quality(place / "eval.json", astra)
    assert quality.codes == astra and quality.others == 0
    assert quality.reached == {(4, 4): min(row["accuracy %"] for row in rows if row["N"] == 4)}


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


def test_virtual_shards_give_the_same_on_a_single_device(done, place, untimed, monkeypatch):
    def no_mesh(*_: object) -> None:
        raise AssertionError("one device has no mesh")

    monkeypatch.setattr("eval.quality.ways.make_mesh", no_mesh)
    report = place / "virtual.json"
    arguments = [str(place / "tuned"), "--data", str(place / "pictures"), "--batch-size", "8", "--virtual"]
    assert main(["eval", *arguments, "--json", str(report)]) == 0
    (row,) = json.loads(report.read_text())["rows"]
    assert all(row[column] == done["eval"]["rows"][2][column] for column in ("accuracy %", "N", "bits", "bytes"))


def evaluate(place: Path, arguments: str) -> dict:
    """The JSON of `astra eval` on the pictures."""
    report, data = place / "evaluate.json", place / "pictures"
    assert main(["eval", *arguments.format(place=place).split(), "--data", str(data), "--json", str(report)]) == 0
    return json.loads(report.read_text())


def test_a_loss_of_nothing_changes_nothing(done, place, untimed):
    found = evaluate(place, "{place}/original {place}/tuned --batch-size 8 --packet-loss 0 --seeds 2 --packet 2")
    alone, row = found["rows"]
    expected = done["eval"]["rows"][2]
    assert row["accuracy %"] == expected["accuracy %"]
    assert row["accuracy % sd"] == 0 and alone["accuracy % sd"] is None
    assert alone["accuracy %"] == done["eval"]["rows"][0]["accuracy %"]
    assert all(row[column] == expected[column] for column in ("strategy", "N", "G", "bits", "bytes"))
    assert found["packet_loss"] == {"rate": 0, "burst": None, "packet": 2}
    assert (alone["lost"], row["lost"]) == (None, "masked") and "lost" not in expected
    assert [(one["checkpoint"], one["seed"]) for one in found["seeds"]] == [
        ("original", None),
        ("tuned", 0),
        ("tuned", 1),
    ]


def test_packet_loss_is_a_program_run_many_times(done, place, untimed, monkeypatch):
    """One program for all seeds and batches; every batch loses other packets, and a second run the same."""
    traced, drawn = [], []

    def spy(real, kept):
        return lambda *args, **options: kept.append(real(*args, **options)) or kept[-1]

    monkeypatch.setattr(Astra, "virtual", spy(Astra.virtual, traced))
    monkeypatch.setattr("eval.quality.ways.arrived", spy(arrived, drawn))
    arguments = "{place}/tuned --batch-size 7 --packet-loss 0.6 --burst 3 --packet 2 --seeds 3"
    found = evaluate(place, f"{arguments} --plot {place}/lossy.svg")
    assert len(traced) == 1 and traced[0].transport.arrived.shape == (2, 4, 4, 7, 4)
    assert len(drawn) == 3 * 3 == len({there.tobytes() for there in drawn})
    assert abs(np.mean([there.mean() for there in drawn]) - (1 - 0.6 * 12 / 20)) < 0.05  # 12 of 20 slots are on a link
    assert found["packet_loss"] == {"rate": 0.6, "burst": 3.0, "packet": 2}
    assert evaluate(place, arguments)["seeds"] == found["seeds"] and len(traced) == 1
    assert [there.tobytes() for there in drawn[9:]] == [there.tobytes() for there in drawn[:9]]


def test_tokens_in_proportion_to_speed(done, place):
    """16 tokens for speeds 1 1 0.5 0.5 are shards of 5 5 3 3: every device sends slots for 5."""
    (row,) = evaluate(place, f"{{place}}/tuned --batch-size 8 --speeds 1 1 0.5 0.5 --plot {place}/speeds.png")["rows"]
    assert row["bytes"] == 2 * 5 * 16 // 8 + 4 * 16
    assert row["compute ms"] is None and row["10mbit"] is None
    checkpoint = checkpoints.load(place / "tuned")
    model, split = checkpoint.model, Shards((5, 5, 3, 3), "distributed")
    files = sorted((place / "pictures" / "test").glob("*/*.png"))
    images = jnp.asarray(checkpoint.processor([decode_image(path) for path in files]))
    classify = nnx.jit(lambda model, images: model(split.scatter(model.to_tokens(images)), Astra.virtual(split))[0])
    right = [
        checkpoint.labels[i] == path.parent.name
        for i, path in zip(np.argmax(classify(model, images), -1), files, strict=True)
    ]
    assert row["accuracy %"] == pytest.approx(100 * np.mean(right))


@pytest.mark.parametrize(
    ("strategy", "devices", "bits"),
    # Of 16 numbers a token in 2 blocks. sp: 4 tokens and a class token, and its state at the end; tp: all 17, twice.
    [
        ("sp", 4, 32 * 16 * (2 * 5 + 1)),
        pytest.param("tp", 2, 32 * 16 * 2 * 2 * 17, marks=pytest.mark.slow),
        pytest.param("bp-ag", 4, 32 * 4 * 4 * 5, marks=pytest.mark.slow),
        pytest.param("bp-sp", 4, 32 * 16 * 3 * 5, marks=pytest.mark.slow),
    ],
)
def test_rivals(converted, place, strategy, devices, bits):
    """They need no codebooks, and the exact ones give what one device gives."""
    arguments = f"{{place}}/original --batch-size 8 --strategy {strategy} --devices {devices}"
    (row,) = evaluate(place, arguments + f" --plot {place}/rivals.png" * (strategy == "sp"))["rows"]
    assert (row["strategy"], row["N"], row["G"], row["bits"]) == (strategy, devices, None, None)
    assert 8 * row["bytes"] == bits and row["100mbit"] > row["compute ms"] > 0
    if strategy in ("sp", "tp"):
        (alone,) = evaluate(place, "{place}/original --batch-size 8")["rows"]
        assert row["accuracy %"] == alone["accuracy %"]


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


def test_run_by_another_strategy_needs_no_codebooks(done, place, capsys):
    """And names the same classes as one device."""
    picture, out = place / "pictures" / "test" / "dark" / "0.png", place / "rival.json"

    def run(*options: str) -> dict:
        assert main(["run", str(place / "original"), "--image", str(picture), "--json", str(out), *options]) == 0
        return json.loads(out.read_text())

    alone = run("--devices", "1")
    # Bytes of 8 of 16 tokens and a class token, in 2 blocks; of all 17, twice in each.
    for strategy, sent in (("sp", 4 * 16 * 2 * 9), ("tp", 4 * 16 * 2 * 2 * 17)):
        capsys.readouterr()
        found = run("--devices", "2", "--strategy", strategy)
        assert "of codes" not in capsys.readouterr().out.splitlines()[-1]
        for one, several in zip(alone["classes"], found["classes"], strict=True):
            assert one["class"] == several["class"]
            np.testing.assert_allclose(one["probability"], several["probability"], rtol=1e-4)
        assert found["bytes_per_input"] == sent


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
    "no samples": (
        "calibrate {place}/original {place}/new {data} --groups 4 --samples 0",
        "--samples is 0; .* at least 1",
    ),
    "no iterations": ("calibrate {place}/original {place}/new {data} --groups 4 --iterations 0", "--iterations is 0; "),
    "a seed below 0": ("calibrate {place}/original {place}/new {data} --seed -1", "--seed is -1; it must be 0 or more"),
    "a state every 0 steps": ("finetune {place}/calibrated {place}/new {data} --save-every 0", "--save-every is 0; "),
    "a number that only Python reads": (
        "eval {place}/tuned {data} --limit 1_0",
        "--limit is 1_0; it must be a whole",
    ),
    "a number without end": (
        "eval {place}/tuned {data} --packet-loss inf",
        "--packet-loss is inf; it must be a number",
    ),
    "a split that is not there": ("eval {place}/tuned {data} --split dev", "train"),
    "no such data": ("eval {place}/tuned --data {place}/nowhere", "nowhere"),
    "a rate without a unit": ("eval {place}/tuned {data} --rates 10", "such as 10mbit"),
    "no checkpoint given": ("eval {data}", "no checkpoint"),
    "more loss than there is": ("eval {place}/tuned {data} --packet-loss 1.1", "packet loss is 1.1; .* try 0.05"),
    "less loss than none": ("eval {place}/tuned {data} --packet-loss -0.1", "packet loss is -0.1; .* try 0.05"),
    "a packet for half a token": (
        "eval {place}/tuned {data} --packet-loss 0.1 --packet 1",
        "1 bytes, .* one token take 2",
    ),
    "no seeds": ("eval {place}/tuned {data} --packet-loss 0.1 --seeds 0", "--seeds is 0"),
    "bursts too short": ("eval {place}/tuned {data} --packet-loss 0.9 --burst 2", "9 packets or more"),
    "bursts of no loss": ("eval {place}/tuned {data} --burst 2", "--burst .* give --packet-loss"),
    "packets of no loss": ("eval {place}/tuned {data} --packet 99", "--packet .* give --packet-loss"),
    "what becomes of no loss": ("eval {place}/tuned {data} --lost masked", "--lost .* give --packet-loss"),
    "nothing is predicted": (
        "eval {place}/tuned {data} --packet-loss 0.1 --lost predicted",
        "no predictor.*--lost masked",
    ),
    "seeds of no loss": ("eval {place}/tuned {data} --seeds 2", "--seeds .* give --packet-loss"),
    "loss within one device": (
        "eval {place}/tuned {data} --packet-loss 0.1 --devices 1",
        "--packet-loss is for several devices",
    ),
    "virtual shards on hosts": (
        "eval {place}/tuned {data} --virtual --coordinator 127.0.0.1:7777 --hosts 2 --host 0",
        "--virtual is simulated on one device: run it on one host, without --coordinator",
    ),
    "loss of no exchange": (
        "eval {place}/tuned {data} --packet-loss 0.1 --strategy single",
        "--packet-loss is for several devices",
    ),
    "loss of no codes": (
        "eval {place}/tuned {data} --packet-loss 0.1 --strategy sp",
        "--packet-loss .* strategy sp does not",
    ),
    "virtual heads": ("eval {place}/tuned {data} --virtual --strategy tp", "--virtual .* strategy tp does not"),
    "heads that do not divide": ("eval {place}/tuned {data} --strategy tp", "heads.*4 devices"),
    "too few speeds": ("eval {place}/tuned {data} --speeds 1 2", "2 speeds .* 4 devices"),
    "a device that stands still": ("eval {place}/tuned {data} --speeds 1 1 0 1", "speed is 0; .* above 0"),
    "an infinite speed": ("eval {place}/tuned {data} --speeds 1 1 inf 1", "speed is inf; "),
    "a device too slow for a token": ("eval {place}/tuned {data} --speeds 0.001 1 1 1", "would get none"),
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
