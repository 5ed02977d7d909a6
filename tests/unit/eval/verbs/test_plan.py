"""`astra plan`, the whole way on a tiny model."""

import json

import pytest

from astra_jax.cli.main import main
from astra_jax.models.vit import ViTConfig
from eval.cost.presets import PRESETS
from eval.quality.reached import Quality
from eval.verbs.plan import budget_note
from tests.helpers.evaluated import ORIGINAL, coded, evaluated, nested


def test_what_a_budget_leaves_and_what_not():
    quality = Quality("accuracy %", 92.5, {(4, 1): 89.0, (4, 16): 91.5})
    assert budget_note(quality, 1.0, 4) == (
        "of astra, measured for these numbers of devices only, G=16 on 4 devices is within 1 points of accuracy % "
        "92.5, and not G=1 on 4 (loses 3.5)"
    )
    assert "only, nothing is within 0 points" in budget_note(quality, 0.0, 4)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A known architecture `tiny`: two heads, of 16 tokens; and a device of a million operations per second."""
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, patch_size=4, num_labels=4
    )
    monkeypatch.setitem(PRESETS, "tiny", ("vit", config))
    (tmp_path / "slow.json").write_text('{"name": "slow", "flops_per_second": 1e6}')
    return f"tiny --tokens 16 --device-profile {tmp_path}/slow.json"


def plan(tmp_path, arguments):
    path = tmp_path / "plan.json"
    assert main(["plan", *arguments.split(), "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_the_whole_way(tiny, tmp_path, capsys):
    found = plan(tmp_path, f"{tiny} --rate 1mbit --devices 3 --groups 1,4")
    ways = {(row["strategy"], row["N"], row["G"]) for row in found["candidates"]}
    # 2 heads and 3 devices: no tp
    assert ways == {("single", 1, None), ("tp", 2, None)} | {
        (name, N, G) for N in (2, 3) for name, G in (("astra", 1), ("astra", 4), ("sp", None))
    }
    totals = [row["total ms"] for row in found["candidates"]]
    assert totals == sorted(totals)
    (row,) = (row for row in found["candidates"] if (row["strategy"], row["N"], row["G"]) == ("astra", 2, 4))
    # 8 tokens of 4 codes of 10 bits in 2 blocks, and the class state of 16 floats.
    assert row["link ms"] == pytest.approx((2 * 8 * 4 * 10 + 16 * 32) / 1e3)
    assert row["total ms"] == pytest.approx(row["link ms"] + row["compute ms"])
    best = found["candidates"][0]
    assert found["choice"] == {"strategy": best["strategy"], "N": best["N"], "groups": best["G"]}
    assert found["seconds"] == pytest.approx(best["total ms"] / 1e3) and found["seconds"] < found["single_seconds"]
    assert found["reason"].startswith("use ") and found["reason"] in capsys.readouterr().out


def test_a_slow_link_keeps_the_model_on_one_device(tiny, tmp_path):
    found = plan(tmp_path, f"{tiny} --rate 1kbit --devices 2 --groups 1")
    assert found["choice"] == {"strategy": "single", "N": 1, "groups": None}
    assert found["seconds"] == found["single_seconds"]
    assert found["reason"].startswith("stay on one device: ")
    rate = found["reason"].split()[-2]
    assert plan(tmp_path, f"{tiny} --rate {rate} --devices 2 --groups 1")["choice"]["strategy"] != "single"


def test_unequal_devices(tiny, tmp_path):
    """The second of two is the faster one: one device is that; a device too slow is left at home."""
    equal = plan(tmp_path, f"{tiny} --rate 1mbit --devices 1")
    faster = plan(tmp_path, f"{tiny} --rate 1mbit --devices 2 --groups 1 --speeds 1,2")
    assert faster["single_seconds"] == pytest.approx(equal["single_seconds"] / 2)
    three = plan(tmp_path, f"{tiny} --rate 1mbit --devices 3 --groups 1 --speeds 0.2,1,1")
    assert three["choice"]["N"] == 2 and "on the 2 fastest devices" in three["reason"]


def test_a_budget_leaves_what_is_good_enough(tiny, tmp_path, capsys):
    rows = [
        {"N": 1, "G": None, "accuracy %": 92.5},
        coded(2, 1, 80.0),
        coded(2, 4, 92.0),
    ]
    path = evaluated(tmp_path / "eval.json", rows)
    link = "--rate 10kbit --devices 3 --accuracy"
    free = plan(tmp_path, f"{tiny} {link} {path}")
    assert {row["G"] for row in free["candidates"]} == {None, 1, 4}
    assert {row["accuracy %"] for row in free["candidates"]} == {92.5, 80.0, 92.0, None}  # None on 3 devices
    found = plan(tmp_path, f"{tiny} {link} {path} --accuracy-budget 1 --groups 1,2,4")
    assert {(row["N"], row["G"]) for row in found["candidates"] if row["strategy"] == "astra"} == {(2, 4)}
    assert {row["strategy"] for row in found["candidates"]} == {"single", "astra", "sp", "tp"}
    assert "G=1 on 2 (loses 12.5)" in capsys.readouterr().out


def test_costs_are_of_the_codes_that_reach_it(tiny, tmp_path, capsys):
    """A predictor is computed on every device."""
    link = f"{tiny} --rate 1mbit --devices 2 --groups 1"
    found = []
    for predictor in ("none", "mlp"):
        path = evaluated(tmp_path / f"{predictor}.json", [ORIGINAL, nested(2, 1, 91.0, predictor=predictor)])
        found.append(plan(tmp_path, f"{link} --accuracy {path}"))
    assert "codes as in" in capsys.readouterr().out and found[1]["codes"]["predictor"] == "mlp"
    plain, predicted = (next(row for row in one["candidates"] if row["G"]) for one in found)
    assert predicted["accuracy %"] == 91.0 and predicted["compute ms"] > 1.05 * plain["compute ms"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--rate 20", "the rate '20' is not understood"),
        ("--rate 20mbit --latency 2", "the time '2' is not understood"),
        ("--rate 20mbit --devices 0", "--devices is 0; it must be at least 1"),
        ("--rate 20mbit --groups 1 --devices 17", "16 tokens cannot be split over 17 devices"),
        ("--rate 20mbit --speeds 1,2", "--speeds has 2 numbers for 4 devices"),
        ("--rate 20mbit --speeds 1,1,1,0", "--speeds has 0; a speed is above 0"),
        ("--rate 20mbit --groups 0", "groups is 0; it must be a whole number of at least 1"),
        ("--rate 20mbit --groups 3", "groups is 3, which does not divide"),
        ("--rate 20mbit --accuracy-budget 1", "--accuracy-budget needs to know what is lost: give --accuracy FILE"),
        ("--rate 20mbit --accuracy-budget -1 --accuracy x.json", "--accuracy-budget is -1; it must be at least 0"),
        ("--rate 20mbit --accuracy-budget nan --accuracy x.json", "--accuracy-budget is nan"),
        ("--rate 20mbit --accuracy nowhere/x.json", "nowhere: has no x.json"),
        ("--rate 20mbit --json nowhere/x.json", "the folder nowhere does not exist"),
    ],
)
def test_bad_input_gets_one_line(tiny, options, message, capsys):
    assert main(["plan", *tiny.split(), *options.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("astra: error: ") and message in line
