"""Codes in any order as a user of `astra eval` and `astra run` has them: the same answers for fewer bits."""

import json

import pytest

from astra_jax.cli.main import main
from astra_jax.codecs.config import AstraConfig


@pytest.fixture
def place(gpt2s):
    """Checkpoints `one`, `four` and `plain` of a GPT-2 with one, four and no groups of codes, and a text."""
    return gpt2s(one=AstraConfig(1, 16), four=AstraConfig(4, 16), plain=None)


def evaluate(place, *options):
    report = place / "report.json"
    given = ["--data", str(place / "text.txt"), "--devices", "2", "--length", "32", "--rates", "1kbit"]
    assert main(["eval", *options, *given, "--json", str(report)]) == 0
    return json.loads(report.read_text())["rows"]


@pytest.mark.parametrize("virtual", [pytest.param((), marks=pytest.mark.slow), ("--virtual",)], ids=["mesh", "virtual"])
def test_eval_finds_the_same_perplexity_for_fewer_bits(place, virtual):
    """16 codes of 4 bits are 8 bytes, of 16 codewords in any order 31 bits: 4 bytes in each of 2 blocks."""
    (kept,) = evaluate(place, str(place / "one"), *virtual)
    plain, free = evaluate(place, str(place / "plain"), str(place / "one"), "--code-order", "free", *virtual)
    assert free["perplexity"] == pytest.approx(kept["perplexity"], rel=1e-5)
    assert (kept["bytes"], free["bytes"]) == (16, 8)
    assert (kept["bits"], free["bits"]) == (4, 2) and free["ratio"] == 2 * kept["ratio"] == 16 * 32 / 2
    assert free["1kbit"] - free["compute ms"] == pytest.approx(64)
    assert (plain["strategy"], plain["N"], plain["bits"]) == ("single", 1, None)


def test_run_goes_on_with_the_same_text_for_fewer_bytes(place):
    """32 slots of a prompt of 30 tokens; 16 codes on each device, as above."""
    found, prompt = [], " ".join(f"w{word}" for word in range(30))
    for order in ("kept", "free"):
        report = place / f"{order}.json"
        given = ["--prompt", prompt, "--devices", "2", "--max-new-tokens", "4", "--code-order", order]
        assert main(["run", str(place / "one"), *given, "--json", str(report)]) == 0
        found.append(json.loads(report.read_text()))
    kept, free = found
    assert free["texts"] == kept["texts"] and free["new_tokens"] == [4]
    assert (kept["code_bytes_per_prompt"], free["code_bytes_per_prompt"]) == (16, 8)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("four", (), "codes cannot be sent in any order with 4 groups: keep the order"),
        ("one", ("--loss", "0.1"), "packets hold whole tokens, which codes in any order do not: leave out"),
    ],
)
def test_eval_says_where_order_matters(place, capsys, name, options, message):
    given = ["--data", str(place / "text.txt"), "--devices", "2", "--code-order", "free"]
    assert main(["eval", str(place / name), *given, *options]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert message in line
