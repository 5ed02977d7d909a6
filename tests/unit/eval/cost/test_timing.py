"""What is timed, and in which order."""

import pytest

from astra_jax.mesh.sharding import make_mesh
from eval.cost import timing
from eval.cost.timing import exchange_latency, median_seconds, wall_seconds


def test_calls_take_turns_after_two_of_each():
    seen = []
    calls = [lambda: seen.append("a"), lambda: seen.append("b")]
    found = wall_seconds(calls, 3, lambda: seen.append("-"))
    assert "".join(seen) == "aabb" + 3 * "-a-b"
    assert [len(times) for times in found] == [3, 3]


def test_times_are_those_of_the_call_alone(monkeypatch):
    """A clock that goes on by 1 s in the call, and by 100 s while hosts wait for each other."""
    now = [0.0]

    def passes(seconds):
        now[0] += seconds

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    assert wall_seconds([lambda: passes(1.0)], 2, lambda: passes(100.0)) == [[1.0, 1.0]]
    assert median_seconds(lambda: passes(2.0), 3) == 2.0


def test_the_latency_is_that_of_one_exchange(monkeypatch):
    """A program of so many exchanges is timed, and each has its part of the time."""
    program = []
    monkeypatch.setattr(timing, "median_seconds", lambda call, repeats: program.append(call) or 2.4)
    assert exchange_latency(make_mesh(4)) == pytest.approx(0.2)
    assert float(program[0]()) == 0.0
