"""The exact short cuts as a user has them: on by default, the same answer without, and an option that says which."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from PIL import Image

import checkpoints
from astra_jax.cli.main import main
from astra_jax.codecs.config import VQConfig
from astra_jax.models.key_value_tables import fold
from eval.cost.traffic import messages
from eval.service.service import Service, Setup
from eval.verbs import worker

ASTRA = VQConfig(groups=1, codewords=4)  # fewer than there are remote tokens: they are counted


@pytest.fixture
def place(tmp_path, tiny_vit, tiny_gpt2, word_tokenizer):
    """Checkpoints `vit` and `gpt2` wide enough to be folded, pictures of three classes, and a text."""
    vit = tiny_vit(ASTRA, hidden_size=32, num_channels=3, num_labels=3)
    half = {"size": {"height": 20, "width": 20}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    saved = checkpoints.Checkpoint("vit", vit.config, ASTRA, tuple("abc"), half, {}, "float32", (), vit)
    checkpoints.save(tmp_path / "vit", saved)
    gpt2 = tiny_gpt2(ASTRA, n_embd=32)
    files = word_tokenizer(gpt2.config.vocab_size - 4)
    saved = checkpoints.Checkpoint("gpt2", gpt2.config, ASTRA, None, None, {}, "float32", (), gpt2, None, files)
    checkpoints.save(tmp_path / "gpt2", saved)
    rng = np.random.default_rng(0)
    for label in "abc":
        (tmp_path / "pictures" / "test" / label).mkdir(parents=True)
        for number in range(3):
            picture = Image.fromarray(rng.integers(0, 255, (20, 20, 3), np.uint8))
            picture.save(tmp_path / "pictures" / "test" / label / f"{number}.png")
    (tmp_path / "text.txt").write_text(" ".join(f"w{word}" for word in rng.integers(0, 40, 100)))
    return tmp_path


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


def both(place, made, *arguments):
    """The JSON of a verb on two devices as it is, and with the fast path off, which makes no tables."""
    found = []
    for options, expected in (((), {True}), (("--fast-path", "off"), set())):
        made.clear()
        report = place / "report.json"
        assert main([*map(str, arguments), "--devices", "2", *options, "--json", str(report)]) == 0
        assert set(made) == expected
        found.append(json.loads(report.read_text()))
    return found


def test_run_names_the_same_classes(place, made):
    fast, plain = both(place, made, "run", place / "vit", "--image", place / "pictures" / "test" / "a" / "0.png")
    assert [row["class"] for row in fast["classes"]] == [row["class"] for row in plain["classes"]]
    likely = [[row["probability"] for row in found["classes"]] for found in (fast, plain)]
    np.testing.assert_allclose(*likely, atol=1e-5)
    assert fast["code_bytes_per_input"] == plain["code_bytes_per_input"]


def test_run_goes_on_with_the_same_text(place, made):
    prompt = " ".join(f"w{word}" for word in range(20))
    fast, plain = both(place, made, "run", place / "gpt2", "--prompt", prompt, "--max-new-tokens", 8)
    assert fast["texts"] == plain["texts"] and fast["new_tokens"] == plain["new_tokens"] == [8]


@pytest.mark.slow
def test_eval_finds_the_same_perplexity(place, made):
    fast, plain = both(place, made, "eval", place / "gpt2", "--data", place / "text.txt", "--length", 32)
    for column in ("perplexity", "nats per token"):
        assert fast["rows"][0][column] == pytest.approx(plain["rows"][0][column], rel=1e-5)
    assert fast["rows"][0]["bytes"] == plain["rows"][0]["bytes"]


@pytest.mark.slow
def test_eval_finds_the_same_accuracy(place, made):
    fast, plain = both(place, made, "eval", place / "vit", "--data", place / "pictures", "--batch-size", 4)
    assert fast["rows"][0]["accuracy %"] == plain["rows"][0]["accuracy %"]


def test_virtual_shards_have_the_plain_form_alone(place, made):
    """The option is then for the time of one device's share, and for nothing else."""
    fast, plain = both(place, made, "eval", place / "gpt2", "--data", place / "text.txt", "--length", 32, "--virtual")
    assert fast["rows"][0]["perplexity"] == plain["rows"][0]["perplexity"]


def test_what_one_device_would_do_is_counted_of_the_same_form(place):
    """Of 2 devices with 13 slots: 4 R D^2 in each of 2 blocks for 13 remote tokens, and 14 queries that meet 4
    codewords instead of 13 tokens, for 4 D each."""
    images = jnp.zeros((1, 20, 20, 3))
    fast, plain = (
        Service(Setup(place / "vit", devices="2", **options)).times for options in ({}, {"fast_path": "off"})
    )
    assert plain.operations(images, 1) == fast.operations(images, 1)
    saved = 2 * (4 * 13 * 32**2 + 14 * (13 - 4) * 4 * 32)
    assert plain.operations(images, 2) - fast.operations(images, 2) == saved


def test_bits_are_those_of_the_form_that_is_compiled(place, made):
    engine = Service(Setup(place / "vit", devices="2")).engine
    images = jnp.zeros((1, 20, 20, 3))
    found = []
    for fast_path, expected in ((True, [True]), (False, [])):
        made.clear()
        found.append(messages(engine.model, 2, images, engine.make, fast_path))
        assert made == expected
    assert found[0] == found[1]


def test_workers_are_told_when_they_start(place, capsys):
    """`astra run` cannot say it to workers: their programs are compiled."""
    parse = lambda *words: tyro.cli(worker.Args, args=[str(place / "vit"), *words]).setup.fast_path  # noqa: E731
    assert parse() == "on" and parse("--fast-path", "off") == "off"
    picture = place / "pictures" / "test" / "a" / "0.png"
    asked = ["run", str(place / "vit"), "--image", str(picture), "--workers", "127.0.0.1:7777", "--fast-path", "off"]
    assert main(asked) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "was said to the workers: leave it out" in line


@pytest.mark.parametrize("verb", ["run", "eval", "worker"])
def test_a_value_that_is_neither_is_refused(verb, place, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([verb, str(place / "vit"), *(["--data", str(place)] * (verb == "eval")), "--fast-path", "fast"])
    assert stopped.value.code == 2
    assert "invalid choice 'fast' for argument '--fast-path'" in " ".join(capsys.readouterr().err.split())
