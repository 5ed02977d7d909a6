"""Codes of the first blocks alone as a user of `astra eval`, `run` and `finetune` has them."""

import json

import pytest

import checkpoints
from astra_jax.cli.main import main
from astra_jax.codecs.config import AstraConfig
from checkpoints.info import compression

NESTED = dict(groups=4, codewords=16, codec="nested-pq", widths=(6, 6, 3, 3), levels=(1, 1, 2))
FIRST = ("--coded-blocks", "1")


@pytest.fixture
def place(gpt2s):
    """Checkpoints `nested` with a predictor, `faithful` and `plain` of a GPT-2 of two blocks, and a text."""
    nested = AstraConfig(**NESTED, predictor="mlp", hidden_units=5)
    return gpt2s(nested=nested, faithful=AstraConfig(4, 16), plain=None)


def evaluate(place, *options):
    report = place / "report.json"
    given = ["--data", str(place / "text.txt"), "--devices", "3", "--length", "30", "--rates", "1kbit"]
    assert main(["eval", *options, *given, "--virtual", "--json", str(report)]) == 0
    return json.loads(report.read_text())["rows"]


def test_eval_says_half_the_bits(place):
    """10 tokens of 2 groups of 4 bits, 10 bytes, in one of 2 blocks."""
    plain, row = evaluate(place, str(place / "plain"), str(place / "nested"), *FIRST, "--groups", "2")
    assert [row[key] for key in ("G", "bits", "bytes")] == [2, 4, 10] and plain["bits"] is None
    (both,) = evaluate(place, str(place / "nested"), "--groups", "2")
    assert [both[key] for key in ("G", "bits", "bytes")] == [2, 8, 20] and both["perplexity"] != row["perplexity"]


def test_run_sends_once(place):
    """32 slots of a prompt of 30 tokens, of which a device has 11, of 4 groups."""
    report = place / "run.json"
    given = ["--prompt", " ".join(f"w{word}" for word in range(30)), "--devices", "3", "--max-new-tokens", "4"]
    assert main(["run", str(place / "nested"), *given, *FIRST, "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    assert found["new_tokens"] == [4] and found["code_bytes_per_prompt"] == 22


@pytest.mark.parametrize("options", [FIRST, ("--groups", "2")])
def test_no_codes_are_sent_by_others(place, capsys, options):
    assert main(["run", str(place / "nested"), "--prompt", "w1 w2", *options, "--strategy", "tp"]) == 2
    said = capsys.readouterr().err.strip()
    assert f"{options[0]} is about codes, which strategy tp does not send" in said and "\n" not in said


def test_token_ids_alone(gpt2s):
    """10 tokens of 16 bits, once; and in block 1 nothing is lost, as nothing is sent."""
    place = gpt2s(ids=AstraConfig(**NESTED, predictor="mlp", hidden_units=5, side_info="token-ids"))
    (row,) = evaluate(place, str(place / "ids"), *FIRST)
    assert [row[key] for key in ("G", "bits", "ratio", "bytes")] == [4, 0, None, 20]
    (lossy,) = evaluate(place, str(place / "ids"), *FIRST, "--packet-loss", "0.9", "--seeds", "1")
    assert lossy["perplexity"] == pytest.approx(row["perplexity"], rel=1e-5)
    assert compression(AstraConfig(2, predictor="mlp", side_info="token-ids", coded_blocks=1), 16, 4) == {
        "bits per token and block": 0,
        "compression ratio": None,
    }


@pytest.mark.slow
def test_what_was_finetuned_so_is_used_so(place):
    out = place / "tuned"
    given = ["--data", str(place / "text.txt"), "--length", "30", "--steps", "2", "--batch-size", "2", "--shards", "3"]
    assert main(["finetune", str(place / "nested"), str(out), *given, *FIRST]) == 0
    assert checkpoints.load(out).astra.coded_blocks == 1
    assert checkpoints.load(out, coded_blocks=2).model.codec.coded_blocks == 2
    (row,) = evaluate(place, str(out))
    assert [row[key] for key in ("G", "bits", "bytes")] == [4, 8, 20]
    report = place / "info.json"
    assert main(["info", str(out), "--json", str(report)]) == 0
    facts = {row["name"]: row["value"] for row in json.loads(report.read_text())["facts"]}
    assert facts["coded_blocks"] == 1 and facts["bits per token and block"] == 8


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nested", ("--coded-blocks", "3"), "--coded-blocks is 3; "),
        ("nested", ("--coded-blocks", "0"), "has 2 blocks: give from 1 to 2"),
        ("faithful", FIRST, "has no predictor, which blocks without codes go by: run `astra calibrate --predictor"),
    ],
)
def test_what_does_not_fit(place, capsys, name, options, message):
    for verb, more in (("eval", ("--data", str(place / "text.txt"))), ("run", ("--prompt", "w1 w2 w3 w4"))):
        assert main([verb, str(place / name), *more, "--devices", "3", *options]) == 2
        said = capsys.readouterr().err.strip()
        assert message in said and "\n" not in said
