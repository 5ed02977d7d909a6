"""The planner against times done by hand, and the whole way on a tiny model."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astra_jax.cli.main import main
from astra_jax.codecs.config import AstraConfig, from_dict
from astra_jax.errors import AstraError
from astra_jax.models.vit import ViTConfig
from astra_jax.strategies.base import Message
from eval.cost.cost import Cost, fastest, share_flops
from eval.cost.presets import PRESETS
from eval.cost.workload import ONE, Setting, open_workload
from eval.network.model import Link, parse_rate
from eval.verbs.plan import (
    Option,
    Quality,
    budget_note,
    candidates,
    choose,
    measured_speeds,
    read_quality,
    reason,
    round_up,
)

G1, G16, SP = Setting("astra", 4, groups=1), Setting("astra", 4, groups=16), Setting("sp", 2)


def option(setting, ms, bits=0, rate="20mbit", latency=0.0, partial=False):
    """A way that computes for some milliseconds and sends these bits in ten exchanges."""
    sent = (Message("all-gather", bits // 10, 10),) if setting.N > 1 else ()
    seconds = tuple(1e-3 * ms for _ in range(setting.N))
    return Option(Cost(setting, (1.0,) * setting.N, seconds, sent), Link(parse_rate(rate), latency), partial)


SINGLE = option(ONE, 100)


def test_several_devices_where_they_are_faster():
    best, other = option(G1, 40, 200_000), option(G16, 40, 3_200_000)
    assert choose(SINGLE, [other, best]) is best
    assert reason(SINGLE, [other, best]) == (
        "use astra with G=1 on 4 devices: 50 ms instead of 100 ms on one (2 times faster), of which 10 ms are on the "
        "link; accuracy is not considered: check it with astra eval"
    )


def test_an_exact_strategy_says_nothing_of_accuracy():
    assert reason(SINGLE, [option(SP, 40, 800_000)]).endswith("of which 40 ms are on the link")


def test_known_accuracy_is_named():
    quality = Quality("accuracy %", 92.53, {(4, 1): 88.95})
    assert reason(SINGLE, [option(G1, 40)], quality).endswith(", at accuracy % 88.95 instead of 92.53")
    assert "astra eval" in reason(SINGLE, [option(G16, 40)], quality)


def test_one_device_where_several_are_slower():
    best, other = option(G1, 40, 1_000_000, "10mbit"), option(G16, 40, 32_000_000, "10mbit")
    assert choose(SINGLE, [best, other]) is SINGLE
    # A million bits have the 55 ms between 40 and 95 ms: 18.18 Mbps.
    assert reason(SINGLE, [best, other]) == (
        "stay on one device: it takes 100 ms, and the best of several, astra with G=1 on 4 devices, takes 140 ms, of "
        "which 100 ms are on the link; it pays from 18.2mbit on"
    )


def test_what_pays_first_need_not_be_the_best():
    """At 1 Mbps sp takes 90 + 600 ms and astra 40 + 1,000; but of sp's 5 ms nothing comes below 120 Mbps."""
    sp, astra = option(SP, 90, 600_000, "1mbit"), option(G1, 40, 1_000_000, "1mbit")
    found = reason(SINGLE, [sp, astra])
    assert "the best of several, sp on 2 devices, takes 690 ms, of which 600 ms are" in found
    assert found.endswith("; astra with G=1 on 4 devices pays from 18.2mbit on")


def test_a_small_gain_is_not_worth_it():
    """95 ms instead of 100 are; 96 are not."""
    worth, little = option(G1, 45, 1_000_000), option(G1, 46, 1_000_000)
    assert choose(SINGLE, [worth]) is worth and choose(SINGLE, [little]) is SINGLE
    assert "on 4 devices, saves less than 5%: 96 ms, of which 50 ms" in reason(SINGLE, [little])
    assert choose(SINGLE, [option(G1, 100)]) is SINGLE


def test_no_rate_pays():
    assert reason(SINGLE, [option(G1, 40, 1_000, latency=6e-3), option(SP, 96, 1_000, latency=6e-3)]) == (
        "stay on one device: it takes 100 ms, and no rate makes several devices faster, because the least that they "
        "take, by astra with G=1 on 4 devices, is 40 ms of computing and 60 ms for the latency of 10 exchanges"
    )
    assert reason(SINGLE, [option(SP, 120)]).endswith("by sp on 2 devices, is 120 ms of computing")


def test_one_device_alone():
    assert choose(SINGLE, []) is SINGLE
    assert "there is no other" in reason(SINGLE, [])


def test_the_fewest_of_equals():
    two, four = option(SP, 40), option(Setting("sp", 4), 40)
    assert choose(SINGLE, [two, four]) is two


def test_the_fastest_devices():
    assert fastest((0.5, 1.0, 2.0, 1.0), 1) == (2.0,)
    assert fastest((0.5, 1.0, 2.0, 1.0), 3) == (1.0, 2.0, 1.0)
    assert str(option(SP, 1, partial=True)) == "sp on the 2 fastest devices"


@given(st.floats(1, 94), st.integers(10, 10**9))
def test_from_the_rate_that_it_names_the_planner_says_go(ms, bits):
    bits -= bits % 10
    rate = round_up(option(G1, ms, bits).pays_from(0.1))
    assert choose(SINGLE, [option(G1, ms, bits, rate)]) is not SINGLE
    assert choose(SINGLE, [option(G1, ms, bits, f"{0.98e-3 * parse_rate(rate):.9f}kbit")]) is SINGLE


def test_rates_are_rounded_up():
    assert [round_up(rate) for rate in (34.56e6, 35e6, 101_234.0, 2.001e9)] == [
        "34.6mbit",
        "35mbit",
        "102kbit",
        "2.01gbit",
    ]


def evaluated(path, rows, **more):
    path.write_text(json.dumps({"verb": "eval", "rows": rows, **more}))
    return path


def coded(N, G, value, **astra):
    """A row of ASTRA, with the configuration of its codes."""
    codes = dataclasses.asdict(AstraConfig(**{"groups": G, **astra}))
    return {"N": N, "G": G, "astra": codes, "accuracy %": value}


def nested(N, G, value, **astra):
    """A row of the first G groups of nested codes, with a predictor."""
    full = AstraConfig(groups=4, widths=(4, 4, 2, 2), levels=(1, 1, 2), codec="nested-pq", predictor="mlp")
    return coded(N, G, value, **{**dataclasses.asdict(full.with_groups(G)), **astra})


ROWS = [
    {"N": 1, "G": None, "astra": None, "accuracy %": 92.5},
    coded(4, 1, 89.0),
    coded(4, 16, 91.5),
    coded(4, 16, 91.0),
    coded(4, 32, math.nan),
    {"N": 4, "G": None, "astra": None, "accuracy %": 92.5},  # sp
]
NESTED = [ROWS[0], nested(4, 1, 91.0), nested(4, 4, 92.4)]


def test_what_eval_wrote(tmp_path):
    quality = read_quality(evaluated(tmp_path / "eval.json", ROWS), None)
    assert quality == Quality("accuracy %", 92.5, {(4, 1): 89.0, (4, 16): 91.5}, AstraConfig(32))
    assert quality.within(1.0) == {(4, 16)} and quality.within(0.9) == set()
    assert quality.of(SP) == 92.5 and quality.of(G1) == 89.0 and quality.of(Setting("astra", 2, groups=1)) is None
    assert budget_note(quality, 1.0, 4) == (
        "of astra, measured for these numbers of devices only, G=16 on 4 devices is within 1 points of accuracy % "
        "92.5, and not G=1 on 4 (loses 3.5)"
    )
    assert "only, nothing is within 0 points" in budget_note(quality, 0.0, 4)


def test_what_is_reached_is_that_of_the_codes_that_are_planned(tmp_path):
    both = evaluated(tmp_path / "both.json", [*ROWS, *NESTED[1:]])
    found = read_quality(both, AstraConfig())
    assert found.reached == {(4, 1): 89.0, (4, 16): 91.5} and found.others == 2
    codes = from_dict(AstraConfig, NESTED[2]["astra"], "")
    found = read_quality(both, codes.with_groups(2))
    assert found.reached == {(4, 1): 91.0, (4, 4): 92.4} and found.others == 4 and found.codes == codes
    assert read_quality(evaluated(tmp_path / "nested.json", NESTED), None).codes == codes


@pytest.mark.parametrize(
    "rows, planned, message",
    [
        (
            [*ROWS, *NESTED[1:]],
            None,
            "is of codes made as vq, K=1024, site hidden; nested-pq.mlp.* one kind can be",
        ),
        (NESTED, AstraConfig(), "is of codes made as nested-pq.mlp, .* and codes are planned as vq, K=1024, site hid"),
        (ROWS, AstraConfig(site="kv"), "made as vq, K=1024, site hidden, and codes are planned as vq, K=1024, site kv"),
        (ROWS, AstraConfig(class_token="single"), "planned as vq, K=1024, site hidden, a single class token: plan for"),
        ([ROWS[0], {"N": 4, "G": 1, "accuracy %": 3}], None, "does not say how its codes are made: run astra eval"),
        ([ROWS[0], coded(4, 1, 3.0) | {"astra": {"colour": 1}}], None, "unknown ..colour"),
    ],
)
def test_what_other_codes_reach_is_not_taken_for_these(tmp_path, rows, planned, message):
    with pytest.raises(AstraError, match=message):
        read_quality(evaluated(tmp_path / "eval.json", rows), planned)


def test_losses_of_other_metrics():
    assert Quality("perplexity", 14.8, {}).loss(16.84) == pytest.approx(100 * (16.84 / 14.8 - 1))
    assert Quality("perplexity", 14.8, {}).loss(14.0) < 0
    assert Quality("Spearman", 0.85, {}).loss(0.84) == pytest.approx(1)
    best = Quality("perplexity", 10.0, {(4, 1): 11.0, (4, 16): 10.1})
    assert best.within(5.0) == {(4, 16)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ('{"verb": "bench", "rows": []}', "is not what `astra eval --json` wrote"),
        ('{"verb": "eval"}', "is not what `astra eval --json` wrote"),
        ('{"verb": "eval", "rows": [1]}', "is not what `astra eval --json` wrote"),
        ('{"verb": "eval", "rows": []}', "no row says what the original reaches"),
        (
            '{"verb": "eval", "rows": [{"N": 1, "G": null}]}',
            "row 1 has no column 'perplexity or accuracy % or Spearman'",
        ),
        ('{"verb": "eval", "rows": [{"N": 1, "accuracy %": 3}]}', "row 1 has no column 'G'"),
        ('{"verb": "eval", "rows": [{"N": 4, "G": 1, "accuracy %": 3}]}', "no row says what the original reaches"),
        ('{"verb": "eval", "rows": [{"N": 1, "G": null, "perplexity": NaN}]}', "no row says what the original reaches"),
        ('{"verb": "eval", "rows": [{"N": 1, "G": null, "perplexity": 0}]}', "perplexity is 0; it is from 1 to"),
        (
            '{"verb": "eval", "rows": [{"N": 1, "G": null, "accuracy %": 101}]}',
            "accuracy % is 101; it is from 0 to 100",
        ),
        ('{"verb": "eval", "rows": [{"N": 1, "G": null, "Spearman": -2.0}]}', "row 1: Spearman is -2.0; it is from -1"),
        ('{"verb": "eval", "rows": [{"N": 0, "G": null, "Spearman": 0.5}]}', "row 1: N is 0; it is from 1"),
        ('{"verb": "eval", "rows": [{"N": 4, "G": 0, "Spearman": 0.5}]}', "row 1: G is 0; it is from 1"),
        ('{"verb": "eval", "rows": [{"N": "1", "G": null, "perplexity": 9}]}', "row 1: N is '1'; it must be a number"),
        ('{"verb": "eval", "rows": [{"N": 1, "G": null, "perplexity": true}]}', "row 1: perplexity is True; it must"),
    ],
)
def test_what_eval_did_not_write_is_one_line(tmp_path, content, message):
    path = tmp_path / "eval.json"
    path.write_text(content)
    with pytest.raises(AstraError, match=message) as error:
        read_quality(path, None)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


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


def test_without_a_profile_every_strategy_is_measured_once(tiny, monkeypatch):
    """With the most devices that it has here; the speed holds for fewer, too."""
    seen = []

    def measured(model, N, inputs, make, repeats, fast_path):
        assert fast_path
        seen.append((make(model, N, inputs).__class__.__name__, N))
        return 2.0

    monkeypatch.setattr("eval.verbs.plan.compute_seconds", measured)
    work = open_workload("tiny", 16, None, "float32")
    ways = [ONE, *candidates(work, (1.0, 1.0, 1.0), (4,))]
    speeds = measured_speeds(work, ways)
    assert sorted(seen) == [("Astra", 3), ("SequenceParallel", 3), ("Single", 1), ("TensorParallel", 2)]
    assert speeds["astra", 4] == share_flops(work, Setting("astra", 3, groups=4)) / 2
    assert set(speeds) == {("single", None), ("astra", 4), ("sp", None), ("tp", None)}


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
        path = evaluated(tmp_path / f"{predictor}.json", [ROWS[0], nested(2, 1, 91.0, predictor=predictor)])
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
