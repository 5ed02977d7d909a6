"""Where the time of a pass went: arithmetic on passes by hand, and what a profile of this machine tells."""

import math
import time

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from astra_jax.collectives import Peers
from astra_jax.sharding import SEQ, make_mesh
from eval.breakdown import Pass, counters, interface_of, observe, rows

NAN = float("nan")


def test_who_came_last_waited_for_nobody():
    """Two exchanges: the first takes 2 ms, for which host 0 came 5 ms early; the second 3 ms, host 1 1 ms early."""
    passes = [Pass(0.030, (0.007, 0.003), 100.0, 200.0), Pass(0.025, (0.002, 0.004), 50.0, NAN)]
    first, second = rows(passes, 99.6)
    assert first == {
        "host": 0,
        "total ms": pytest.approx(30),
        "compute ms": pytest.approx(20),
        "communication ms": pytest.approx(5),
        "waiting ms": pytest.approx(5),
        "bytes sent": 100,
        "predicted": 100,
        "bytes received": 200,
    }
    assert [second[key] for key in ("compute ms", "communication ms", "waiting ms")] == pytest.approx([19, 5, 1])
    assert second["bytes received"] is None


def test_without_a_profile_a_pass_is_timed_as_a_whole():
    (row,) = rows([Pass(0.5, (), NAN, NAN)], 0.0)
    assert row["total ms"] == 500 and row["compute ms"] is row["waiting ms"] is row["bytes sent"] is None


def test_the_interface_of_an_address_counts():
    assert interface_of("127.0.0.1") == "lo" and interface_of("192.0.2.1") is None
    sent, received = counters("lo")
    assert sent >= 0 and received >= 0
    assert all(map(math.isnan, counters(None)))


def test_collectives_are_found_in_a_profile():
    """Three of one kind and one of another, on each of two devices."""

    def work(x):
        for _ in range(3):
            x = Peers(SEQ).gather(x).sum(0) * 0.5
        return Peers(SEQ).total(x)

    mesh = make_mesh(2)
    program = jax.jit(jax.shard_map(work, mesh=mesh, in_specs=P(SEQ), out_specs=P(), check_vma=False))
    x = np.ones((8, 4), np.float32)
    program(x).block_until_ready()
    start = time.perf_counter()
    result, passed = observe(lambda: program(x))
    assert len(passed.collectives) == 2 * (3 + 1)
    assert 0 < sum(passed.collectives) < 2 * passed.seconds < 2 * (time.perf_counter() - start)
    np.testing.assert_array_equal(result, program(x))
