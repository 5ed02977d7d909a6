"""The lab keeps its promises on rate, loss, CPU, names and faults, and leaves nothing behind."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from astra_jax.errors import AstraError
from eval.network.lab import Cgroups, Lab
from eval.verbs.lab import Args, main
from tests.helpers import ROOT

# Hosts have one clock: the first bytes say when the sender began. A receiver that the machine wakes late begins late.
SEND = """
import socket, struct, sys, time
with socket.create_connection((sys.argv[1], 9000)) as link:
    link.sendall(struct.pack("d", time.monotonic()) + bytes(int(sys.argv[2]) - 8))
"""
RECEIVE = """
import socket, struct, sys, time
server = socket.create_server(("", 9000))
print("ready", flush=True)
links = [server.accept()[0] for _ in range(int(sys.argv[1]))]
begun = min(struct.unpack("d", link.recv(8, socket.MSG_WAITALL))[0] for link in links)
got = 8 * len(links)
for link in links:
    while data := link.recv(1 << 16):
        got += len(data)
print(8 * got / (time.monotonic() - begun))
"""
SEND_DATAGRAMS = """
import socket, sys
link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for _ in range(int(sys.argv[2])):
    link.sendto(bytes(int(sys.argv[3])), (sys.argv[1], 9000))
"""
COUNT_DATAGRAMS = """
import socket
link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
link.setsockopt(socket.SOL_SOCKET, 33, 1 << 26)  # SO_RCVBUFFORCE: none is lost for want of room
link.bind(("", 9000))
print("ready", flush=True)
got = 0
try:
    while link.recv(2000):
        got += 1
        link.settimeout(0.5)
except TimeoutError:
    print(got)
"""
TICK = """
import socket, sys, time
link = socket.create_connection((sys.argv[1], 9000))
while True:
    link.sendall(b"x")
    time.sleep(0.02)
"""
PRINT_TICKS = """
import socket
server = socket.create_server(("", 9000))
print("ready", flush=True)
link = server.accept()[0]
while link.recv(1):
    print("tick", flush=True)
"""
SEND_TO_HOST_0 = """
import socket, time
if {host} == 0:
    link = socket.create_server(("", 9000)).accept()[0]
    while link.recv(1 << 16):
        pass
else:
    time.sleep(0.3)
    with socket.create_connection(("10.77.0.1", 9000)) as link:
        link.sendall(bytes(100_000))
"""
# Without what Python takes of the CPU to start, which is before it is busy. The median: other work may come in between.
BUSY = """
import statistics, time
shares = []
for _ in range(5):
    begun, used = time.monotonic(), time.process_time()
    while time.monotonic() < begun + 0.4:
        pass
    shares.append((time.process_time() - used) / (time.monotonic() - begun))
print(statistics.median(shares))
"""
RESOLVE = """
import socket
name = socket.gethostname()
print(name, socket.gethostbyname(name), socket.gethostbyname("astra-lab-1"), socket.gethostbyname("localhost"))
"""
# A host that is as hard to end as can be: a daemon, a process that ignores signals, and one that is stopped.
STUBBORN = """
setsid -f sleep 98765{host}
(trap "" INT TERM HUP; sleep 98765{host}) &
sleep 98765{host} & kill -STOP $!
echo up
wait
"""


def python(lab, host, program, *argv, **popen):
    """Starts a Python program on a host, and waits until it says that it is ready where it serves others."""
    argv = [sys.executable, "-c", program, *map(str, argv)]
    process = lab.start(host, argv, stdout=subprocess.PIPE, text=True, **popen)
    if "ready" in program:
        assert process.stdout.readline() == "ready\n"
    return process


def result(process):
    out = process.communicate(timeout=30)[0]
    assert process.returncode == 0
    return out.strip()


def throughput(lab, receiver, *senders, bits):
    """Bits per second at which so many bits come from all the senders together to the receiver by TCP. Where the
    machine has other work they come later, and never faster than links let them."""
    receiving = python(lab, receiver, RECEIVE, len(senders))
    for host in senders:
        python(lab, host, SEND, lab.address(receiver), int(bits / 8 / len(senders)))
    return float(result(receiving))


def carries(lab, rate, receiver, *senders):
    """Whether links of this rate carry it: never 10 % more, and within 10 % once in three times."""
    for _ in range(3):
        found = throughput(lab, receiver, *senders, bits=0.7 * rate)
        assert found < 1.1 * rate
        if found > 0.9 * rate:
            return True
    return False


def read(name, how):
    """What `how` finds at `/proc/PID/name` of every process; processes end meanwhile."""
    found = []
    for path in Path("/proc").glob(f"[0-9]*/{name}"):
        with contextlib.suppress(OSError):
            found.append(how(path))
    return found


def stubborn(host):
    """Whether anything lives of what STUBBORN started on a host."""
    return any(f"98765{host}" in words for words in read("cmdline", Path.read_text))


def traces():
    """All that a lab could leave: interfaces, namespaces, mounts, cgroups, files, processes."""
    return {
        "interfaces": sorted(os.listdir("/sys/class/net")),
        "networks": sorted(set(read("ns/net", os.readlink))),
        "named": sorted(path.name for path in Path("/run/netns").glob("*")),
        "mounts": Path("/proc/self/mounts").read_text(),
        "cgroups": [str(path) for path in Path("/sys/fs/cgroup").glob("**/astralab*")],
        "files": sorted(path.name for path in Path(tempfile.gettempdir()).glob("astralab*")),
        "stubborn": [host for host in range(2) if stubborn(host)],
    }


def eventually(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@pytest.fixture
def nothing_left():
    """Asserts that a test leaves nothing of its lab."""
    before = traces()
    assert not before["cgroups"] and not before["stubborn"]
    yield before
    assert traces() == before


def astra_lab(*argv, **popen):
    command = [sys.executable, "-m", "astra_jax.cli.main", "lab", "run", *argv]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen)


def test_hosts_have_names_and_reach_each_other_and_nothing_else(nothing_left):
    with Lab(3, 100e6) as lab:
        for host in range(3):
            found = result(python(lab, host, RESOLVE)).split()
            assert found == [f"astra-lab-{host}", f"10.77.0.{host + 1}", "10.77.0.2", "127.0.0.1"]
        routes = lab.start(0, ["ip", "-4", "route"], stdout=subprocess.PIPE, text=True)
        assert [line.split()[0] for line in result(routes).splitlines()] == ["10.77.0.0/24"]
        seen = lab.start(0, ["ls", "/sys/class/net"], stdout=subprocess.PIPE, text=True)
        assert result(seen).split() == ["eth0", "lo"]
        for key in ("interfaces", "named", "mounts", "files"):
            assert traces()[key] == nothing_left[key], "the machine's own network is not touched"
        for receiver, sender in ((0, 1), (1, 2), (2, 0)):
            assert throughput(lab, receiver, sender, bits=1e6) > 0


def test_what_a_command_is_given(tmp_path):
    with Lab(2, 100e6) as lab:
        for host in range(2):
            argv = ["sh", "-c", 'echo $WORD {host} {hosts} {coordinator} {other} "$@"; pwd', "sh", "a b", "--x={host}"]
            environment = {**os.environ, "WORD": "w"}
            process = lab.start(host, argv, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
            assert result(process) == f"w {host} 2 10.77.0.1:7777 {{other}} a b --x={host}\n{tmp_path}"


def test_a_link_carries_its_rate_in_both_directions(nothing_left):
    with Lab(3, 10e6) as lab:
        assert carries(lab, 10e6, 0, 1)
        assert carries(lab, 10e6, 0, 1, 2), "the receiver's end is shaped, too"
        for host in range(3):
            lab.set_rate(host, 100e6)
        assert carries(lab, 100e6, 0, 1)


def test_links_can_differ(nothing_left):
    with Lab(3, [100e6, 100e6, 10e6]) as lab:
        assert carries(lab, 100e6, 0, 1)
        assert carries(lab, 10e6, 0, 2)


def test_small_messages_do_not_go_faster_than_the_rate():
    """A token bucket that is too large would let the codes of a block through at once. They come in 16 ms."""
    with Lab(2, 10e6) as lab:
        assert max(throughput(lab, 0, 1, bits=160e3) for _ in range(3)) < 1.25 * 10e6


def test_bytes_are_counted(nothing_left):
    with Lab(2, 100e6) as lab:
        receiving = python(lab, 1, COUNT_DATAGRAMS)
        python(lab, 0, SEND_DATAGRAMS, lab.address(1), 1000, 1000)
        assert result(receiving) == "1000"
        frames = 1000 * (1000 + 14 + 20 + 8)  # Ethernet, IP, UDP
        for sent, received in (lab.counters(0), reversed(lab.counters(1))):
            assert frames <= sent <= frames + 200 and received <= 200, "but for who has which address"


def test_packets_are_lost(nothing_left):
    datagrams, loss = 20000, 0.05
    with Lab(2, 100e6, packet_loss=loss) as lab:
        receiving = python(lab, 1, COUNT_DATAGRAMS)
        python(lab, 0, SEND_DATAGRAMS, lab.address(1), datagrams, 50)
        lost = 1 - int(result(receiving)) / datagrams
        for more in (0.0, 0.5):
            lab.set_packet_loss(1, more)
            receiving = python(lab, 1, COUNT_DATAGRAMS)
            python(lab, 0, SEND_DATAGRAMS, lab.address(1), 1000, 50)
            assert abs(1 - int(result(receiving)) / 1000 - more) < 0.1
    assert abs(lost - loss) < 4 * (loss * (1 - loss) / datagrams) ** 0.5


def test_a_host_has_its_share_of_the_cpu(nothing_left):
    with Lab(2, 10e6, cpu=0.4) as lab:
        busy = [python(lab, host, BUSY) for host in range(2)]
        for process in busy:
            assert float(result(process)) == pytest.approx(0.4, rel=0.15)
        groups = Cgroups.find()
        if not groups.unified:
            assert (groups.root / "astralab" / "host1" / "cpu.cfs_period_us").read_text() == "5000\n"


def test_a_host_with_a_share_of_a_core_sees_one_core(nothing_left):
    seen = "import os; print(*os.sched_getaffinity(0))"
    cores = sorted(os.sched_getaffinity(0))
    with Lab(2, 10e6, cpu=0.4) as lab:
        for host in range(2):
            assert result(python(lab, host, seen)) == str(cores[host % len(cores)])
    with Lab(2, 10e6) as lab:
        assert result(python(lab, 1, seen)).split() == [str(core) for core in cores]


def test_a_link_is_cut_and_mended_and_nobody_is_told(nothing_left):
    with Lab(2, 10e6) as lab:
        receiving = python(lab, 0, PRINT_TICKS)
        sending = python(lab, 1, TICK, lab.address(0))
        ticks = receiving.stdout.fileno()
        assert select.select([ticks], [], [], 5)[0]
        lab.cut(1)
        while select.select([ticks], [], [], 0.3)[0]:
            assert os.read(ticks, 1 << 16)
        assert receiving.poll() is None and sending.poll() is None
        lab.mend(1)
        assert select.select([ticks], [], [], 10)[0]


def test_a_host_is_killed_and_starts_again(nothing_left):
    with Lab(2, 10e6) as lab:
        processes = [lab.start(host, ["sh", "-c", STUBBORN], stdout=subprocess.PIPE) for host in range(2)]
        assert all(process.stdout.readline() == b"up\n" for process in processes)
        assert stubborn(0) and stubborn(1)
        lab.kill(1)
        assert processes[1].wait(5) == -signal.SIGKILL
        assert eventually(lambda: not stubborn(1))
        assert stubborn(0) and processes[0].poll() is None
        lab.kill(1)  # where there is nothing to kill
        assert result(python(lab, 1, "print(1)")) == "1"


def test_nothing_is_left_after_an_exception(nothing_left):
    def fail_in_a_lab():
        with Lab(2, 10e6, cpu=0.4) as lab:
            assert lab.start(1, ["sh", "-c", STUBBORN], stdout=subprocess.PIPE).stdout.readline() == b"up\n"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_in_a_lab()


def test_a_command_that_is_stopped_ends_with_the_lab(nothing_left):
    with Lab(1, 10e6, cpu=0.4) as lab:
        process = lab.start(0, ["sh", "-c", "echo $$; kill -STOP $$"], stdout=subprocess.PIPE)
        assert process.stdout.readline()
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
    assert process.poll() is not None


def test_nothing_is_left_where_the_kernel_refuses(nothing_left, tmp_path, monkeypatch):
    refusing = tmp_path / "tc"
    refusing.write_text("#!/bin/sh\necho 'Error: Specified qdisc kind is unknown.' >&2\nexit 2\n")
    refusing.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with (
        pytest.raises(AstraError, match="`tc qdisc .* kind is unknown.: the lab needs a kernel"),
        Lab(2, 10e6, cpu=0.4),
    ):
        pass


def test_a_lab_that_was_killed_takes_its_hosts_along(nothing_left):
    program = f"""
from eval.network.lab import Lab
lab = Lab(2, 10e6, cpu=0.4).__enter__()
for host in range(2):
    lab.start(host, ["sh", "-c", {STUBBORN!r}])
import time
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == process.stdout.readline() == "up\n"
        process.kill()
    with Lab(1, 10e6):  # at once, while the kernel is still at it
        pass
    assert not stubborn(0) and not stubborn(1)


def test_ctrl_c_stops_all(nothing_left):
    process = astra_lab("--hosts", "2", "--rate", "10mbit", "--cpu", "0.4", "--", "sh", "-c", STUBBORN)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "astra: stopped" in err


def test_what_is_not_the_labs_is_left_alone():
    """Whatever merely resembles a lab: an interface, a namespace, a cgroup, a file."""
    group = Cgroups.find().root / "astralab-mine"
    file = Path(tempfile.gettempdir()) / "astralab-mine"
    subprocess.run(["ip", "link", "add", "astralab0", "type", "bridge"], check=True)
    subprocess.run(["ip", "netns", "add", "astralab-0"], check=True)
    group.mkdir()
    file.touch()
    try:
        before = traces()
        assert "astralab0" in before["interfaces"] and "astralab-0" in before["named"]
        with Lab(2, 10e6, cpu=0.4):
            pass
        assert traces() == before
    finally:
        file.unlink()
        group.rmdir()
        subprocess.run(["ip", "netns", "delete", "astralab-0"], check=True)
        subprocess.run(["ip", "link", "delete", "astralab0"], check=True)


def test_there_is_one_lab_at_a_time(nothing_left):
    with Lab(1, 10e6), pytest.raises(AstraError, match="another lab is running"), Lab(1, 10e6):
        pass
    with Lab(1, 10e6):
        pass


def test_a_leftover_cgroup_with_a_process_is_named(nothing_left):
    groups = Cgroups.find()
    enter = groups.add(7, 0.4)
    with subprocess.Popen(["sh", "-c", f"{enter}; echo in; exec sleep 60"], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"in\n"
        with pytest.raises(AstraError, match="astralab/host7 cannot be removed: end the processes"):
            groups.remove(seconds=0.1)
        process.kill()
    groups.remove()


def test_cores_are_not_promised_twice():
    cores = len(os.sched_getaffinity(0))
    with pytest.raises(AstraError, match=f"and there are {cores}: choose at most"), Lab(10, 10e6, cpu=float(cores)):
        pass


def run(tmp_path, capfd, *command, hosts=2):
    """Exit code, output, errors and JSON of `astra lab run`."""
    code = 0
    try:
        main(Args("run", "10mbit", command, hosts=hosts, json=tmp_path / "out.json"))
    except SystemExit as end:
        code = end.code
    return code, *capfd.readouterr(), json.loads((tmp_path / "out.json").read_text())["hosts"]


def test_the_exit_code_is_that_of_host_0(nothing_left, tmp_path, capfd):
    assert run(tmp_path, capfd, "sh", "-c", "exit $((3 - {host}))")[0] == 3
    code, _, _, hosts = run(tmp_path, capfd, "sh", "-c", "exit {host}", hosts=3)
    assert code == 0 and [host["exit code"] for host in hosts] == [0, 1, 2]
    assert run(tmp_path, capfd, "sh", "-c", "kill -9 $$")[0] == 128 + 9
    code, _, err, _ = run(tmp_path, capfd, "there-is-no-such-command")
    assert code == 127 and "there-is-no-such-command: not found" in err


def test_host_0_prints_and_the_others_are_marked(nothing_left, tmp_path, capfd):
    code, out, err, hosts = run(tmp_path, capfd, "sh", "-c", "echo one {host}; echo two {host} >&2; sleep 0.2")
    assert code == 0 and out.startswith("one 0\n") and "2 hosts at 10mbit" in out
    assert sorted(err.splitlines()) == ["[host 1] one 1", "[host 1] two 1", "two 0"]
    assert [host["host"] for host in hosts] == [0, 1]
    assert all(0.2 <= host["seconds"] < 1 for host in hosts)


def test_bytes_of_a_run_are_reported(nothing_left, tmp_path, capfd):
    code, _, _, hosts = run(tmp_path, capfd, sys.executable, "-c", SEND_TO_HOST_0)
    assert code == 0
    assert 100_000 < hosts[1]["bytes sent"] == hosts[0]["bytes received"] < 108_000
    assert 0 < hosts[0]["bytes sent"] == hosts[1]["bytes received"] < 6_000
