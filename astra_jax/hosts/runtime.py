"""Several hosts as one mesh: `jax.distributed`, with the addresses and time limits that slow links need.

The same command is started on every host. JAX does the rest: its coordination service on host 0 tells the hosts of each
other, and collectives run over gloo (CPU), NCCL (GPU) or ICI (TPU). Neither authenticates or encrypts anything.
"""

import atexit
import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax._src import distributed, xla_bridge  # JAX has no public way to say where gloo binds
from jax.experimental import multihost_utils
from jax.extend.backend import register_backend_factory
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxlib import _jax

from astra_jax.errors import AstraError, first_line
from astra_jax.hosts.agreement import Same, fingerprint
from astra_jax.hosts.findings import Findings, pair_rows
from astra_jax.hosts.heartbeat import Lifeline, die
from astra_jax.hosts.options import Hosts, Policy, check, detect, own_address, parse_address
from astra_jax.hosts.preflight import BRIEFLY, gather, take_part
from astra_jax.hosts.rendezvous import number
from astra_jax.mesh.collectives import Peers
from astra_jax.mesh.sharding import DATA, SEQ, make_mesh, parse_devices
from astra_jax.report import be_quiet, print_table
from astra_jax.terminal import complain, one_line

# What JAX and XLA give up after: never, as it were. That a slow link is no dead host is for the lifeline to know.
GIVE_UP_SECONDS = 24 * 3600
_XLA_FLAGS = (
    f"--xla_cpu_collective_timeout_seconds={GIVE_UP_SECONDS}"
    f" --xla_cpu_collective_call_terminate_timeout_seconds={GIVE_UP_SECONDS}"
    f" --xla_cpu_collective_call_warn_stuck_timeout_seconds={GIVE_UP_SECONDS}"
)

_NO_PROXY = "no_grpc_proxy"  # gRPC knows it in small letters alone
VERDICT_SECONDS = 1.5  # what the lifeline may take to say which host is gone, after an error that does not
QUEUE_BITS = 8 << 16  # what may wait before a link, and a sign of life behind it
TORN_SECONDS = 10.0  # what other hosts may take to fail where this one did, before they count as left behind

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Again:
    """What a program learns that begins anew without a host that is gone.

    Attributes:
      coordinator: address and port of host 0.
      hosts, host: how many are left, and which of them this is.
      were: how many there were at first.
      why: which host is gone, and the cause.
    """

    coordinator: str
    hosts: int
    host: int
    were: int
    why: str


@dataclasses.dataclass
class Membership:
    """This process as one of several hosts.

    Attributes:
      lifeline: its connections.
      coordinator: address and port of host 0.
      address: its own.
      findings: of the preflight, on host 0.
      slow: seconds that a full queue before the slowest link takes.
    """

    lifeline: Lifeline
    coordinator: str
    address: str
    findings: Findings
    slow: float


_membership: Membership | None = None
_again = Again(**json.loads(os.environ["ASTRA_AGAIN"])) if "ASTRA_AGAIN" in os.environ else None


def _begin_again(coordinator: str, were: int, why: str, hosts: int, host: int) -> None:
    """Starts this program from its beginning, in the same process, as one of the hosts that are left."""
    left = f"{hosts} hosts go on" if hosts > 1 else "host 0 goes on alone"
    complain(f"\nastra: {one_line(why)}: {left}")
    os.environ["ASTRA_AGAIN"] = json.dumps(dataclasses.asdict(Again(coordinator, hosts, host, were, why)))
    for entry in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        if int(entry) > 2:  # connections of gloo and JAX would stay open
            with contextlib.suppress(OSError):
                os.set_inheritable(int(entry), False)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _abort_slowly() -> None:
    """Lets the lifeline have its say where XLA aborts the process, which it does where it loses host 0: the handler of
    this signal is libc's `sleep`, for as many seconds as the signal has as a number, 6."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def _gloo_at(address: str) -> None:
    """Lets gloo bind this address. By itself it binds what the host name resolves to, which on Debian is 127.0.1.1."""

    def make() -> Any:
        collectives = _jax.make_gloo_tcp_collectives(distributed.global_state.client, hostname=address)
        return xla_bridge.make_cpu_client(collectives)

    register_backend_factory("cpu", make, priority=0, fail_quietly=False)


def _meet(mesh: Mesh) -> None:
    """The first collectives, which connect the hosts with each other. gloo says so on the output: not here."""
    # Of one row of the mesh, and where there are several of its columns and of all of it: who they are differs.
    groups: list[Any] = [SEQ, DATA, (DATA, SEQ)] if mesh.shape[DATA] > 1 else [SEQ]
    total = jax.shard_map(
        lambda: [Peers(group).total(jnp.zeros(())) for group in groups],
        mesh=mesh,
        in_specs=(),
        out_specs=P(),
        check_vma=False,
    )
    sys.stdout.flush()
    output = os.dup(1)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            multihost_utils.sync_global_devices("astra")
            jax.block_until_ready(jax.jit(total)())
    finally:
        os.dup2(output, 1)
        os.close(output)


def join(
    hosts: Hosts,
    devices: int | None = None,
    checkpoints: Sequence[Path] = (),
    policy: Policy = "fail",
    same: Same = dict,
) -> int:
    """Makes this process one of several hosts, before JAX starts its backend. Waits until all of them are there.

    Before, it is checked that they reach each other, and that code, settings, options, inputs and checkpoints are the
    same (`preflight`, `agreement`). From then on a host that is gone ends the others with one line, or they begin anew
    without it (`lifeline`).

    Args:
      hosts: which hosts, and which of them this is.
      devices: how many devices all CPU hosts have together; None for one each.
      checkpoints: what will be loaded.
      policy: what happens when a host is gone; host 0 decides for all.
      same: finds out what else has to be the same on all hosts, such as options and inputs.

    Returns:
      The number of this host; 0 where there is one host only.

    Raises:
      AstraError: the options do not fit, a port is in use, not all hosts came in time, or they differ.
    """
    global _membership
    if _again:
        hosts = dataclasses.replace(hosts, coordinator=_again.coordinator, hosts=_again.hosts, host=_again.host)
        if hosts.hosts == 1:
            return 0
    hosts = detect(hosts)
    check(hosts)
    if hosts.coordinator is None:
        return 0
    assert hosts.hosts is not None and hosts.host is not None
    if _XLA_FLAGS not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_XLA_FLAGS}"
    # By itself JAX aborts a process, with a page of its own logs, when another one is gone.
    jax.config.update("jax_enable_recoverability", True)
    jax.config.update("jax_enable_preemption_service", False)
    were = _again.were if _again else hosts.hosts
    share, rest = divmod(devices or were, were)
    if rest:
        raise AstraError(f"--devices {devices} cannot be shared equally by {were} hosts: use a multiple of them")
    jax.config.update("jax_num_cpu_devices", share)
    address, port = parse_address(hosts.coordinator, hosts.insecure_public)
    _membership = _gather(hosts, checkpoints, policy, were, same)
    atexit.register(_at_exit)
    _abort_slowly()
    _gloo_at(_membership.address)
    _past_proxies(address)
    with _within(max(hosts.start_seconds, hosts.patience), f"JAX did not connect the hosts at {address}:{port + 1}"):
        jax.distributed.initialize(
            coordinator_address=f"{address}:{port + 1}",
            num_processes=hosts.hosts,
            process_id=hosts.host,
            cluster_detection_method="deactivate",
            initialization_timeout=GIVE_UP_SECONDS,
            heartbeat_timeout_seconds=GIVE_UP_SECONDS,
            coordinator_bind_address=f"{address}:{port + 1}",  # JAX by itself takes all addresses of the host
        )
    return hosts.host


def _past_proxies(address: str) -> None:
    """Lets gRPC, by which JAX connects the hosts, go to host 0 straight, as the preflight did. Only gRPC reads these
    variables; those that others read, as downloads do, stay."""
    without = os.environ.get(_NO_PROXY) or os.environ.get("no_proxy")
    os.environ[_NO_PROXY] = f"{without},{address}" if without else address
    os.environ.pop("GRPC_ADDRESS_HTTP_PROXY", None)
    jax.config.update("jax_check_proxy_envs", False)  # or JAX warns of the others


@contextlib.contextmanager
def _within(seconds: float, otherwise: str) -> Iterator[None]:
    """Ends this host, and so all, where what is done within takes longer; XLA by itself aborts with pages of logs."""
    timer = threading.Timer(seconds, lambda: abandon(f"{otherwise} within {seconds:g} s: is a firewall between them?"))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _gather(hosts: Hosts, checkpoints: Sequence[Path], policy: Policy, were: int, same: Same) -> Membership:
    """Meets the other hosts at host 0, to stay connected with them."""
    assert hosts.coordinator is not None
    again = partial(_begin_again, hosts.coordinator, were)
    own = own_address(*parse_address(hosts.coordinator, hosts.insecure_public))
    if hosts.host:
        line, verdict = take_part(hosts, checkpoints, same)
        if verdict["do"] == "again":
            again(verdict["why"], int(verdict["hosts"]), int(verdict["host"]))
        if verdict["do"] == "end":
            raise AstraError(verdict["why"])
        slow = QUEUE_BITS / number(verdict.get("rate"), 1, 1e15)
        to_host_0 = Lifeline({0: line}, hosts.host, hosts.patience + slow, again=again)
        return Membership(to_host_0, hosts.coordinator, own, Findings(), slow)
    gathered = gather(hosts, checkpoints, BRIEFLY, same)
    findings, others = gathered.findings, [member for member in gathered.members if member.about.host]
    if why := "; ".join(findings.problems):
        if policy != "fail" and len(findings.problems) == len(gathered.absent):
            left = others if policy == "shrink" else []
            for n, member in enumerate(left, 1):
                member.line.send(do="again", why=why, hosts=1 + len(left), host=n)
            for member in others if policy == "single" else []:
                member.line.send(do="end", why=f"{why}; host 0 goes on alone")
            again(why, 1 + len(left), 0)
        gathered.tell(do="end", why=why)
        raise AstraError(why)
    rate = findings.slowest.rate if findings.slowest and findings.slowest.rate else 1e9
    gathered.tell(do="go", rate=rate)
    print_table("pairs", pair_rows(findings.pairs))
    lines, slow = {member.about.host: member.line for member in others}, QUEUE_BITS / rate
    to_all = Lifeline(lines, 0, hosts.patience + slow, policy, again=again)
    return Membership(to_all, hosts.coordinator, own, findings, slow)


def membership() -> Membership | None:
    """This process as one of several hosts; None where it is not."""
    return _membership


def need(needed: bool) -> None:
    """On host 0: whether the others are needed from now on (`Lifeline.need`)."""
    if _membership is not None:
        _membership.lifeline.need(needed)


def again() -> Again | None:
    """What happened where this program began anew without a host that is gone; None where it did not."""
    return _again


class Torn(Exception):
    """This host failed while others wait for it within a collective, where nothing reaches them."""


def agreed(
    work: Callable[[], Result], exchanges: bool, tell: Callable[[Result], Any] = lambda result: None
) -> tuple[Result, list[Any]]:
    """What `work` gives, once it has gone well on all hosts, which all have to call this in the same order. So no host
    goes on to a collective that another one does not come to.

    Args:
      exchanges: whether hosts wait for each other within `work`.
      tell: what is told of the result to host 0; JSON must be able to say it.

    Returns:
      The result of this host, and on host 0 what each host told of its own.

    Raises:
      AstraError: on all hosts, where `work` failed on any: how, and on which.
      Torn: it failed here, and other hosts are left waiting in a collective.
    """
    if _membership is None:
        result = work()
        return result, [tell(result)]
    failure: Exception | None = None
    try:
        result = work()
        mine = {"told": tell(result)}
    except Exception as error:
        failure, mine = error, {"failed": reason(error)}
    lifeline, seconds = _membership.lifeline, TORN_SECONDS + _membership.slow if failure and exchanges else None
    try:
        found = lifeline.gather(mine, seconds)
        failed = lifeline.spread(found and _failed(found), seconds)
    except TimeoutError:
        raise Torn(mine["failed"]) from failure
    if failed or failure:
        raise AstraError(str(failed or mine["failed"])) from failure
    return result, [one.get("told") for one in found or ()]


def reason(error: Exception) -> str:
    """An error in a line."""
    kind = "" if isinstance(error, AstraError) else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error).split())[:1000]}"


def _failed(found: Sequence[Any]) -> str:
    """How what hosts did failed: on host 0, or else on the first where it did; empty where it went well on all."""
    for host, one in enumerate(found):
        if not isinstance(one, dict) or "told" not in one:
            why = str(one.get("failed"))[:2000] if isinstance(one, dict) else "it did not say what it did"
            return f"host {host}: {why}" if host else why
    return ""


def say_read(what: str, inputs: Any) -> None:
    """Where this is one of several hosts: ends all of them where they have not read the same. Waits for nobody.

    Args:
      what: what these inputs are called.
      inputs: arrays.
    """
    if _membership is not None:
        _membership.lifeline.say_read(f"{what} (hash {fingerprint(inputs)})")


def leave() -> None:
    """Ends what `join` began, once all hosts are done."""
    global _membership
    if _membership is not None:
        _membership.lifeline.close(jax.distributed.shutdown)
        _membership = None


def _at_exit() -> None:
    """Where nobody called `leave`: a program that ends with an error must not be waited for."""
    error = getattr(sys, "last_value", None)
    if error is not None:
        lost(error)
    leave()


def abandon(message: str, a_fault: bool = False) -> None:
    """Where this is one of several hosts: tells the others why it ends, and ends it.

    Args:
      a_fault: whether it is one of this host alone, and not of what it was told to do.
    """
    if _membership is not None:
        _membership.lifeline.abandon(message, a_fault)
        die(message)


def lost(error: BaseException) -> None:
    """Where this is one of several hosts, after an unexpected error, which mostly is that another host is gone: gives
    the lifeline time to say which one (it ends the process), or else tells the others and ends it."""
    if _membership is not None:
        time.sleep(VERDICT_SECONDS + _membership.slow)
        abandon(first_line(error), a_fault=True)


def open_mesh(
    devices: str | None,
    hosts: Hosts,
    default: str = "1",
    checkpoints: Sequence[Path] = (),
    policy: Policy = "fail",
    to_run: bool = True,
    same: Same = dict,
) -> Mesh:
    """The mesh that `--devices` picks, on this host or on several, of which only host 0 prints and writes from now on.

    Args:
      devices: N or DxN; None for all that several hosts have, or else for `default`.
      checkpoints, policy, same: see `join`.
      to_run: see `astra_jax.mesh.sharding.make_mesh`.

    Raises:
      AstraError: see `join` and `astra_jax.mesh.sharding.make_mesh`; or the hosts cannot share so many devices equally.
    """
    data, N = parse_devices(devices or default)
    host = join(hosts, data * N if devices else None, checkpoints, policy, same)
    if host:
        be_quiet(f"host {host}: done; the answer is on host 0")
    if _again and devices:  # every host has as many as before
        N, rest = divmod(data * N // _again.were * _again.hosts, data)
        if rest:
            raise AstraError(f"--devices {devices}: what is left on {_again.hosts} hosts cannot be shared by {data}")
    if devices is None and jax.distributed.is_initialized():
        N = jax.device_count()
    mesh = make_mesh(N, data, to_run=to_run)
    if mesh.is_multi_process:
        _meet(mesh)
    return mesh
