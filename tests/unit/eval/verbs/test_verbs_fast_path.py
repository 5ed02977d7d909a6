"""The exact short cuts as a user has them: the same answers as in the plain form."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import checkpoints
from astra_jax.cli.main import main
from astra_jax.codecs.config import VQConfig
from astra_jax.models.key_value_tables import fold
from astra_jax.serving.compile import STRATEGIES
from astra_jax.strategies.coded import Astra, AstraPlain
from eval.cost.traffic import messages
from eval.service.service import Service, Setup

ASTRA = VQConfig(groups=1, codewords=4)  # fewer than there are remote tokens: they are counted


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_vit, tiny_gpt2, word_tokenizer):
    """Checkpoints `vit` and `gpt2` wide enough to be folded, pictures of three classes, and a text."""
    place = tmp_path_factory.mktemp("fast-path")
    vit = tiny_vit(ASTRA, hidden_size=32, num_channels=3, num_labels=3)
    half = {"size": {"height": 20, "width": 20}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    saved = checkpoints.Checkpoint("vit", vit.config, ASTRA, tuple("abc"), half, {}, "float32", (), vit)
    checkpoints.save(place / "vit", saved)
    gpt2 = tiny_gpt2(ASTRA, n_embd=32)
    files = word_tokenizer(gpt2.config.vocab_size - 4)
    saved = checkpoints.Checkpoint("gpt2", gpt2.config, ASTRA, None, None, {}, "float32", (), gpt2, None, files)
    checkpoints.save(place / "gpt2", saved)
    rng = np.random.default_rng(0)
    for label in "abc":
        (place / "pictures" / "test" / label).mkdir(parents=True)
        for number in range(3):
            picture = Image.fromarray(rng.integers(0, 255, (20, 20, 3), np.uint8))
            picture.save(place / "pictures" / "test" / label / f"{number}.png")
    (place / "text.txt").write_text(" ".join(f"w{word}" for word in rng.integers(0, 40, 100)))
    return place


@pytest.fixture
def made(monkeypatch):
    """For every model that was about to be folded since the last look, whether tables were made."""
    seen = []

    def spy(model, *platform):
        found = fold(model, *platform)
        seen.append(found is not model)
        return found

    for user in ("astra_jax.serving.compile", "eval.cost.timing"):
        monkeypatch.setattr(f"{user}.fold", spy)
    return seen


@pytest.fixture
def both(place, made, monkeypatch):
    """The JSON of a verb on two devices as it is, and in the plain form, which makes no tables."""

    def run(*arguments):
        found = []
        for strategy, expected in ((Astra, {True}), (AstraPlain, set())):
            made.clear()
            monkeypatch.setitem(STRATEGIES, "astra", strategy)
            report = place / "report.json"
            assert main([*map(str, arguments), "--devices", "2", "--json", str(report)]) == 0
            assert set(made) == expected
            found.append(json.loads(report.read_text()))
        return found

    return run


def test_run_names_the_same_classes(place, both):
    fast, plain = both("run", place / "vit", "--image", place / "pictures" / "test" / "a" / "0.png")
    assert [row["class"] for row in fast["classes"]] == [row["class"] for row in plain["classes"]]
    likely = [[row["probability"] for row in found["classes"]] for found in (fast, plain)]
    np.testing.assert_allclose(*likely, atol=1e-5)
    assert fast["code_bytes_per_input"] == plain["code_bytes_per_input"]


def test_run_goes_on_with_the_same_text(place, both):
    prompt = " ".join(f"w{word}" for word in range(20))
    fast, plain = both("run", place / "gpt2", "--prompt", prompt, "--max-new-tokens", 8)
    assert fast["texts"] == plain["texts"] and fast["new_tokens"] == plain["new_tokens"] == [8]


@pytest.mark.slow
def test_eval_finds_the_same_perplexity(place, both):
    fast, plain = both("eval", place / "gpt2", "--data", place / "text.txt", "--length", 32)
    for column in ("perplexity", "nats per token"):
        assert fast["rows"][0][column] == pytest.approx(plain["rows"][0][column], rel=1e-5)
    assert fast["rows"][0]["bytes"] == plain["rows"][0]["bytes"]


@pytest.mark.slow
def test_eval_finds_the_same_accuracy(place, both):
    fast, plain = both("eval", place / "vit", "--data", place / "pictures", "--batch-size", 4)
    assert fast["rows"][0]["accuracy %"] == plain["rows"][0]["accuracy %"]


def test_virtual_shards_have_the_plain_form_alone(place, both):
    """Tables are then for the time of one device's share, and for nothing else."""
    fast, plain = both("eval", place / "gpt2", "--data", place / "text.txt", "--length", 32, "--virtual")
    assert fast["rows"][0]["perplexity"] == plain["rows"][0]["perplexity"]


def test_bits_are_those_of_the_form_that_is_compiled(place, made):
    engine = Service(Setup(place / "vit", devices="2")).engine
    images = jnp.zeros((1, 20, 20, 3))
    found = []
    for strategy, expected in ((Astra, [True]), (AstraPlain, [])):
        made.clear()
        found.append(messages(engine.model, 2, images, strategy.of))
        assert made == expected
    assert found[0] == found[1]
