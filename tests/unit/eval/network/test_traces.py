"""Traces of a link's rate: what a file may say, and transfers against integrals done by hand."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from astra_jax.errors import AstraError
from astra_jax.strategies.base import Message
from eval.network import traces
from eval.network.model import Link, pass_seconds
from eval.network.traces import FOLDER, Trace, read_trace, replay, transfer_end

# 100 bits in the first second, none in the next two, and 200 in the last row, which lasts as long as the one before it.
OUTAGE = Trace((0.0, 1.0, 3.0), (100.0, 0.0, 100.0))


@st.composite
def any_rows(draw):
    """Seconds and rates of a trace, in which at least one row carries bits."""
    widths = draw(st.lists(st.floats(0.01, 10), max_size=5))
    rates = draw(st.lists(st.one_of(st.just(0.0), st.floats(1e3, 1e9)), min_size=len(widths), max_size=len(widths)))
    return (0.0, *itertools.accumulate(widths)), (*rates, draw(st.floats(1e3, 1e9)))


starts = st.floats(0, 1000)
volumes = st.floats(0, 1e10)


def written(tmp_path, text):
    path = tmp_path / "link.csv"
    path.write_text(text, encoding="utf8")
    return str(path)


def test_a_trace_is_read(tmp_path):
    path = written(tmp_path, "\ufeffseconds, bits_per_second\r\n0,1e6\r\n0.5,0\r\n\r\n2,3000000\r\n")
    assert read_trace(path) == Trace((0.0, 0.5, 2.0), (1e6, 0.0, 3e6))
    assert read_trace(path).edges == (0.0, 0.5, 2.0, 3.5)
    assert read_trace(path).sent == (0.0, 0.5e6, 0.5e6, 5e6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the header is ''; it must be 'seconds,bits_per_second'"),
        ("0,1e6\n", "the header is '0,1e6'"),
        ("seconds,bits\n0,1e6\n", "the header is 'seconds,bits'"),
        ("seconds,bits_per_second\n", "there is no row"),
        ("seconds,bits_per_second\n0,fast\n", "row 1: '0,fast' must be two numbers"),
        ("seconds,bits_per_second\n0,1e6\n1\n", "row 2: '1' must be two numbers"),
        ("seconds,bits_per_second\n0,1e6,7\n", "row 1: '0,1e6,7' must be two numbers"),
        ('seconds,bits_per_second\n0,"a\nb"\n', "row 1: .* must be two numbers"),
        ("seconds,bits_per_second\n-1,1e6\n", "row 1: seconds is -1.0; times are numbers that start at 0"),
        ("seconds,bits_per_second\n0,1e6\n-2,1e6\n", "row 2: seconds is -2.0"),
        ("seconds,bits_per_second\n0.5,1e6\n", "row 1: seconds is 0.5"),
        ("seconds,bits_per_second\n0,1e6\nnan,1e6\n", "row 2: seconds is nan"),
        ("seconds,bits_per_second\n0,1e6\ninf,1e6\n", "row 2: seconds is inf"),
        ("seconds,bits_per_second\n0,1e6\n2,1e6\n2,1e6\n", "row 3: seconds is 2.0 after 2.0; times must grow"),
        ("seconds,bits_per_second\n0,-1\n", "row 1: bits_per_second is -1.0; it must be 0"),
        ("seconds,bits_per_second\n0,nan\n", "row 1: bits_per_second is nan"),
        ("seconds,bits_per_second\n0,1e999\n", "row 1: bits_per_second is inf"),
        ("seconds,bits_per_second\n0,0\n1,0\n", "all rows together carry 0.0 bits"),
        ("seconds,bits_per_second\n0,1\n1e300,1e300\n", "all rows together carry inf bits"),
        ("seconds,bits_per_second\n0,1e6\n" + "1" * 200_000, "is not a CSV file"),
    ],
)
def test_what_is_no_trace_is_one_line(tmp_path, text, message):
    with pytest.raises(AstraError, match=message) as error:
        read_trace(written(tmp_path, text))
    assert str(error.value).startswith(str(tmp_path / "link.csv: "))
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read_are_one_line(tmp_path):
    with pytest.raises(AstraError, match=r"wi-fi: is missing: give a CSV file, or step-down or wifi"):
        read_trace("wi-fi")
    with pytest.raises(AstraError, match="cannot be read"):
        read_trace(str(tmp_path))
    (tmp_path / "link.csv").write_bytes(b"seconds,bits_per_second\n\xff\xfe")
    with pytest.raises(AstraError, match="is not a CSV file"):
        read_trace(str(tmp_path / "link.csv"))


@pytest.mark.parametrize(
    ("start", "bits", "end"),
    [
        (0.0, 0.0, 0.0),
        (0.0, 50.0, 0.5),
        (0.0, 100.0, 1.0),  # done just before the outage
        (0.0, 101.0, 3.01),  # and just not
        (0.5, 100.0, 3.5),
        (2.0, 0.0, 2.0),  # nothing takes no time, even in an outage
        (2.0, 1e-20, 2.0),  # less than rounding, but never before the start
        (2.0, 100.0, 4.0),
        (2.0, 200.0, 5.0),
        (3.0, 250.0, 5.5),  # beyond the end: the trace starts again
        (0.0, 300.0, 5.0),
        (0.0, 950.0, 15.5),  # three whole turns
        (7.0, 50.0, 8.5),  # in the outage of the second turn
    ],
)
def test_transfers_by_hand(start, bits, end):
    assert transfer_end(OUTAGE, start, bits) == pytest.approx(end)


def test_a_turn_that_ends_in_an_outage_ends_with_its_last_bit():
    trace = Trace((0.0, 1.0), (100.0, 0.0))
    assert transfer_end(trace, 0.0, 100.0) == 1
    assert transfer_end(trace, 0.0, 200.0) == 3
    assert transfer_end(trace, 1.5, 100.0) == 3


@given(any_rows(), starts, volumes, volumes)
def test_transfers_add_up(rows, start, a, b):
    trace = Trace(*rows)
    together, apart = transfer_end(trace, start, a + b), transfer_end(trace, transfer_end(trace, start, a), b)
    # Where a transfer ends within rounding of an outage, either side of it is right: compare bits, not times.
    assert delivered(trace, together) == pytest.approx(delivered(trace, apart), rel=1e-9, abs=1.0)


def delivered(trace, end):
    turn, within = divmod(end, trace.edges[-1])
    return turn * trace.sent[-1] + float(np.interp(within, trace.edges, trace.sent))


@given(any_rows(), starts, volumes)
def test_what_was_sent_is_what_the_rates_allow(rows, start, bits):
    trace = Trace(*rows)
    end = transfer_end(trace, start, bits)
    assert end >= start
    assert delivered(trace, end) - delivered(trace, start) == pytest.approx(bits, rel=1e-6, abs=10.0)


@given(any_rows(), starts, volumes, volumes)
def test_more_bits_never_arrive_earlier(rows, start, a, b):
    trace = Trace(*rows)
    assert transfer_end(trace, start, min(a, b)) <= transfer_end(trace, start, max(a, b)) + 1e-9


@given(st.floats(1e3, 1e9), starts, volumes)
def test_a_constant_rate_is_a_division(rate, start, bits):
    for trace in (Trace((0.0,), (rate,)), Trace((0.0, 0.3, 4.0), (rate, rate, rate))):
        assert transfer_end(trace, start, bits) == pytest.approx(start + bits / rate)


@given(
    st.lists(
        st.builds(
            Message,
            st.sampled_from(["all-gather", "all-reduce", "all-to-all"]),
            st.integers(0, 10**7),
            st.integers(1, 30),
            st.booleans(),
        ),
        max_size=3,
    ),
    st.integers(1, 8),
    st.integers(1, 12),
    st.sampled_from(["once", "each"]),
    st.floats(0, 0.01),
)
def test_on_a_constant_rate_every_request_is_a_pass(messages, N, L, counting, latency):
    expected = pass_seconds(1.0, messages, N, Link(1e7, latency, counting))
    found = replay([0.5, 1.0], messages, N, L, Trace((0.0,), (1e7,)), 2.5 * expected, latency, counting)
    np.testing.assert_allclose(found, [expected] * 3, rtol=1e-6)


def test_a_replay_by_hand():
    # Two blocks of 0.5 s. Bits of a block: 50; at the end: 20. OUTAGE repeats every 5 s.
    messages = [Message("all-gather", 50, 2), Message("all-reduce", 20, 1, in_blocks=False)]
    found = replay(1.0, messages, 4, 2, OUTAGE, 5.0)
    # 0.5 s; 50 bits until 1.0; 0.5 s; outage until 3, 50 bits until 3.5, 20 until 3.7. The second starts there.
    second = (0.5 + 0.5) + 0.5 + (0.5 + 0.2)  # all of 4.2-5.9 is open, in the next turn, too
    np.testing.assert_allclose(found, [3.7, second])
    with_latency = replay(1.0, messages, 4, 2, OUTAGE, 1.0, latency=0.1)
    # 0.5 + 0.1, 40 bits until 1.0, outage, 10 until 3.1; 0.5 + 0.1, 50 until 4.2; 0.1, 20 until 4.5.
    np.testing.assert_allclose(with_latency, [4.5])
    assert replay(1.0, messages, 1, 2, OUTAGE, 2.5).tolist() == [1.0, 1.0, 1.0]


def test_exchanges_are_spread_over_the_blocks():
    """One exchange of four blocks comes after the last of them: in the first second the link is open, then shut."""
    trace = Trace((0.0, 4.0, 6.0), (100.0, 0.0, 100.0))
    # 4 s of computation, then an outage until 6.
    np.testing.assert_allclose(replay(4.0, [Message("all-gather", 100, 1)], 4, 4, trace, 1.0), [7.0])
    # One after two of the blocks, of which the first is before the outage; then 2 s, which end in it.
    np.testing.assert_allclose(replay(4.0, [Message("all-gather", 100, 2)], 4, 4, trace, 1.0), [7.0])
    # Two after every block: 1 + 2 s, 1 s, outage until 6, 2 s, and twice 1 + 2 s.
    np.testing.assert_allclose(
        replay(
            4.0, [Message("all-gather", 100, 8)], 4, 4, Trace((0.0, 4.0, 6.0, 100.0), (100.0, 0.0, 100.0, 1.0)), 1.0
        ),
        [14.0],
    )


def test_the_traces_that_come_along_are_what_the_program_writes(tmp_path, monkeypatch):
    shipped = {path.name: path.read_bytes() for path in FOLDER.iterdir()}
    monkeypatch.setattr(traces, "FOLDER", tmp_path / "new")
    traces.main()
    assert {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()} == shipped
    assert set(shipped) == {"wifi.csv", "step-down.csv"}


def test_the_traces_that_come_along_are_as_described():
    down, wifi = read_trace("step-down"), read_trace("wifi")
    assert down.edges == (0, 15, 30, 45, 60) and down.rates == (100e6, 50e6, 20e6, 10e6)
    assert wifi.edges[-1] == pytest.approx(60) and len(wifi.rates) == 600
    rates = np.array(wifi.rates)
    faded = rates < 9e6
    assert rates.max() <= 80e6 and rates[~faded].min() >= 10e6 and 0 < faded.mean() < 0.1
    assert 30e6 < np.median(rates) < 50e6


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("0,1e-320", "row 1: bits_per_second is 1e-320; it must be 0 .an outage., or 1 to"),
        ("0,1e30", "row 1: bits_per_second is 1e.30"),
        ("0,1_000", "row 1: '0,1_000' must be two numbers"),
        ("0,\uff110", "row 1: '0,.0' must be two numbers"),
        ("0,1e6\n1e-9,1e6", "it lasts 2e-09 seconds; that must be from 0.001 to 1e.07"),
        ("0,1e6\n1e8,1e6", "it lasts 2e.08 seconds"),
    ],
)
def test_numbers_that_are_no_link(tmp_path, rows, message):
    with pytest.raises(AstraError, match=message):
        read_trace(written(tmp_path, f"seconds,bits_per_second\n{rows}\n"))


def test_a_replay_without_end_is_refused():
    with pytest.raises(AstraError, match="more than 10,000,000 requests of 0.001 ms fit into 60 s"):
        replay(1e-6, [], 1, 1, read_trace("wifi"), 60.0)
