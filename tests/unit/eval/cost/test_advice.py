"""Advice against times done by hand."""

from hypothesis import given
from hypothesis import strategies as st

from astra_jax.models.vit import ViTConfig
from astra_jax.strategies.base import Message
from eval.cost.advice import Option, candidates, choose, reached_here, reason, round_up
from eval.cost.cost import Cost, share_flops
from eval.cost.presets import PRESETS
from eval.cost.workload import ONE, Setting, open_workload
from eval.network.devices import Devices
from eval.network.model import Link, parse_rate
from eval.quality.reached import Quality

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
    devices = Devices((0.5, 1.0, 2.0, 1.0))
    assert devices.fastest(1) == Devices((2.0,))
    assert devices.fastest(3) == Devices((1.0, 2.0, 1.0))
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


def test_without_a_profile_every_strategy_is_measured_once(monkeypatch):
    """With the most devices that it has here, of two heads; the speed holds for fewer, too."""
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, patch_size=4, num_labels=4
    )
    monkeypatch.setitem(PRESETS, "tiny", ("vit", config))
    seen = []

    def measured(model, N, inputs, make, repeats):
        seen.append((make(model, N, inputs).__class__.__name__, N))
        return 2.0

    monkeypatch.setattr("eval.cost.cost.compute_seconds", measured)
    work = open_workload("tiny", 16, None, "float32")
    ways = [ONE, *candidates(work, Devices((1.0, 1.0, 1.0)), (4,))]
    speeds = reached_here(work, ways)
    assert sorted(seen) == [("Astra", 3), ("SequenceParallel", 3), ("Single", 1), ("TensorParallel", 2)]
    assert speeds["astra", 4] == share_flops(work, Setting("astra", 3, groups=4)) / 2
    assert set(speeds) == {("single", None), ("astra", 4), ("sp", None), ("tp", None)}
