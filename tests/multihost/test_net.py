"""`astra net check` between hosts that are threads or processes of this machine."""

import contextlib
import json
import shutil
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

import checkpoints
from astra_jax.cli.main import main
from astra_jax.codecs.config import VQConfig
from astra_jax.errors import AstraError
from astra_jax.hosts import preflight, rendezvous
from astra_jax.hosts.agreement import SOURCE, settings
from astra_jax.hosts.connection import Line
from astra_jax.hosts.findings import Findings
from astra_jax.hosts.options import Hosts
from astra_jax.hosts.preflight import check_hosts, gather, take_part
from eval.cost import advice
from eval.cost.workload import open_workload
from eval.network.model import Link
from eval.verbs import net
from tests.helpers import ASTRA
from tests.helpers.hosts import HELLO, free_port

SECONDS = 0.2  # of sending


@pytest.fixture
def port():
    """One that is free, as is the next."""
    return free_port()


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    for module in (rendezvous, preflight):
        monkeypatch.setattr(module, "HELLO_SECONDS", 0.5)
        monkeypatch.setattr(module, "CONNECT_SECONDS", 0.5)


def outcome(hosts, folder=None):
    """Findings, or the error of a host; its thread has its name, with which that of host 0's own part begins, too."""
    threading.current_thread().name = f"host {hosts.host}"
    try:
        return check_hosts(hosts, [folder] if folder else [], SECONDS)
    except AstraError as error:
        return str(error)


def together(port, count, numbers, folders=None, start_seconds=10.0, **more):
    """What hosts with these numbers find, in this order; and what else is to run meanwhile."""
    with ThreadPoolExecutor(len(numbers) + 4) as pool:
        runs = [
            pool.submit(
                outcome,
                Hosts(f"127.0.0.1:{port}", more.get("hosts", {}).get(number, count), number, start_seconds),
                folders[number] if folders else None,
            )
            for number in numbers
        ]
        others = [pool.submit(other) for other in more.get("others", ())]
        found = [run.result(60) for run in runs]
        for other in others:
            other.result(60)
        return found


def caller(port):
    """A connection to host 0, which may have to start first."""
    for _ in range(600):
        with contextlib.suppress(ConnectionError):
            return socket.create_connection(("127.0.0.1", port), timeout=30)
        time.sleep(0.05)
    raise AssertionError("host 0 does not listen")


def test_three_hosts_and_all_is_well(port):
    first, *others = together(port, 3, [0, 2, 1])
    assert others == [Findings(), Findings()]
    assert first.problems == () and [about.host for about in first.hosts] == [0, 1, 2]
    assert {about.address for about in first.hosts} == {"127.0.0.1"}
    assert [(pair.there.source, pair.there.target) for pair in first.pairs] == [(0, 1), (0, 2), (1, 2)]
    for pair in first.pairs:
        assert (pair.back.source, pair.back.target) == (pair.there.target, pair.there.source)
        assert pair.failure == "" and 0 < pair.round_trip < 0.1
        assert pair.there.rate > 1e8 and pair.back.rate > 1e8  # the loopback is far faster than any link


def test_a_host_that_does_not_come(port):
    """The others are measured all the same, and learn of it."""
    start = time.monotonic()
    first, second = together(port, 3, [0, 1], start_seconds=1.0)
    assert 1 < time.monotonic() - start < 6
    (why,) = first.problems
    assert why == (
        "host 2 did not come (--start-seconds is 1): start the same command there with --host 2, and let TCP to port "
        f"{port} of host 0 through"
    )
    assert second.problems == (why,)
    assert len(first.pairs) == 1 and first.pairs[0].failure == ""


def test_host_0_does_not_come(port):
    (why,) = together(port, 2, [1], start_seconds=0.3)
    assert f"nothing answers at --coordinator 127.0.0.1:{port} within 0.3 s (Connection refused)" in why


def test_two_hosts_with_the_same_number(port):
    first, *others = together(port, 3, [0, 1, 1], start_seconds=5.0)
    name = socket.gethostname()
    assert first.problems[0] == (
        f"host 1 ({name}, 127.0.0.1) and host 1 ({name}, 127.0.0.1) have the same number: give each host another --host"
    )
    assert first.problems[1].startswith("host 2 did not come")
    assert sorted(found.problems for found in others) == sorted([first.problems[:1], ("; ".join(first.problems),)])


def test_another_number_of_hosts(port):
    first, *_ = together(port, 3, [0, 1, 2], hosts={2: 4})
    (why,) = first.problems
    assert "has --hosts 4, and host 0 has 3: give the same on every host" in why


def test_another_version(port, monkeypatch):
    ours = rendezvous.versions()

    def versions():
        return ours | ({"jaxlib": "0.1"} if threading.current_thread().name == "host 1" else {})

    monkeypatch.setattr(rendezvous, "versions", versions)
    first, second = together(port, 2, [0, 1])
    assert first.problems == (f"jaxlib is {ours['jaxlib']} on host 0 and 0.1 on host 1: install the same",)
    assert second.problems == first.problems


def test_another_setting_or_code(port, monkeypatch):
    """Of three hosts one each. It is told which hosts have what, and on all of them."""
    ours, versions = settings(), rendezvous.versions()

    def of(host, values, **others):
        return values | (others if threading.current_thread().name == host else {})

    monkeypatch.setattr(preflight, "settings", lambda: of("host 1", ours, JAX_ENABLE_X64="True"))
    monkeypatch.setattr(rendezvous, "versions", lambda: of("host 2", versions, **{SOURCE: "0123"}))
    first, *others = together(port, 3, [0, 1, 2])
    assert first.problems == (
        f"astra's source code is {versions[SOURCE]} on hosts 0, 1 and 0123 on host 2: install the same",
        "JAX_ENABLE_X64 is False on hosts 0, 2 and True on host 1: give the same on every host",
    )
    assert [found.problems for found in others] == [("; ".join(first.problems),)] * 2


def test_another_option_or_input_ends_all_at_once(port, monkeypatch):
    """Before checkpoints are read and pairs are measured; after three differences their number is told."""
    monkeypatch.setattr(preflight, "digest", lambda folders: pytest.fail("it was read"))
    told = {0: {"--a": "1", "--b": "1", "--c": "1", "--d": "1"}, 1: {"--a": "1", "--b": "2", "--c": "2", "e": "'x'"}}
    with ThreadPoolExecutor() as pool:
        hosts = [Hosts(f"127.0.0.1:{port}", 2, host, 10.0) for host in range(2)]
        other = pool.submit(take_part, hosts[1], [], lambda: told[1])
        gathered = gather(hosts[0], [], SECONDS, lambda: told[0])
        gathered.tell("end", "; ".join(gathered.findings.problems))
        line, verdict = other.result(10)
        line.close()
    assert gathered.findings.problems == (
        "--b is 1 on host 0 and 2 on host 1: give the same on every host",
        "--c is 1 on host 0 and 2 on host 1: give the same on every host",
        "--d is 1 on host 0 and not given on host 1: give the same on every host",
        "and 1 more difference",
    )
    assert verdict["why"] == "; ".join(gathered.findings.problems)
    assert gathered.findings.pairs == () and gathered.absent == []


def test_a_host_that_cannot_read_its_inputs(port):
    def unreadable():
        raise AstraError("cat.png: cannot be read: check the path")

    with ThreadPoolExecutor() as pool:
        hosts = [Hosts(f"127.0.0.1:{port}", 2, host, 10.0) for host in range(2)]
        other = pool.submit(take_part, hosts[1], [], unreadable)
        gathered = gather(hosts[0], [], SECONDS, lambda: {"--a": "1"})
        gathered.tell("end")
        other.result(10)[0].close()
    (why,) = gathered.findings.problems
    assert why == f"host 1 ({socket.gethostname()}, 127.0.0.1): cat.png: cannot be read: check the path"


def test_the_port_of_jax_is_reached_too(port, monkeypatch):
    """As with a firewall that lets through the port that was given alone."""
    connect = socket.create_connection

    def blocked(place, timeout=None):
        return connect(("127.0.0.2", 9) if place[1] == port + 1 else place, timeout=timeout)

    monkeypatch.setattr(socket, "create_connection", blocked)
    first, second = together(port, 2, [0, 1])
    assert second.problems == ("; ".join(first.problems),)
    assert first.problems[1].endswith(
        f"no connection to host 0 at 127.0.0.1:{port + 1} (Connection refused): let TCP to this port through its "
        "firewall, too"
    )


def test_a_checkpoint_that_differs_by_one_byte(port, tmp_path):
    for host, content in enumerate([b"12345", b"12345", b"12346"]):
        (tmp_path / str(host)).mkdir()
        (tmp_path / str(host) / "weights").write_bytes(content)
    folders = [tmp_path / str(host) for host in range(3)]
    first, *_ = together(port, 3, [0, 1, 2], folders)
    (why,) = first.problems
    assert "on hosts 0, 1 and " in why and "on host 2: copy the folder of host 0 to the others" in why
    shutil.copy(folders[0] / "weights", folders[2] / "weights")
    assert together(port, 3, [0, 1, 2], folders)[0].problems == ()


def test_a_checkpoint_that_cannot_be_read(port, tmp_path, monkeypatch):
    def unreadable(folders):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(preflight, "digest", unreadable)
    first, _ = together(port, 2, [0, 1], [None, tmp_path])
    assert first.problems[0].endswith("has not read its checkpoint: Permission denied")


def test_strangers_are_ignored(port):
    """One talks HTTP, one is endless, one is silent; and the two hosts meet all the same."""
    connected = threading.Barrier(4)  # host 0 listens until host 1 has come, which waits for them

    def stranger(text, wait):
        with contextlib.suppress(ConnectionError), caller(port) as connection:
            connected.wait(30)
            connection.sendall(text)
            time.sleep(wait)

    def host_1():
        connected.wait(30)
        return together(port, 2, [1])[0]

    others = [partial(stranger, *how) for how in [(b"GET / HTTP/1.1\r\n\r\n", 0.1), (b"x" * 10**5, 0.1), (b"", 0.7)]]
    with ThreadPoolExecutor() as pool:
        late = pool.submit(host_1)
        (first,) = together(port, 2, [0], others=others, start_seconds=40.0)
        second = late.result(60)
    assert first.problems == second.problems == ()
    assert first.pairs[0].failure == ""


def test_a_stranger_is_noted(port):
    """While host 1 is missing, so that host 0 is sure to hear it."""

    def stranger():
        with caller(port) as connection:
            connection.sendall(b"\n")
            assert connection.recv(1) == b""

    (first,) = together(port, 2, [0], start_seconds=1.0, others=[stranger])
    assert first.notes == ("something at 127.0.0.1 connected that is no host of this command: ignored",)


def same():
    """What a host says of settings."""
    body = json.dumps(settings()).encode()
    return json.dumps({"bytes": len(body)}).encode() + b"\n" + body


def host_1(port, until):
    """Says what a host says, and goes once it has heard something."""
    with caller(port) as connection:
        connection.sendall(
            json.dumps(HELLO | {"address": "127.0.0.1"}).encode() + b"\n" + same() + b'{"digest": null}\n'
        )
        for line in connection.makefile():
            if until in line:
                break


def test_a_host_that_is_lost_on_the_way(port):
    first, third = together(port, 3, [0, 2], others=[lambda: host_1(port, "listen")])
    assert first.problems == third.problems == ("host 1 is gone: its process ended or was killed",)
    assert [about.host for about in first.hosts] == [0, 2]


def test_a_host_that_went_may_come_again(port):
    """While host 0 waits for another one."""
    with ThreadPoolExecutor() as pool:
        found = pool.submit(together, port, 3, [0])
        host_1(port, "wait")
        assert [run.problems for run in [*together(port, 3, [1, 2]), *found.result(10)]] == [(), (), ()]


def test_something_else_that_listens_says_nothing(port):
    with socket.create_server(("127.0.0.1", port)):
        (why,) = together(port, 2, [1], start_seconds=0.5)
    assert why == f"host 1: host 0 at 127.0.0.1:{port} is lost (timed out): see what it says there"


def test_a_host_that_another_one_cannot_reach(port, monkeypatch):
    """In one direction, as with a firewall on host 1."""
    measure = preflight._measure_round_trip

    def blocked(target, *rest):
        # There is nothing at 127.0.0.2: the connection is refused.
        return measure("127.0.0.2" if threading.current_thread().name == "host 2" else target, *rest)

    monkeypatch.setattr(preflight, "_measure_round_trip", blocked)
    first, *_ = together(port, 3, [0, 1, 2])
    (why,) = first.problems
    assert why == (
        "from host 2 to host 0: host 2: no connection to 127.0.0.2 (Connection refused): let TCP to all its ports "
        "through the firewalls (and 1 more: see the table)"
    )
    failed = [(way.source, way.target) for pair in first.pairs for way in (pair.there, pair.back) if way.failure]
    assert failed == [(2, 0), (2, 1)]


def test_nobody_answers_like_host_0(port):
    """A server that closes, such as one of another protocol."""
    with socket.create_server(("127.0.0.1", port)) as server, ThreadPoolExecutor() as pool:
        run = pool.submit(outcome, Hosts(f"127.0.0.1:{port}", 2, 1))
        server.accept()[0].close()
        assert f"host 1: host 0 at 127.0.0.1:{port} is lost (" in run.result(10)


def slow_proxy(target, bits_per_second, listening):
    """Passes on one connection, what the caller says at this rate and what the target says at once."""
    size = max(1, min(1 << 16, int(bits_per_second / 8 / 100)))
    with listening.accept()[0] as near, socket.create_connection(target) as far:

        def back():
            with contextlib.suppress(OSError):
                while said := far.recv(1 << 16):
                    near.sendall(said)

        threading.Thread(target=back, daemon=True).start()
        due = time.monotonic()
        with contextlib.suppress(OSError):
            while said := near.recv(size):
                due = max(due, time.monotonic() - 0.1) + 8 * len(said) / bits_per_second
                time.sleep(max(0.0, due - time.monotonic()))
                far.sendall(said)


@pytest.mark.parametrize(("mbps", "seconds"), [(0.1, 0.5), (50.0, 0.6)])
def test_rates(mbps, seconds):
    """Of a link that is limited; and it takes no longer than it is told to, however much waits to be sent."""
    token, start = b"0" * 32, time.monotonic()
    listening, (ours, theirs) = socket.create_server(("127.0.0.1", 0)), socket.socketpair()
    with listening, ours, theirs, ThreadPoolExecutor() as pool:
        arrived = pool.submit(preflight._measure_rate, Line(ours), "127.0.0.1", token, seconds)
        target = "127.0.0.1", Line(theirs).receive(5.0)["port"]
        pool.submit(slow_proxy, target, 1e6 * mbps, listening)
        trip = preflight._measure_round_trip(*listening.getsockname(), token, seconds)
        assert arrived.result(5) == pytest.approx(1e6 * mbps, rel=0.2)
    assert 0 < trip < 0.1
    assert time.monotonic() - start < preflight._STRETCH * seconds + 1


def test_a_stranger_is_not_measured():
    """Only who knows the token is."""
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor() as pool:
        run = pool.submit(preflight._accept, server, b"0" * 32, time.monotonic() + 5)
        with socket.create_connection(server.getsockname()) as stranger:
            stranger.sendall(b"1" * 32)
            with contextlib.suppress(ConnectionError):
                assert stranger.recv(1) == b""
            assert not run.done()
            with socket.create_connection(server.getsockname()) as friend:
                friend.sendall(b"0" * 32)
                with run.result(5) as found:
                    assert found.getpeername() == friend.getsockname()


@pytest.fixture
def checkpoint(tiny_vit, tmp_path):
    """The folder of a tiny model."""
    astra = VQConfig(groups=4, codewords=16)
    model = tiny_vit(astra)
    meta = checkpoints.Checkpoint("vit", model.config, astra, None, None, {}, "float32", (), model)
    checkpoints.save(tmp_path / "vit", meta)
    return tmp_path / "vit"


@pytest.fixture
def same_speed(monkeypatch):
    """All strategies compute at the same speed, which nobody measures."""
    monkeypatch.setattr(advice, "GROUPS", (1, 32))  # of which 32 does not divide the width
    monkeypatch.setattr(net, "reached_here", lambda work, ways: {(way.strategy, way.groups): 1e6 for way in ways})


@pytest.mark.usefixtures("same_speed")
def test_the_advice_is_the_planners(checkpoint):
    work = open_workload(str(checkpoint), None, None, "float32")
    assert net.advice(work, 2, Link(1e3, 0.1, "each")).startswith("stay on one device")
    assert net.advice(work, 2, Link(1e9, 1e-5, "each")).startswith("use ")


@pytest.mark.usefixtures("same_speed")
def test_the_verb_prints_tables_and_advice(port, checkpoint, tmp_path, capsys):
    with ThreadPoolExecutor() as pool:
        other = pool.submit(outcome, Hosts(f"127.0.0.1:{port}", 2, 1), checkpoint)
        argv = ["net", "check", str(checkpoint), "--coordinator", f"127.0.0.1:{port}", "--hosts", "2", "--host", "0"]
        assert main([*argv, "--rate-seconds", str(SECONDS), "--json", str(tmp_path / "net.json")]) == 0
        assert other.result(10) == Findings()
    out, data = capsys.readouterr().out, json.loads((tmp_path / "net.json").read_text())
    assert "slowest link: " in out and data["reason"] in out
    assert data["reason"].startswith(("use ", "stay on one device"))
    assert [row["as host 0"] for row in data["hosts"]] == ["yes", "yes"]
    assert data["pairs"][0]["Mbps there"] >= data["slowest_mbps"] > 100
    assert data["problems"] == []


def test_the_verb_ends_with_what_is_wrong(port, tmp_path, capsys):
    argv = ["net", "check", "--coordinator", f"127.0.0.1:{port}", "--hosts", "2", "--host", "0"]
    assert main([*argv, "--start-seconds", "0.1", "--json", str(tmp_path / "net.json")]) == 2
    out, err = capsys.readouterr()
    assert "did not take part" in out
    assert err.splitlines()[-1].startswith("astra: error: host 1 did not come")
    assert json.loads((tmp_path / "net.json").read_text())["problems"][0] in err


@pytest.mark.slow
def test_processes(port, checkpoint, tmp_path):
    """Another checkpoint on one of three: tables on host 0, and one line of what is wrong everywhere."""
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    (other / "note").write_text("1")
    options = f"--coordinator 127.0.0.1:{port} --hosts 3 --rate-seconds {SECONDS} --host"
    processes = [
        subprocess.Popen(
            [ASTRA, "net", "check", str(folder), *options.split(), str(host)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host, folder in enumerate([checkpoint, checkpoint, other])
    ]
    try:
        ended = [(*process.communicate(timeout=60), process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for host, (out, err, code) in enumerate(ended):
        assert code == 2
        assert err.startswith("astra: error: the checkpoint's hash is ") and err.count("\n") == 1
        assert ("no: checkpoint" in out) == (host == 0)
        assert host == 0 or out == ""
