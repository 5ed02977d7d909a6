"""The benchmark of strategies: the whole way on a tiny model, and its arithmetic against numbers done by hand."""

import csv
import dataclasses
import json

import pytest

import checkpoints
from astra_jax.cli.main import main
from astra_jax.codecs.config import VQConfig
from astra_jax.errors import AstraError
from astra_jax.models.vit import ViTConfig
from astra_jax.strategies.base import Message
from astra_jax.strategies.coded import Astra
from eval.cost.cost import Cost, cost, device_flops, predicted_messages, share_flops
from eval.cost.presets import PRESETS
from eval.cost.workload import ONE, Setting, Workload, open_workload
from eval.network.devices import Devices
from eval.network.traces import Trace
from eval.verbs.bench import cells, pivot, replayed, summary

VIT = ViTConfig(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, patch_size=4, num_labels=4
)


@pytest.fixture
def tiny(monkeypatch, tiny_gpt2):
    """Known architectures `tiny`, a ViT, and `tiny-text`, a GPT-2 of up to 64 tokens."""
    monkeypatch.setitem(PRESETS, "tiny", ("vit", VIT))
    monkeypatch.setitem(PRESETS, "tiny-text", ("gpt2", tiny_gpt2().config))


@pytest.fixture
def profile(tmp_path):
    """The file of a device of a million operations per second."""
    path = tmp_path / "slow.json"
    path.write_text('{"name": "slow", "flops_per_second": 1e6}')
    return path


def bench(folder, arguments):
    path = folder / "bench.json"
    assert main(["bench", *arguments.split(), "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_the_whole_way(tmp_path, tiny, capsys):
    """Measured here: one device, and two that send codes or vectors."""
    (tmp_path / "trace.csv").write_text("seconds,bits_per_second\n0,10000000\n0.02,1000000\n")
    found = bench(
        tmp_path,
        "tiny --tokens 16 --devices 2 --strategies single,astra,sp --groups 4 --rates 1mbit,10mbit --repeats 1 "
        f"--weights int8 --latency 2ms --trace {tmp_path}/trace.csv --save-profile {tmp_path}/here.json "
        f"--csv {tmp_path}/bench.csv --plot {tmp_path}/bench.png",
    )
    single, astra, sp = found["costs"]
    assert [row["strategy"] for row in found["costs"]] == ["single", "astra G=4", "sp"]
    assert single["messages"] == single["kbit in total"] == 0
    # 8 tokens of 4 codes of 10 bits, in 2 blocks; 9 with the class token, of 16 floats; and the class state.
    assert astra["messages"] == sp["messages"] == 3
    assert astra["kbit per block"] == 0.32 and astra["kbit in total"] == pytest.approx(2 * 0.32 + 0.512)
    assert sp["kbit per block"] == pytest.approx(9 * 0.512) and sp["kbit in total"] == pytest.approx(19 * 0.512)

    assert len(found["cells"]) == 6
    for cell in found["cells"]:
        waits = 6 if cell["N"] == 2 else 0
        rate = {"1mbit": 1, "10mbit": 10}[cell["rate"]]
        assert cell["link ms"] == pytest.approx(waits + cell["kbit in total"] / rate)
        assert cell["total ms"] == pytest.approx(cell["compute ms"] + cell["link ms"])
        assert cell["speed-up"] == pytest.approx(single["compute ms"] / cell["total ms"])
        assert cell["link %"] == pytest.approx(100 * cell["link ms"] / cell["total ms"])
    assert [row["1mbit"] for row in found["total_ms"]] == [cell["total ms"] for cell in found["cells"][::2]]
    assert [row["10mbit"] for row in found["link_percent"]] == [cell["link %"] for cell in found["cells"][1::2]]
    with open(tmp_path / "bench.csv") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{name: str(value) for name, value in cell.items()} for cell in found["cells"]]
    assert (tmp_path / "bench.png").stat().st_size > 10_000

    alone, coded, _ = found["trace"]
    assert alone["mean ms"] == pytest.approx(single["compute ms"]) == pytest.approx(alone["worst ms"])
    assert coded["worst ms"] >= coded["median ms"] >= astra["compute ms"] + 6

    speed = json.loads((tmp_path / "here.json").read_text())
    assert speed == {
        "name": "here",
        "flops_per_second": pytest.approx(1e12 * single["GFLOP"] / single["compute ms"], rel=1e-9),
    }
    assert "predicted and compiled the same" in capsys.readouterr().out


def test_a_checkpoint_with_a_profile(tmp_path, profile, tiny_bert):
    """A BERT with codebooks of its own and a class token: nothing is measured, and G is another."""
    astra = VQConfig(4, 16)
    model = tiny_bert(astra, pooling="class")
    checkpoints.save(
        tmp_path / "bert", checkpoints.Checkpoint("bert", model.config, astra, None, None, {}, "float32", (), model)
    )
    found = bench(
        tmp_path,
        f"{tmp_path}/bert --tokens 16 --devices 2 --strategies astra --groups 2 --rates 1mbit "
        f"--device-profile {profile}",
    )
    (row,) = found["costs"]
    assert row["kbit in total"] == pytest.approx((2 * 8 * 2 * 4 + 16 * 32) / 1e3)
    assert row["compute ms"] == pytest.approx(1e6 * row["GFLOP"])


def test_codecs_beside_each_other(tmp_path, tiny, profile):
    """With random codebooks: a predictor computes more, and nothing sends more than its codes and the class state."""
    found = bench(
        tmp_path,
        "tiny --tokens 16 --devices 2 --strategies astra --codecs vq,nested-pq+linear --groups 1,2 --rates 1mbit "
        f"--device-profile {profile}",
    )["costs"]
    assert [(row["strategy"], row["kbit in total"]) for row in found] == [
        ("astra vq G=1", pytest.approx(2 * 0.08 + 0.512)),
        ("astra vq G=2", pytest.approx(2 * 0.16 + 0.512)),
        ("astra nested-pq+linear G=1", pytest.approx(2 * 0.08 + 0.512)),
        ("astra nested-pq+linear G=2", pytest.approx(2 * 0.16 + 0.512)),
    ]
    assert found[2]["GFLOP"] > found[0]["GFLOP"] and found[3]["GFLOP"] > found[1]["GFLOP"]


@pytest.fixture
def four_codewords(tmp_path, tiny_vit):
    """A checkpoint that is worth folding: a ViT of width 32, 25 tokens and four codewords."""
    astra = VQConfig(1, 4)
    model = tiny_vit(astra, hidden_size=32)
    checkpoints.save(
        tmp_path / "vit", checkpoints.Checkpoint("vit", model.config, astra, None, {}, {}, "float32", (), model)
    )
    return str(tmp_path / "vit")


@pytest.mark.slow
def test_with_and_without_tables(tmp_path, four_codewords):
    """Measured here. Of 2 devices with 13 slots, tables save 4 R D^2 per block for 13 remote tokens; and 14 queries,
    with the class token, meet 4 codewords instead of 13 tokens, for 4 D each."""
    options = "--devices 2 --strategies single,astra,astra-plain --groups 1 --rates 10mbit --repeats 1"
    found = bench(tmp_path, f"{four_codewords} {options}")
    single, fast, plain = found["costs"]
    assert [row["strategy"] for row in found["costs"]] == ["single", "astra G=1", "astra-plain G=1"]
    saved = 2 * (4 * 13 * 32**2 + 14 * (13 - 4) * 4 * 32)
    assert 1e9 * plain["GFLOP"] - 1e9 * fast["GFLOP"] == pytest.approx(saved, abs=0.5)
    assert fast["kbit in total"] == plain["kbit in total"] > single["kbit in total"] == 0
    assert [row["strategy"] for row in found["total_ms"]] == ["single", "astra G=1", "astra-plain G=1"]
    for name, kept in (("astra", fast), ("astra-plain", plain)):
        (row,) = bench(tmp_path, f"{four_codewords} --devices 2 --strategies {name} --groups 1 --repeats 1")["costs"]
        assert (row["strategy"], row["GFLOP"]) == (kept["strategy"], kept["GFLOP"])


def test_unequal_devices_that_count_codewords_do_what_even_splits_do(tiny):
    """2 of 64 tokens are what one device of 32 has, which is none of the splits that tell it. The other device saves
    4 R D^2 per block for 2 remote tokens, and has 63 queries meet 4 codewords instead."""
    work = opened("tiny", 64)
    work = dataclasses.replace(work, astra=VQConfig(1, 4), config=dataclasses.replace(work.config, hidden_size=32))
    way = Setting("astra", 2, groups=1)
    slow, fast = device_flops(work, way, Devices((1.0, 31.0)))
    assert slow == pytest.approx(share_flops(work, way, 32), rel=1e-9)
    plain = dataclasses.replace(way, strategy="astra-plain")
    saved = 2 * (4 * 2 * 32**2 + 63 * (2 - 4) * 4 * 32)
    assert device_flops(work, plain, Devices((1.0, 31.0)))[1] - fast == pytest.approx(saved, rel=1e-6)
    with pytest.raises(AstraError, match="64 tokens are too few for 17 unequal devices: use at least 68"):
        device_flops(work, dataclasses.replace(way, N=17), Devices((1.0,) * 16 + (2.0,)))


def test_a_strategy_that_lies_is_found_out(tmp_path, tiny, profile, monkeypatch, capsys):
    """Before anything is said of its speed."""
    true = Astra.messages
    monkeypatch.setattr(Astra, "messages", lambda self, model: [m._replace(bits=m.bits - 8) for m in true(self, model)])
    arguments = f"tiny --tokens 16 --devices 2 --strategies astra --groups 4 --rates 1mbit --device-profile {profile}"
    assert main(["bench", *arguments.split()]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("astra: error: the program sends {'all-gather': 640, 'all-reduce': 512} bits, not ")
    assert "'all-gather': 624" in line


def opened(name, tokens=16) -> Workload:
    return open_workload(name, tokens, None, "float32")


def test_equal_devices_do_the_same(tiny):
    work = opened("tiny")
    for setting in (ONE, Setting("astra", 4, groups=4), Setting("tp", 2), Setting("bp-ag", 4, exchanges=1)):
        found = device_flops(work, setting, Devices((1.0,) * setting.N))
        assert found == (float(share_flops(work, setting)),) * setting.N


@pytest.mark.parametrize(
    ("name", "setting"),
    [("tiny", Setting("astra", 2, groups=4)), ("tiny-text", Setting("sp", 2))],
)
def test_unequal_devices_do_what_even_splits_do(tiny, name, setting):
    """2 of 16 tokens are what one device of eight has, and 14 are as much more than 8 as 8 are more than 2."""
    work = opened(name)
    slow, fast = device_flops(work, setting, Devices((1.0, 7.0)))
    assert slow == share_flops(work, setting, 8)
    even = share_flops(work, setting)
    assert fast == pytest.approx(2 * even - slow)


def test_unequal_devices_take_what_their_speed_says(tiny):
    """The pace is that of 1e6 operations per second times the speed; messages are as long as the longest shard's."""
    work, setting = opened("tiny"), Setting("astra", 2, groups=4)
    found = cost(work, setting, Devices((0.5, 1.5)), 1e6)
    assert found.flops == device_flops(work, setting, Devices((1.0, 3.0)))
    assert found.compute == pytest.approx([found.flops[0] / 0.5e6, found.flops[1] / 1.5e6])
    assert found.messages[0] == Message("all-gather", 12 * 4 * 10, 2)
    assert found.bits == 2 * 12 * 4 * 10 + 16 * 32
    heads = Setting("tp", 2)  # splits no tokens: the slower device sets the pace
    assert cost(work, heads, Devices((0.5, 1.0)), 1e6).compute == pytest.approx(
        [share_flops(work, heads) / 0.5e6, share_flops(work, heads) / 1e6]
    )


def test_in_proportion_to_speed_is_faster_than_evenly(tiny):
    """Yet not as fast as it could be: the slow devices project the remote tokens as the fast ones do."""
    work, setting = opened("tiny", 64), Setting("astra", 4, groups=4)
    found = cost(work, setting, Devices((1.0, 1.0, 0.5, 0.5)), 1e6).compute
    evenly = share_flops(work, setting) / 0.5e6
    assert found[0] < found[2] < evenly and found[0] == found[1] and found[2] == found[3]


def test_the_class_token_of_an_uneven_split(tiny):
    """Voltage sends 12 tokens and the class token, padded to the longest shard, as the strategy itself would."""
    work = opened("tiny")
    gathered, _ = predicted_messages(work, Setting("sp", 2), Devices((1.0, 3.0)))
    assert gathered.bits == 13 * 16 * 32


def test_speeds():
    assert Devices((1.0, 0.5)).of(2) == Devices((1.0, 0.5))
    assert Devices().of(3) == Devices((1.0, 1.0, 1.0))


# 4 devices compute 10 ms, the last 20 ms; they send 3 x 100 kbit in blocks and 20 kbit once.
FOUR = Cost(
    Setting("astra", 4, groups=1),
    (1e9, 1e9, 1e9, 2e9),
    (0.010, 0.010, 0.010, 0.020),
    (Message("all-gather", 100_000, 3), Message("all-reduce", 20_000, 1, in_blocks=False)),
)
SINGLE = Cost(ONE, (6e9,), (0.060,), ())


def test_a_row_of_costs_by_hand():
    assert summary(FOUR, 3) == {
        "strategy": "astra G=1",
        "N": 4,
        "GFLOP": 2.0,
        "compute ms": 20.0,
        "messages": 4,
        "kbit per block": 100.0,
        "kbit in total": 320.0,
    }


def test_cells_by_hand():
    once = cells([FOUR, SINGLE], SINGLE, ["10mbit", "100mbit"], 1e-3, "once")
    assert [(c["strategy"], c["rate"]) for c in once] == [
        ("astra G=1", "10mbit"),
        ("astra G=1", "100mbit"),
        ("single", "10mbit"),
        ("single", "100mbit"),
    ]
    assert [c["link ms"] for c in once] == pytest.approx([32 + 4, 3.2 + 4, 0, 0])
    assert [c["total ms"] for c in once] == pytest.approx([56, 27.2, 60, 60])
    assert [c["speed-up"] for c in once] == pytest.approx([60 / 56, 60 / 27.2, 1, 1])
    assert once[0]["link %"] == pytest.approx(100 * 36 / 56)
    (each,) = cells([FOUR], SINGLE, ["10mbit"], 0.0, "each")
    assert each["link ms"] == pytest.approx(3 * 30 + 1.5 * 2)
    assert pivot(once, "total ms") == [
        {"strategy": "astra G=1", "10mbit": pytest.approx(56), "100mbit": pytest.approx(27.2)},
        {"strategy": "single", "10mbit": pytest.approx(60), "100mbit": pytest.approx(60)},
    ]


def test_replay_by_hand():
    """60 ms of compute and 32 ms at 10 Mbps; the second half of the trace is a tenth of the rate."""
    trace = Trace((0.0, 0.052, 0.104), (10e6, 10e6, 1e6))
    alone, four = replayed([SINGLE, FOUR], 3, trace, 0.0, "once")
    assert alone == {
        "strategy": "single",
        "requests": 3,
        **dict.fromkeys(("mean ms", "median ms", "95 % ms", "worst ms"), pytest.approx(60)),
    }
    # Two take 20 + 32 ms. The third, after a block's 6.67 ms, has 45.33 ms at 1 Mbps; then begins the next turn, where
    # the rest of its 320 kbit takes 27.47 ms, and two more blocks 13.33 ms.
    assert four["requests"] == 3 and four["median ms"] == pytest.approx(52)
    assert four["worst ms"] == pytest.approx(52 + 27.467 + 13.333, abs=1e-3)


BAD = {
    "no such model": ("tini", "tini: is no checkpoint and no preset: presets are vit-base"),
    "a rate without a unit": ("tiny --rates 10mbit,20", "the rate '20' is not understood"),
    "a time without a unit": ("tiny --latency 2", "the time '2' is not understood"),
    "no devices": ("tiny --devices 0", "--devices is 0; it must be at least 1"),
    "no repeats": ("tiny --repeats 0", "--repeats is 0; it must be at least 1"),
    "more shards than tokens": (
        "tiny --tokens 4 --devices 5",
        "4 tokens cannot be split over 5 devices: use at most 4",
    ),
    "more shards than tokens of a text": ("tiny-text --tokens 3", "3 tokens cannot be split over 4 devices"),
    "tokens that are no square": ("tiny --tokens 15", "try 9 or 16"),
    "too long a text": ("tiny-text --tokens 65", "--tokens is 65; tiny-text takes at most 64"),
    "heads that do not divide": ("tiny --tokens 16 --strategies tp", "2 heads"),
    "groups that do not divide": ("tiny --tokens 16 --groups 3", "groups is 3, which does not divide"),
    "no groups": ("tiny --groups 0", "groups is 0; it must be a whole number of at least 1"),
    "exchanges that do not divide": ("tiny --tokens 16 --groups 1 --devices 2 --exchanges 3", "use one of 1, 2"),
    "an unknown codec": ("tiny --groups 1 --codecs vq,pq", "there is no codec 'pq': try vq, nested-pq, vq+linear"),
    "an unknown strategy": ("tiny --strategies single,voltage", "there is no strategy 'voltage'; known are"),
    "an empty item": (
        "tiny --strategies single,,sp",
        "'single,,sp' is no list here",
    ),
    "no strategy": ("tiny --strategies=", "is no list here"),
    "no rate": ("tiny --rates=", "is no list here"),
    "too few speeds": ("tiny --speeds 1,2", "--speeds has 2 numbers for 4 devices"),
    "speeds that are no numbers": (
        "tiny --speeds 1,1,1,fast",
        "is no list here: write something like 1,1,0.5",
    ),
    "a device that stands still": ("tiny --speeds 1,1,1,0", "--speeds has 0; a speed is above 0"),
    "a device too slow for a token": (
        "tiny --tokens 16 --strategies sp --speeds 0.001,1,1,1",
        "device 0, with speed 0.001, would get none",
    ),
    "too few tokens for unequal devices": (
        "tiny-text --tokens 7 --strategies sp --speeds 1,1,1,2",
        "7 tokens are too few for 4 unequal devices: use at least 8",
    ),
    "a trace of negative time": ("tiny --trace {place}/back.csv", "back.csv: row 2: seconds is -1.0"),
    "no such trace": ("tiny --trace wlan", "wlan: is missing: give a CSV file, or"),
    "weights that a profile does not know": ("tiny --weights int8", "leave one of them out"),
    "to measure and not to": ("tiny --save-profile {place}/new.json", "give one of them"),
    "a csv into no folder": ("tiny --csv {place}/no/where.csv", "--csv {place}/no/where.csv: the folder"),
    "a json into no folder": ("tiny --json {place}/no/where.json", "--json {place}/no/where.json: the folder"),
    "a plot into no folder": ("tiny --plot {place}/no/where.png", "--plot {place}/no/where.png: the folder"),
    "a plot of an unknown kind": ("tiny --plot {place}/plot.xyz", "write a .png or a .svg file"),
    "no such profile": ("tiny --device-profile {place}/none.json", "has no none.json"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line(case, tiny, tmp_path, profile, capsys):
    """Before any work: nothing is measured, drawn or compiled."""
    (tmp_path / "back.csv").write_text("seconds,bits_per_second\n0,1000000\n-1,2000000\n")
    call, expected = (text.format(place=tmp_path) for text in BAD[case])
    given = [] if "--device-profile" in call else ["--device-profile", str(profile)]
    assert main(["bench", *call.split(), *given]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("astra: error: ") and expected in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.csv", "slow.json"]
