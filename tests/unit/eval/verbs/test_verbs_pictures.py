"""The verbs on a model that gives embeddings of pictures: k-NN accuracy, similarities, and what wrong input gets."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import checkpoints
from astra_jax.cli.main import main
from astra_jax.codecs.config import VQConfig
from astra_jax.inputs.images import ImageProcessor
from astra_jax.models.dinov2 import Dinov2, Dinov2Config
from checkpoints.huggingface import write_folder
from tests.helpers.folders import described
from tests.helpers.models import draw

# A picture has 8 x 8 pixels, which the preprocessing cuts out of 10; its table of places is for 16.
CONFIG = Dinov2Config(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=1, image_size=16, patch_size=4, picture_size=8
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `pictures/test/CLASS/*.png`, and checkpoints with codes and without."""
    place, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for label, name in enumerate(("dark", "light")):
        folder = place / "pictures" / "test" / name
        folder.mkdir(parents=True)
        for i in range(6):
            pixels = 150 * label + rng.integers(0, 60, (12, 15, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    processor = ImageProcessor(size=10, crop_size=(8, 8)).to_hf()
    codes = VQConfig(groups=2, codewords=8)
    original = described("dinov2", CONFIG, model=draw(Dinov2, CONFIG), preprocessing=processor)
    write_folder(original, place / "hf")
    assert main(["convert", str(place / "hf"), str(place / "original")]) == 0
    coded = described("dinov2", CONFIG, model=draw(Dinov2, CONFIG, codes), preprocessing=processor, astra=codes)
    checkpoints.save(place / "coded", coded)
    return place


def test_a_folder_says_the_size_of_pictures(place: Path) -> None:
    assert checkpoints.read_meta(place / "original").config == CONFIG


def test_eval_says_how_often_neighbours_are_of_the_class(place: Path, untimed: None) -> None:
    paths = [str(place / name) for name in ("original", "coded")]
    options = ["--data", str(place / "pictures"), "--devices", "2", "--batch-size", "12", "--rates", "10mbit"]
    assert main(["eval", *paths, *options, "--json", str(place / "eval.json")]) == 0
    report = json.loads((place / "eval.json").read_text())
    assert "each of 12 images is given the class that its 5 nearest others vote for" in report["notes"][0]
    original, coded = report["rows"]
    assert (original["N"], coded["N"], coded["T"]) == (1, 2, 4)
    assert coded["bytes"] == 2 * 2 + 4 * 16  # two tokens of 6 bits in two blocks, and the class state
    assert 0 <= coded["k-NN accuracy %"] <= 100 and 50 < original["k-NN accuracy %"] <= 100


def test_run_compares_pictures(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(place / "pictures" / "test" / name) for name in ("dark/0.png", "dark/0.png", "light/1.png")]
    run = ["run", str(place / "original"), "--json", str(place / "run.json"), "--image"]
    assert main([*run, *names]) == 0
    rows = json.loads((place / "run.json").read_text())["similarities"]
    assert [(row["picture"], row["and"]) for row in rows] == [(names[0], names[1]), *2 * [(names[0], names[2])]]
    assert [row["cosine"] for row in rows[:2]] == pytest.approx([1, rows[2]["cosine"]]) and rows[1]["cosine"] < 0.9995
    capsys.readouterr()
    assert main([*run, names[0]]) == 2
    assert "is an encoder: give two or more pictures with --image" in capsys.readouterr().err


def test_there_is_no_loss_for_embeddings(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", str(place / "coded"), str(place / "tuned"), "--data", str(place / "pictures")]) == 2
    assert "gives embeddings and has no classifier, so there is no loss for it" in capsys.readouterr().err


def test_pictures_that_do_not_fit_are_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hf").mkdir()
    for file in (place / "hf").iterdir():
        (tmp_path / "hf" / file.name).write_bytes(file.read_bytes())
    for crop, said in ((6, "picture_size 6 is not a multiple of patch_size 4"), ((8, 4), "pictures of 8 x 4 pixels")):
        (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps({"size": crop}))
        assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
