"""Where the time of a pass went: arithmetic on passes by hand, and what a profile of this machine tells."""

import math
import time

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from astra_jax.mesh.collectives import Peers
from astra_jax.mesh.sharding import SEQ, make_mesh
from eval.network import pass_profile
from eval.network.pass_profile import Pass, counters, heard, interface_of, observe, rows, told

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


def test_a_program_that_is_compiled_meanwhile_adds_no_collectives():
    """XLA's passes have names such as all-reduce-promotion; how many there are depends on what was compiled before."""

    def work(x):
        return Peers(SEQ).total(Peers(SEQ).gather(x).sum(0))

    mesh, x = make_mesh(2), np.ones((8, 4), np.float32)

    def new():
        program = jax.jit(jax.shard_map(work, mesh=mesh, in_specs=P(SEQ), out_specs=P(), check_vma=False))
        return program.lower(x).compile({"xla_cpu_enable_fast_math": False})(x)  # options: compiled anew

    _, passed = observe(new)
    assert len(passed.collectives) == 2 * 2


def test_what_cannot_be_measured_is_not_known_and_the_answer_is_there(monkeypatch):
    """No profile, no interface, no file that can be opened, no room for one."""

    def broken(*args, **options):
        raise OSError("no space left")

    monkeypatch.setattr(pass_profile._profiler, "ProfilerSession", broken)
    monkeypatch.setattr(pass_profile, "interface_of", broken)
    monkeypatch.setattr(pass_profile.psutil, "net_io_counters", broken)
    result, passed = observe(lambda: 7)
    assert result == 7 and passed.collectives == () and math.isnan(passed.sent) and passed.seconds > 0
    assert all(map(math.isnan, counters("lo")))


def test_nothing_is_written_to_a_disk(monkeypatch, tmp_path):
    """A full or read-only folder for temporary files is no harm."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    observe(lambda: jax.numpy.ones(3) + 1)


def test_an_error_of_what_is_observed_comes_through_and_the_next_is_observed():
    with pytest.raises(ZeroDivisionError):
        observe(lambda: 1 / 0)
    test_collectives_are_found_in_a_profile()


def test_a_pass_is_told_to_another_host():
    passed = Pass(0.5, (0.1, 0.2), NAN, 3.0)
    assert repr(heard(told(passed))) == repr(passed)
    assert heard(told(Pass(0.5, (0.1,) * 20_000, 1.0, 2.0))) == Pass(0.5, (), 1.0, 2.0)
    for nonsense in (None, [], {}, "text", [1.0, 2.0]):
        assert repr(heard(nonsense)) == repr(Pass(NAN, (), NAN, NAN))
    assert repr(heard(["1", None, True, [2]])) == repr(Pass(NAN, (NAN,), NAN, NAN))


@pytest.mark.parametrize("other", [(), (0.1,), (0.1, 0.1, 0.1), (0.1, NAN)], ids=str)
def test_hosts_that_saw_different_collectives_do_not_know_what_they_waited(other):
    first, second = rows([Pass(1.0, (0.1, 0.2), 1.0, 1.0), Pass(2.0, other, 1.0, 1.0)], 1.0)
    assert first["communication ms"] is None and second["waiting ms"] is None
    assert (first["total ms"], second["total ms"]) == (1000, 2000)
    assert rows([heard(None), heard(None)], 1.0)[0]["total ms"] is None
