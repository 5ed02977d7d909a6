"""The lab's report: its arithmetic by hand, what is measured anew, and that its page is in agreement with itself."""

import json
import re
import sys
from pathlib import Path

import pytest

from astra_jax.errors import AstraError
from eval.network.lab import Ended
from eval.reports import lab
from eval.reports.lab import Args, agreement, main, rows_of
from tests.helpers import ROOT

DOCS = ROOT / "docs" / "lab.md"


def measured(strategy, predicted, *walls):
    least, middle, most = sorted(walls)
    return {
        "strategy": strategy,
        "compute ms": 900.0,
        "predicted ms": predicted,
        "measured ms": middle,
        "least ms": least,
        "most ms": most,
        "measured / predicted": middle / predicted,
    }


MEASURED = [measured("single", 3000.0, 2900.0, 3000.0, 3100.0), measured("sp", 4000.0, 5900.0, 6000.0, 6500.0)]


@pytest.fixture
def labs(monkeypatch):
    """Stands in for the lab: writes what `astra bench` would, and records what it was asked to run."""
    made = []

    class Lab:
        code = 0

        def __init__(self, hosts, rate, cpu):
            self.made = (hosts, rate, cpu)

        def __enter__(self):
            return self

        def __exit__(self, *raised):
            pass

        def run(self, argv):
            made.append((self.made, argv))
            if not self.code:
                Path(argv[argv.index("--json") + 1]).write_text(json.dumps({"measured": MEASURED, "exchange_ms": 5.0}))
            return [Ended(self.code, 1.0, 0, 0)] * 4

    monkeypatch.setattr(lab, "Lab", Lab)
    made.append(Lab)
    return made


def page(tmp_path):
    path = tmp_path / "page.md"
    marks = (f"<!-- {part} of `make lab` -->\n<!-- end of {part} of `make lab` -->\n" for part in PARTS)
    path.write_text("".join(marks))
    return path


PARTS = ("passes", "exchanges")


def test_rows_by_hand():
    single, sp = rows_of("10mbit", MEASURED)
    assert single == {
        "rate": "10mbit",
        "strategy": "single",
        "measured s": 3.0,
        "least s": 2.9,
        "most s": 3.1,
        "predicted s": 3.0,
        "measured / predicted": 1.0,
        "times faster than one device": 1.0,
    }
    assert (sp["measured s"], sp["predicted s"], sp["measured / predicted"]) == (6.0, 4.0, 1.5)
    assert sp["times faster than one device"] == 0.5


def test_what_is_off_is_named():
    rows = rows_of("10mbit", MEASURED)
    assert agreement(rows) == "1 of 2 measurements are within 20% of the prediction; not so sp at 10mbit (1.50)."
    assert agreement(rows[:1]) == "1 of 1 measurements are within 20% of the prediction."


def test_a_rate_is_measured_once(tmp_path, labs):
    args = Args(rates=("10mbit", "500mbit"), repeats=7, folder=tmp_path / "kept" / "lab", markdown=page(tmp_path))
    main(args)
    (hosts, argv), (second, _) = labs[1:]
    assert hosts == (4, 10e6, 0.4) and second == (4, 500e6, 0.4)
    assert argv[:5] == [sys.executable, "-m", "astra_jax.cli.main", "bench", "vit-base"]
    options = dict(zip(argv[5::2], argv[6::2], strict=True))
    assert options["--tokens"] == "1024" and options["--repeats"] == "7" and options["--rates"] == "10mbit"
    assert options["--host"] == "{host}" and options["--coordinator"] == "{coordinator}"
    text = args.markdown.read_text()
    assert "| 500mbit | sp | 6 | 5.9 | 6.5 | 4 | 1.5 | 0.5 |" in text and "| 10mbit | 5 |" in text
    assert "2 of 4 measurements" in text
    assert (tmp_path / "page.png").stat().st_size > 10_000
    main(args)
    assert len(labs) == 3 and args.markdown.read_text() == text
    next(args.folder.glob("*/*-500mbit-*")).unlink()
    main(args)
    assert [made[0][1] for made in labs[3:]] == [500e6]


def test_what_other_code_did_is_measured_anew(tmp_path, labs, monkeypatch):
    args = Args(rates=("10mbit",), folder=tmp_path)
    for source, measured in (("one", 1), ("two", 2), ("one", 2)):
        monkeypatch.setattr("eval.reports.lab.source", lambda source=source: source)
        main(args)
        assert len(labs) - 1 == measured


def test_a_host_that_fails_is_no_result(tmp_path, labs):
    labs[0].code = 3
    with pytest.raises(AstraError, match="`astra bench` at 10mbit ended with exit code 3"):
        main(Args(rates=("10mbit",), folder=tmp_path))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_page_agrees_with_itself():
    """Nobody has written figures into it by hand: every row follows from its times, and the sentence from the rows."""
    text = DOCS.read_text()
    between = {part: re.search(f"<!-- {part} of .*?-->\n(.*)\n<!-- end of {part} of", text, re.S)[1] for part in PARTS}
    table, sentence, _ = between["passes"].split("\n\n")
    names, _, *lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    rows = [dict(zip(names, line, strict=True)) for line in lines]
    rows = [{k: v if k in ("rate", "strategy") else float(v) for k, v in row.items()} for row in rows]
    strategies = ("single", "astra G=1", "astra G=16", "astra G=32", "sp", "tp")
    expected = [(rate, strategy) for rate in Args().rates for strategy in strategies]
    assert [(row["rate"], row["strategy"]) for row in rows] == expected
    single = {row["rate"]: row["measured s"] for row in rows if row["strategy"] == "single"}
    for row in rows:
        assert row["least s"] <= row["measured s"] <= row["most s"]
        assert row["measured / predicted"] == pytest.approx(row["measured s"] / row["predicted s"], rel=2e-3)
        faster = single[row["rate"]] / row["measured s"]
        assert row["times faster than one device"] == pytest.approx(faster, rel=2e-3)
    assert sentence == agreement(rows)
    assert DOCS.with_suffix(".png").is_file()
