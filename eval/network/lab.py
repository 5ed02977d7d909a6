"""Several hosts with names, addresses, slow links and slow CPUs of their own, on one Linux machine.

    with Lab(4, rate=10e6, cpu=0.4, packet_loss=0.05) as lab:
        ended = lab.run(["astra", "run", "CHECKPOINT", "--coordinator", "{coordinator}", ...])

Needs root, iproute2, nftables and util-linux. A host is a set of Linux namespaces: processes, network, host name and
mounts are its own, while files, memory and the clock are the machine's. Its only way out is one link to a switch,
so it reaches the other hosts and nothing else.

No namespace has a name, and the switch stands in one too: nothing is added to the machine's own network, and the kernel
takes all of it away when the last process in it ends. That is when the lab does, even by kill -9: the first process of
every host reads from a pipe that the lab holds open, and when the first process ends the kernel kills the others.
What remains after a kill -9 are the empty cgroups `astralab`, which the next lab removes.
"""

import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from astra_jax.errors import AstraError

NAME = "astralab"  # of what other processes of the machine can see: the cgroups and the lock
PORT = 7777  # of the coordinator; a host's ports are its own, so all are free
PERIOD = 5000  # microseconds in which a host may use its share of the CPU once
WEIGHT = 10000  # of all hosts beside the machine's other work, as cgroup v2 counts: 100 is usual, this is the most
LEAST_QUOTA = 1000  # microseconds, the kernel's least: shares from 0.2
FRAME = 1514  # bytes of a full Ethernet frame
MOST_HOSTS = 100  # our choice: a switch has at most 1,023 ports, a machine far fewer cores
TOOLS = {
    "ip": "iproute2", "tc": "iproute2", "nft": "nftables",
    "unshare": "util-linux", "nsenter": "util-linux", "taskset": "util-linux",
}  # fmt: skip

# What a host runs first, with the file of names and its own name as arguments; then it waits for the end of the lab.
# Machines differ in how TCP reacts to losses: reno is what every kernel has and lets a namespace choose, and the usual
# cubic does the same on links as short as these. IPv6 would add packets of its own.
_FIRST_PROCESS = """
set -e
mount -t sysfs sysfs /sys
mount --bind "$1" /etc/hosts
echo "$2" > /proc/sys/kernel/hostname
echo reno > /proc/sys/net/ipv4/tcp_congestion_control
for way in all default; do
  off=/proc/sys/net/ipv6/conf/$way/disable_ipv6
  if [ -e $off ]; then echo 1 > $off; fi
done
ip link set lo up
echo ready
exec cat
"""


class Ended(NamedTuple):
    """How a command ended on one host.

    Attributes:
      code: exit code; 128 and the signal's number where a signal ended it, as in a shell.
      seconds: from the start of the command on this host to its end.
      sent, received: bytes on the host's link until all hosts ended, headers included, as the kernel counts them.
    """

    code: int
    seconds: float
    sent: int
    received: int


class Lab:
    """A context in which there are N hosts, numbered from 0, that do nothing by themselves.

    The link of a host is a full-duplex cable to a switch. Both of its ends are shaped by a token bucket (tc tbf): it
    lets through two full frames at once, or what the rate gives in 1.2 ms if that is more: at 500 Mbps that is more
    than the 64 KiB of TCP's largest pieces, which would else be cut up, at a price. Its queue holds 100 ms, and 64 KiB
    at least; what does not fit is dropped, as by a switch. Headers are part of the rate, as on any link: TCP is left
    with 95%.

    A host hands TCP's data to its link in large pieces, as to a network card that cuts them into frames. Where packets
    are lost it cuts them itself, so that frames are lost one by one; that costs it time from about 100 Mbps on.

    A host with a share of a core has that one core to run on, and sees no other: programs start a thread for every core
    that they see, and threads that use up one share together are stopped together, in the middle of what others wait
    for. The hosts are spread over the cores; where some core's hosts would need more than there is of it, all hosts
    have all cores.

    Args:
      hosts: N.
      rate: bits per second of every link, in each direction; or of each host's.
      cpu: cores a host may use, such as 0.4, counted anew every 5 ms. At the kernel's default of 100 ms hosts stop
        for so long, out of step, that barriers between them hide what is gained by splitting. None for no limit.
      packet_loss: share of the packets arriving at a host that are lost, each on its own.

    Raises:
      AstraError: a value is out of its range; on entering, root or a tool is missing, the kernel refuses, or another
        lab is running: they would slow each other down.
    """

    def __init__(self, hosts: int, rate: float | Sequence[float], cpu: float | None = None, packet_loss: float = 0.0):
        if not 1 <= hosts <= MOST_HOSTS:
            raise AstraError(f"the lab cannot have {hosts} hosts: choose 1 to {MOST_HOSTS}")
        rates = tuple(rate) if isinstance(rate, Sequence) else (rate,) * hosts
        if len(rates) != hosts:
            raise AstraError(f"{len(rates)} rates were given for {hosts} hosts: give one for all, or one for each")
        for one in rates:
            _check_rate(one)
        if cpu is not None and not cpu >= LEAST_QUOTA / PERIOD:
            raise AstraError(f"a share of {cpu:g} of a core is too little: Linux gives {LEAST_QUOTA / PERIOD} or more")
        if not 0 <= packet_loss < 1:
            raise AstraError(f"a loss of {packet_loss:.0%} of the packets leaves no link: choose 0% to less than 100%")
        self.hosts, self.rates, self.cpu, self.packet_loss = hosts, rates, cpu, packet_loss
        self._pin: list[list[str]] = [[]] * hosts  # of every host, what comes before a command to give it its core
        self._machines: list[subprocess.Popen[str]] = []  # of every host its first process, then that of the switch
        self._started: list[subprocess.Popen[Any]] = []
        self._enter_cgroup: list[str] = []  # of every host, a line of shell
        self._cgroups: Cgroups | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "Lab":
        check_machine()
        there = sorted(os.sched_getaffinity(0))
        cores = len(there)
        if self.cpu is not None and not self.hosts * self.cpu <= cores:
            raise AstraError(
                f"{self.hosts} hosts with {self.cpu:g} of a core each need {self.hosts * self.cpu:g} cores, and there "
                f"are {cores}: choose at most {cores / self.hosts:.3g}, or fewer hosts"
            )
        if (own := cores_of(self.hosts, self.cpu, there)) is not None:
            self._pin = [["taskset", "-c", str(core)] for core in own]
        with ExitStack() as stack:
            stack.enter_context(_only_one())
            self._cgroups = cgroups = Cgroups.find()
            if cgroups:
                cgroups.remove()
                stack.callback(cgroups.remove)
            elif self.cpu is not None:
                raise AstraError("this kernel has no cgroup controller for the CPU: leave out cpu")
            stack.callback(self._end)
            with tempfile.NamedTemporaryFile("w", prefix=NAME) as names:  # once mounted, it needs no name
                names.write("127.0.0.1 localhost\n")
                names.writelines(f"{self.address(host)} {self.name(host)}\n" for host in range(self.hosts))
                names.flush()
                for name in [*map(self.name, range(self.hosts)), "switch"]:
                    self._machines.append(_first_process(names.name, name))
            bridge = ("bridge", "mcast_snooping", "0")  # or else the switch sends packets of its own
            self._within(self.hosts, "ip", "link", "add", "switch", "up", "type", *bridge)
            for host in range(self.hosts):
                self._connect(host)
                self._enter_cgroup.append(cgroups.add(host, self.cpu) if cgroups and self.cpu is not None else ":")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stack.close()

    @staticmethod
    def address(host: int) -> str:
        """IPv4 address of a host. Hosts reach nothing but each other, so it may be in use elsewhere."""
        return f"10.77.0.{host + 1}"

    @staticmethod
    def name(host: int) -> str:
        """Host name, which every host resolves to the host's address."""
        return f"astra-lab-{host}"

    def start(self, host: int, argv: Sequence[str], **popen: Any) -> subprocess.Popen[Any]:
        """Starts a command on a host.

        Args:
          argv: the command. {host}, {hosts} and {coordinator} are replaced in it.
          popen: further arguments of `subprocess.Popen`, such as env, cwd or stdout. By default there is no input.

        Returns:
          The process that waits for the command and ends as it does. A signal to it does not reach the command:
          `kill` does that, or a signal to its process group (`os.killpg(process.pid, ...)`).
        """
        cwd = os.path.abspath(popen.pop("cwd", None) or os.getcwd())
        command = [self._fill(word, host) for word in argv]
        process = subprocess.Popen(
            [
                *("sh", "-c", f'{self._enter_cgroup[host]} && exec "$@"', "sh"),
                *self._pin[host],
                *self._inside(host),
                *("sh", "-c", 'cd "$0" && exec "$@"', cwd, *command),
            ],
            **{"stdin": subprocess.DEVNULL, "start_new_session": True, **popen},
        )
        self._started.append(process)
        return process

    def run(self, argv: Sequence[str]) -> list[Ended]:
        """Runs a command on every host at once, to the end of the last.

        What host 0 prints is printed; what the others print goes to stderr, each line after the host's number.
        """
        before = [self.counters(host) for host in range(self.hosts)]
        begun = time.monotonic()
        processes, relays = [self.start(0, argv)], []
        for host in range(1, self.hosts):
            process = self.start(
                host, argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
            )
            assert process.stdout is not None
            relays.append(threading.Thread(target=_relay, args=(process.stdout, f"[host {host}] "), daemon=True))
            relays[-1].start()
            processes.append(process)
        seconds: dict[int, float] = {}
        while len(seconds) < self.hosts:
            time.sleep(0.01)
            for host, process in enumerate(processes):
                if process.poll() is not None:
                    seconds.setdefault(host, time.monotonic() - begun)
        for relay in relays:
            relay.join(1)  # what the command left running may still hold its output open
        ended = []
        for host, process in enumerate(processes):
            sent, received = (now - then for now, then in zip(self.counters(host), before[host], strict=True))
            code = process.returncode
            ended.append(Ended(128 - code if code < 0 else code, seconds[host], sent, received))
        return ended

    def kill(self, host: int) -> None:
        """Kills every process of a host (signal 9). Its address and link stay, and commands can be started again."""
        _do([*self._inside(host), "sh", "-c", "kill -KILL -1 2> /dev/null || :"])  # it fails where there is none

    def cut(self, host: int) -> None:
        """Cuts the link of a host, as if its cable was pulled: nothing arrives, and no program is told."""
        self._within(self.hosts, "ip", "link", "set", f"host{host}", "down")

    def mend(self, host: int) -> None:
        """Mends a link that was cut."""
        self._within(self.hosts, "ip", "link", "set", f"host{host}", "up")

    def set_rate(self, host: int, rate: float) -> None:
        """Changes the rate of a host's link, in both directions, to so many bits per second.

        Raises:
          AstraError: the rate is not positive or out of what the kernel can do.
        """
        _check_rate(rate)
        for machine, device in ((host, "eth0"), (self.hosts, f"host{host}")):
            self._within(machine, "tc", "qdisc", "replace", "dev", device, "root", "tbf", *token_bucket(rate))

    def set_cpu(self, host: int, cpu: float) -> None:
        """Changes how much of a core a host may use: below a fifth it is counted anew every 1 ms / cpu.

        Raises:
          AstraError: no host of this lab has a share, or this one would get none.
        """
        if self._cgroups is None or self.cpu is None or not 0 < cpu <= 1:
            raise AstraError(f"a host cannot get {cpu:g} of a core here: give a share to all of the lab first")
        self._cgroups.set(host, cpu)

    def set_packet_loss(self, host: int, loss: float) -> None:
        """Changes the share of the packets arriving at a host that are lost.

        Raises:
          AstraError: the lab was made without losses, so that hosts do not cut up what they send.
        """
        if not self.packet_loss or not 0 <= loss < 1:
            raise AstraError(f"{loss:.0%} of the packets cannot be lost here: give a loss to all of the lab first")
        rule = f"; add rule ip {NAME} input {_dropped(loss)}" if loss else ""
        self._within(host, "nft", f"flush chain ip {NAME} input{rule}")

    def counters(self, host: int) -> tuple[int, int]:
        """Bytes that a host has (sent, received) so far: frames on its link, headers included."""
        text = Path(f"/proc/{self._machines[host].pid}/net/dev").read_text()
        fields = text.partition("eth0:")[2].split()
        return int(fields[8]), int(fields[0])

    def _fill(self, word: str, host: int) -> str:
        values = {"{host}": host, "{hosts}": self.hosts, "{coordinator}": f"{self.address(0)}:{PORT}"}
        return re.sub("|".join(values), lambda found: str(values[found[0]]), word)

    def _inside(self, machine: int) -> list[str]:
        """What comes before a command to run it on a host, or on the switch."""
        pid = self._machines[machine].pid
        return ["nsenter", "-t", str(pid), "--net", "--uts", "--mount", f"--pid=/proc/{pid}/ns/pid_for_children", "--"]

    def _within(self, machine: int, *argv: str) -> None:
        """Runs a tool of the machine in the network of a host, or of the switch."""
        _do(["nsenter", "-t", str(self._machines[machine].pid), "--net", "--", *argv])

    def _connect(self, host: int) -> None:
        pid = self._machines[host].pid
        self._within(self.hosts, "ip", "link", "add", f"host{host}", "type", "veth", "peer", "eth0", "netns", str(pid))
        self._within(self.hosts, "ip", "link", "set", f"host{host}", "master", "switch", "up")
        self._within(host, "ip", "address", "add", f"{self.address(host)}/24", "dev", "eth0")
        self._within(host, "ip", "link", "set", "eth0", *(("gso_max_segs", "1") if self.packet_loss else ()), "up")
        self.set_rate(host, self.rates[host])
        if self.packet_loss:
            chain = f"chain input {{ type filter hook input priority 0; {_dropped(self.packet_loss)}; }}"
            self._within(host, "nft", f"table ip {NAME} {{ {chain}; }}")

    def _end(self) -> None:
        for machine in self._machines:
            assert machine.stdin is not None and machine.stdout is not None
            machine.stdin.close()
            machine.stdout.close()
        processes = [*self._machines, *self._started]
        try:
            for process in processes:
                process.wait(1)
        except subprocess.TimeoutExpired:  # a command was stopped, and what waits for it stopped, too
            for process in self._started:
                process.kill()
            for process in processes:
                process.wait()


class Cgroups(NamedTuple):
    """Where processes are held to a share of the CPU: `astralab/hostI` below the root of the controller.

    They have precedence over the machine's other work, so that the share is not only the most that a host gets.

    Attributes:
      root: where the controller is mounted.
      unified: whether this is cgroup v2, of which one tree has all controllers.
    """

    root: Path
    unified: bool

    @classmethod
    def find(cls, mounts: Path = Path("/proc/self/mounts")) -> "Cgroups | None":
        """The CPU controller among what is mounted; None where there is none."""
        for line in mounts.read_text().splitlines():
            _, where, kind, options, *_ = line.split()
            controllers = Path(where) / "cgroup.controllers"
            if kind == "cgroup" and "cpu" in options.split(","):
                return cls(Path(where), False)
            if kind == "cgroup2" and controllers.is_file() and "cpu" in controllers.read_text().split():
                return cls(Path(where), True)
        return None

    def add(self, host: int, cpu: float) -> str:
        """Makes the cgroup of a host. Returns the line of shell by which a process enters it."""
        top = self.root / NAME
        group = top / f"host{host}"
        group.mkdir(parents=True)
        if self.unified:
            for parent in (self.root, top):
                (parent / "cgroup.subtree_control").write_text("+cpu")
            (top / "cpu.weight").write_text(f"{WEIGHT}")
        else:
            (top / "cpu.shares").write_text(f"{WEIGHT * 1024 // 100}")
        self.set(host, cpu)
        return f"echo $$ > '{group}/cgroup.procs'"

    def set(self, host: int, cpu: float) -> None:
        """Gives a host another share."""
        group, period = self.root / NAME / f"host{host}", max(PERIOD, math.ceil(LEAST_QUOTA / cpu))
        if self.unified:
            (group / "cpu.max").write_text(f"{round(cpu * period)} {period}")
        else:
            (group / "cpu.cfs_period_us").write_text(f"{period}")
            (group / "cpu.cfs_quota_us").write_text(f"{round(cpu * period)}")

    def remove(self, seconds: float = 5) -> None:
        """Removes the cgroups, also those of a lab that was killed, whose last processes may be ending just now.

        Raises:
          AstraError: there are processes in them for longer than that.
        """
        top = self.root / NAME
        groups = [*top.glob("host*/"), top] if top.is_dir() else []
        deadline = time.monotonic() + seconds
        for group in groups:
            while True:
                try:
                    group.rmdir()
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        raise AstraError(f"{group} cannot be removed: end the processes in its cgroup.procs") from None
                    time.sleep(0.01)


def cores_of(hosts: int, cpu: float | None, cores: Sequence[int]) -> list[int] | None:
    """The core of every host, given the share of one that each has; None where each may use all. See `Lab`."""
    if cpu is None or hosts > len(cores) * math.floor(1 / cpu):
        return None
    return [cores[host % len(cores)] for host in range(hosts)]


def token_bucket(rate: float) -> list[str]:
    """Arguments of tc's tbf for a rate in bits per second; see `Lab`."""
    burst = max(2 * FRAME, rate / 8 * 1.2e-3)
    queue = max(1 << 16, rate / 8 / 10)
    return ["rate", f"{round(rate)}bit", "burst", f"{round(burst)}b", "limit", f"{round(queue)}b"]


def _dropped(loss: float) -> str:
    """nftables' rule for losing a share of the packets that arrive."""
    return f'iifname "eth0" numgen random mod 1000000 < {round(loss * 1e6)} drop'


def _check_rate(rate: float) -> None:
    if not 1e3 <= rate <= 1e10:
        raise AstraError(f"a link of {rate:g} bits per second cannot be made: choose 1kbit to 10gbit")


def check_machine() -> None:
    """Raises AstraError where no lab can be made: not Linux, not root, or a tool is missing."""
    if sys.platform != "linux":
        raise AstraError(f"the lab is made of Linux namespaces, and this is {sys.platform}: run it on Linux")
    if os.geteuid() != 0:
        raise AstraError("only root may make the lab's network: run it with sudo")
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        packages = " ".join(dict.fromkeys(TOOLS[tool] for tool in missing))
        raise AstraError(f"the lab needs {', '.join(missing)}: apt-get install {packages}")


def _only_one() -> socket.socket:
    """A lock that goes with the process, as it has no file: a name among the sockets of the machine."""
    lock = socket.socket(socket.AF_UNIX)
    try:
        lock.bind(f"\0{NAME}")
    except OSError:
        lock.close()
        raise AstraError("another lab is running, and two would slow each other down: wait for its end") from None
    return lock


def _do(argv: Sequence[str]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise _refused(argv[argv.index("--") + 1 :], done.stderr)


def _refused(argv: Sequence[str], said: str) -> AstraError:
    return AstraError(
        f"`{' '.join(argv)}` failed: {' '.join(said.split()) or 'no reason given'}: the lab needs a kernel with "
        "namespaces, veth, bridge, tbf and nftables, and in a container all rights (--privileged)"
    )


def _first_process(names: str, name: str) -> subprocess.Popen[str]:
    """Makes the namespaces of a host. The process lives, and they do, until its input is closed."""
    argv = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    process = subprocess.Popen(
        [*argv, "sh", "-c", _FIRST_PROCESS, "sh", names, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    if process.stdout.readline() != "ready\n":
        said = process.communicate()[1]
        raise _refused(argv, said)
    process.stderr.close()
    return process


def _relay(output: Iterable[str], prefix: str) -> None:
    for line in output:
        sys.stderr.write(f"{prefix}{line.rstrip()}\n")


def parse_packet_loss(text: str) -> float:
    """`"5%"` -> 0.05. Raises AstraError without the sign, and for more than all."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{0,9})?)\s*%", text.strip())
    if not match or float(match[1]) > 100:
        raise AstraError(f"the packet loss {text!r} is not understood: write a percentage, such as 5%, up to 100%")
    return float(match[1]) / 100
