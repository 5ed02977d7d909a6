"""The network model against sums done by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astra_jax.errors import AstraError
from astra_jax.strategies.base import Message
from eval.network.model import (
    Link,
    break_even_rate,
    exchange_seconds,
    link_bits,
    parse_rate,
    parse_seconds,
    pass_seconds,
    volume,
)

# ViT-Base, 1024 tokens on 4 devices, G=1: 256 tokens x 10 bits in each of 12 blocks, and the class state at the end.
ASTRA = [Message("all-gather", 2_560, 12), Message("all-reduce", 768 * 32, 1, in_blocks=False)]

messages = st.lists(
    st.builds(
        Message,
        st.sampled_from(["all-gather", "all-reduce", "all-to-all"]),
        st.integers(0, 10**9),
        st.integers(1, 48),
        st.booleans(),
    ),
    max_size=4,
)
countings = st.sampled_from(["once", "each"])
devices = st.integers(1, 16)


def test_rates():
    assert parse_rate("10mbit") == 10e6
    assert parse_rate("1.5 Gbit") == 1.5e9
    assert parse_rate("64kbit") == 64e3


@pytest.mark.parametrize(
    "text", ["10", "mbit", "-1mbit", "0mbit", "10mb", "10mbit/s", "", "nanmbit", "9" * 400 + "mbit"]
)
def test_a_rate_without_a_unit_is_refused(text):
    with pytest.raises(AstraError, match="such as 10mbit"):
        parse_rate(text)


def test_times():
    assert parse_seconds("2ms") == 2e-3
    assert parse_seconds("0.5 s") == 0.5
    assert parse_seconds("300us") == pytest.approx(3e-4)
    assert parse_seconds("0s") == 0


@pytest.mark.parametrize("text", ["2", "ms", "-1ms", "2min", ""])
def test_a_time_without_a_unit_is_refused(text):
    with pytest.raises(AstraError, match="such as 2ms"):
        parse_seconds(text)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate": 0.0}, "rate is 0.0 bits per second; it must be above 0"),
        ({"rate": math.inf}, "rate is inf"),
        ({"rate": math.nan}, "rate is nan"),
        ({"rate": 1e6, "latency": -1e-3}, "latency is -0.001 seconds; it must be at least 0"),
        ({"rate": 1e6, "latency": math.inf}, "latency is inf"),
        ({"rate": 1e6, "counting": "twice"}, "counting is 'twice'; it must be one of once, each"),
    ],
)
def test_a_link_that_cannot_be_is_refused(values, message, unchecked):
    with pytest.raises(AstraError, match=message):
        Link(**values)


@pytest.mark.parametrize(
    ("kind", "once", "each"),
    [("all-gather", 1000, 3000), ("all-reduce", 1000, 1500), ("all-to-all", 750, 750)],
)
def test_bits_of_a_message_among_four(kind, once, each):
    assert link_bits(Message(kind, 1000, 7), 4, "once") == once
    assert link_bits(Message(kind, 1000, 7), 4, "each") == each
    assert link_bits(Message(kind, 1000, 7), 1, "once") == link_bits(Message(kind, 1000, 7), 1, "each") == 0


def test_volume_by_hand():
    assert volume(ASTRA, 4, "once") == (12 * 2_560 + 24_576, 13)
    assert volume(ASTRA, 4, "each") == (3 * 12 * 2_560 + 1.5 * 24_576, 13)
    assert volume(ASTRA, 1, "each") == (0, 0)


def test_a_pass_by_hand():
    # 30,720 bits of codes are 3.072 ms at 10 Mbps, and 24,576 bits of the class state 2.4576 ms.
    assert pass_seconds(0.040, ASTRA, 4, Link(10e6)) == pytest.approx(0.040 + 3.072e-3 + 2.4576e-3)
    assert exchange_seconds(ASTRA, 4, Link(10e6, latency=2e-3)) == pytest.approx(5.5296e-3 + 13 * 2e-3)
    assert exchange_seconds(ASTRA, 4, Link(10e6, counting="each")) == pytest.approx(3 * 3.072e-3 + 1.5 * 2.4576e-3)
    assert pass_seconds(0.040, ASTRA, 1, Link(10e6, latency=2e-3)) == 0.040
    assert pass_seconds(0.040, [], 4, Link(10e6, latency=2e-3)) == 0.040


def test_the_papers_ratios():
    """ALGORITHMS 1.2: what is published of ViT-Base on 4 devices, if one device takes 0.116 s, and a device of four
    6.24 of 17.72 GFLOP (of block parallelism a quarter)."""
    single, share = 0.116, 6.24 / 17.72

    def seconds(bits, exchanges, rate, share=share):
        return pass_seconds(share * single, [Message("all-gather", bits, exchanges)], 4, Link(rate))

    astra = seconds(256 * 10, 12, 10e6)
    assert single / astra == pytest.approx(2.64, rel=0.01)
    assert seconds(256 * 768 * 32, 12, 10e6) / astra == pytest.approx(171.82, rel=0.01)
    assert seconds(256 * 768 * 32, 1, 10e6, 1 / 4) / astra == pytest.approx(15.25, rel=0.05)
    assert single / seconds(256 * 10, 12, 20e6) == pytest.approx(2.74, rel=0.01)
    assert single / seconds(256 * 320, 12, 20e6) == pytest.approx(1.29, rel=0.01)


def test_break_even_by_hand():
    # 55,296 bits in the 60 ms that 4 devices save; 13 exchanges of 2 ms take 26 ms of them.
    assert break_even_rate(0.100, 0.040, ASTRA, 4) == pytest.approx(55_296 / 0.060)
    assert break_even_rate(0.100, 0.040, ASTRA, 4, latency=2e-3) == pytest.approx(55_296 / 0.034)
    assert break_even_rate(0.100, [0.020, 0.040], ASTRA, 2) == pytest.approx(55_296 / 0.060)
    assert break_even_rate(0.100, 0.040, ASTRA, 4, latency=5e-3) is None
    assert break_even_rate(0.100, 0.100, ASTRA, 4) is None
    assert break_even_rate(0.100, 0.040, [], 4) == 0


@given(messages, devices, countings, st.floats(1e-4, 10), st.floats(1e-4, 10), st.floats(0, 0.01))
def test_at_the_break_even_rate_a_pass_takes_as_long_as_on_one_device(sent, N, counting, single, compute, wait):
    rate = break_even_rate(single, compute, sent, N, wait, counting)
    if rate is None:
        assert pass_seconds(compute, sent, N, Link(1e300, wait, counting)) >= single * (1 - 1e-9)
    elif rate > 0:
        assert pass_seconds(compute, sent, N, Link(rate, wait, counting)) == pytest.approx(single)
        assert pass_seconds(compute, sent, N, Link(2 * rate, wait, counting)) <= single * (1 + 1e-9)


@given(messages, devices, countings, st.floats(1e3, 1e10), st.floats(0, 0.1))
def test_exchange_never_gets_cheaper_with_bits_wait_or_slowness(sent, N, counting, rate, wait):
    seconds = exchange_seconds(sent, N, Link(rate, wait, counting))
    more = [m._replace(bits=2 * m.bits) for m in sent]
    assert 0 <= seconds <= exchange_seconds(more, N, Link(rate, wait, counting))
    assert seconds <= exchange_seconds(sent, N, Link(rate / 2, wait, counting))
    assert seconds <= exchange_seconds(sent, N, Link(rate, 2 * wait, counting))
    assert exchange_seconds(sent, N, Link(rate, wait, "once")) <= exchange_seconds(sent, N, Link(rate, wait, "each"))


def test_all_wait_for_the_slowest():
    assert pass_seconds([0.010, 0.030, 0.020], [], 3, Link(1e6)) == 0.030
