"""Fewer groups for far devices as a user of `astra eval` and `astra run` has them."""

import json

import pytest

from astra_jax.cli.main import main
from astra_jax.codecs.config import AstraConfig

NESTED = AstraConfig(groups=4, codewords=16, codec="nested-pq", widths=(6, 6, 3, 3), levels=(1, 1, 2))
NEAR = ("--near", "0,1", "--far-groups", "2")


@pytest.fixture
def place(gpt2s):
    """Checkpoints `nested`, `faithful` and `plain` of a GPT-2, and a text."""
    return gpt2s(nested=NESTED, faithful=AstraConfig(4, 16), plain=None)


def evaluate(place, *options):
    report = place / "report.json"
    given = ["--data", str(place / "text.txt"), "--devices", "3", "--length", "30", "--rates", "1kbit"]
    assert main(["eval", *options, *given, "--json", str(report)]) == 0
    return json.loads(report.read_text())["rows"]


@pytest.mark.slow
def test_eval_finds_the_same_on_a_mesh_and_on_virtual_shards(place):
    """10 tokens: 2 groups of 4 bits are 10 bytes, to all, and the other 10 to the one that is near, in 2 blocks."""
    plain, mesh = evaluate(place, str(place / "plain"), str(place / "nested"), *NEAR)
    (virtual,) = evaluate(place, str(place / "nested"), *NEAR, "--virtual")
    assert mesh["perplexity"] == pytest.approx(virtual["perplexity"], rel=1e-5)
    for row in (mesh, virtual):
        assert [row[key] for key in ("G", "far G", "bits", "bytes", "compute ms", "1kbit")] == [4, 2, 8, 40, None, None]
    assert (plain["N"], plain["far G"]) == (1, None)


@pytest.mark.slow
def test_run_goes_on_with_a_text(place):
    """32 slots of a prompt of 30 tokens, of which a device has 11."""
    report = place / "run.json"
    given = ["--prompt", " ".join(f"w{word}" for word in range(30)), "--devices", "3", "--max-new-tokens", "4"]
    assert main(["run", str(place / "nested"), *given, *NEAR, "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    assert found["new_tokens"] == [4] and found["code_bytes_per_prompt"] == 44


@pytest.mark.parametrize(
    ("verb", "name", "options", "message"),
    [
        ("eval", "nested", NEAR[:2], "--near needs to know more"),
        ("eval", "nested", (*NEAR, "--loss", "0.1"), "--near is for strategy astra where no packets are lost"),
        ("eval", "nested", (*NEAR, "--strategy", "sp"), "--near is for strategy astra where no packets are lost"),
        ("eval", "faithful", NEAR, "fewer groups for far devices need nested codes"),
        ("eval", "nested", ("--near", "0,3", "--far-groups", "2"), "near names 3; the 3 devices"),
        ("eval", "nested", (*NEAR, "--strategy", "single"), "--near is for several devices; one alone sends nothing"),
        ("run", "nested", NEAR[2:], "--far-groups needs to know more"),
        ("run", "nested", (*NEAR, "--strategy", "tp"), "--near is about codes, which strategy tp does not send"),
        ("run", "nested", (*NEAR, "--on-failure", "shrink"), "--near names hosts by numbers, which change"),
        ("run", "faithful", NEAR, "fewer groups for far devices need nested codes"),
    ],
)
def test_what_does_not_fit(place, capsys, verb, name, options, message):
    more = ("--data", str(place / "text.txt")) if verb == "eval" else ("--prompt", "w1 w2 w3 w4")
    assert main([verb, str(place / name), *more, "--devices", "3", *options]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and "\n" not in said
