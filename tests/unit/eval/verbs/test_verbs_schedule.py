"""Schedules as a user of `astra calibrate`, `eval`, `run` and `finetune` has them."""

import json

import pytest

import checkpoints
from astra_jax.cli.main import main
from astra_jax.codecs.config import NestedPQConfig, VQConfig
from checkpoints.info import compression

NESTED = NestedPQConfig(4, 16, widths=(6, 6, 3, 3), levels=(1, 1, 2), predictor="mlp", hidden_units=5)


def of(*schedule):
    return NestedPQConfig(**{**vars(NESTED), "schedule": schedule})


@pytest.fixture
def place(gpt2s):
    """Checkpoints of a GPT-2 of two blocks, and a text."""
    return gpt2s(both=NESTED, first=of("coded", "predicted"), ids=of("known", "predicted"), plain=None)


def evaluate(place, *options):
    report = place / "report.json"
    given = ["--data", str(place / "text.txt"), "--devices", "3", "--length", "30", "--rates", "1kbit"]
    assert main(["eval", *options, *given, "--virtual", "--json", str(report)]) == 0
    return json.loads(report.read_text())["rows"]


def test_eval_says_half_the_bits(place, untimed):
    """10 tokens of 2 groups of 4 bits, 10 bytes, in one of 2 blocks."""
    plain, row = evaluate(place, str(place / "plain"), str(place / "first"), "--groups", "2")
    assert [row[key] for key in ("G", "bits", "bytes")] == [2, 4, 10] and plain["bits"] is None
    (both,) = evaluate(place, str(place / "both"), "--groups", "2")
    assert [both[key] for key in ("G", "bits", "bytes")] == [2, 8, 20] and both["perplexity"] != row["perplexity"]


def test_run_sends_once(place):
    """32 slots of a prompt of 30 tokens, of which a device has 11, of 4 groups."""
    report = place / "run.json"
    given = ["--prompt", " ".join(f"w{word}" for word in range(30)), "--devices", "3", "--max-new-tokens", "4"]
    assert main(["run", str(place / "first"), *given, "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    assert found["new_tokens"] == [4] and found["code_bytes_per_prompt"] == 22


def test_no_codes_are_sent_by_others(place, capsys):
    assert main(["run", str(place / "both"), "--prompt", "w1 w2", "--groups", "2", "--strategy", "tp"]) == 2
    said = capsys.readouterr().err.strip()
    assert "--groups is about codes, which strategy tp does not send" in said and "\n" not in said


def test_token_ids_alone(place, untimed):
    """10 tokens of 16 bits, once; and in block 1 nothing is lost, as nothing is sent."""
    (row,) = evaluate(place, str(place / "ids"))
    assert [row[key] for key in ("G", "bits", "ratio", "bytes")] == [4, 0, None, 20]
    (lossy,) = evaluate(place, str(place / "ids"), "--packet-loss", "0.9", "--seeds", "1")
    assert lossy["perplexity"] == pytest.approx(row["perplexity"], rel=1e-5)
    assert compression(VQConfig(2, predictor="mlp", schedule=("known", "predicted")), 16, 2) == {
        "bits per token and block": 0,
        "compression ratio": None,
    }


@pytest.mark.slow
def test_what_was_finetuned_so_is_used_so(place, untimed):
    out = place / "tuned"
    given = ["--data", str(place / "text.txt"), "--length", "30", "--steps", "2", "--batch-size", "2", "--shards", "3"]
    assert main(["finetune", str(place / "first"), str(out), *given]) == 0
    assert checkpoints.load(out).astra.schedule == ("coded", "predicted")
    (row,) = evaluate(place, str(out))
    assert [row[key] for key in ("G", "bits", "bytes")] == [4, 8, 20]
    report = place / "info.json"
    assert main(["info", str(out), "--json", str(report)]) == 0
    facts = {row["name"]: row["value"] for row in json.loads(report.read_text())["facts"]}
    assert facts["schedule"] == ["coded", "predicted"] and facts["bits per token and block"] == 8


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["vq", "nested-pq"])
def test_calibration_chooses_among_schedules_of_as_many_bits(place, codec):
    """Of the second block's tokens all codes, or of none: with as many bits for both, as the first is known."""
    given = ["--data", str(place / "text.txt"), "--codewords", "16", "--groups", "2", "--codec", codec]
    report, out = place / "calibrated.json", place / "chosen"
    choose = ["--predictor", "linear", "--schedule", "known+auto", "--json", str(report)]
    assert main(["calibrate", str(place / "plain"), str(out), *given, *choose]) == 0
    astra = checkpoints.read_meta(out).astra
    assert astra.schedule == ("known", "coded") and astra.mean_bits(2) == 8
    assert [row["tokens are"] for row in json.loads(report.read_text())["blocks"]] == ["known", "coded"]


def test_a_schedule_needs_a_predictor(place, capsys):
    given = ["calibrate", str(place / "plain"), str(place / "out"), "--data", str(place / "text.txt")]
    assert main([*given, "--schedule", "auto"]) == 2
    said = capsys.readouterr().err.strip()
    assert "--schedule auto needs a predictor: give --predictor linear, too" in said and "\n" not in said
