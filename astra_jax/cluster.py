"""Several hosts as one mesh: `jax.distributed`, with the addresses and time limits that slow links need.

The same command is started on every host. JAX does the rest: its coordination service on host 0 tells the hosts of each
other, and collectives run over gloo (CPU), NCCL (GPU) or ICI (TPU). Neither authenticates or encrypts anything.
"""

import atexit
import dataclasses
import ipaddress
import math
import os
import re
import socket
import sys
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import distributed, xla_bridge  # JAX has no public way to say where gloo binds
from jax.experimental import multihost_utils
from jax.extend.backend import register_backend_factory
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxlib import _jax

from astra_jax import __version__
from astra_jax.collectives import Peers
from astra_jax.console import be_quiet
from astra_jax.errors import AstraError
from astra_jax.lifeline import BEAT_SECONDS, Lifeline, die
from astra_jax.sharding import SEQ, make_mesh, parse_devices

# What JAX and XLA give up after: never, as it were. That a slow link is no dead host is for the lifeline to know.
GIVE_UP_SECONDS = 24 * 3600
_XLA_FLAGS = (
    f"--xla_cpu_collective_timeout_seconds={GIVE_UP_SECONDS}"
    f" --xla_cpu_collective_call_terminate_timeout_seconds={GIVE_UP_SECONDS}"
    f" --xla_cpu_collective_call_warn_stuck_timeout_seconds={GIVE_UP_SECONDS}"
)

VERDICT_SECONDS = 1.5  # what the lifeline may take to say which host is gone, after an error that does not

_lifeline: Lifeline | None = None  # of this process, while it is one of several hosts

# Variables by which JAX finds out by itself that it was started on several hosts: Open MPI, Slurm, Kubernetes (JobSet).
_DETECTED = ("OMPI_MCA_orte_hnp_uri", "SLURM_STEP_NODELIST", "JOBSET_NAME")


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Which hosts run a command together; nothing where there is one, or where JAX detects the cluster."""

    coordinator: str | None = None
    """Address of host 0 and a port, such as 10.0.0.1:7777; it and the next one must be free. The same on every host."""
    hosts: int | None = None
    """How many hosts there are."""
    host: int | None = None
    """Which of them this one is, from 0. Host 0 prints the answer."""
    start_seconds: float = 60.0
    """How long hosts wait for each other to start."""
    patience: float = 30.0
    """Seconds without a sign of life after which a host counts as gone."""
    insecure_public: bool = False
    """Allow an address of the public internet, where anybody could read and change what is sent."""


def parse_address(text: str, allow_public: bool) -> tuple[str, int]:
    """`"10.0.0.1:7777"` -> ("10.0.0.1", 7777); a name becomes its IPv4 address.

    Raises:
      AstraError: it is no address with a port, the name is not known, or it is public.
    """
    match = re.fullmatch(r"([\w.-]+):(\d{1,5})", text.strip())
    if not match or not 0 < int(match[2]) < 65535:  # the next port is used, too
        raise AstraError(f"--coordinator is {text!r}; write the address of host 0 and a port, such as 10.0.0.1:7777")
    try:
        address = socket.getaddrinfo(match[1], None, socket.AF_INET)[0][4][0]
    except OSError:
        raise AstraError(f"--coordinator: the host {match[1]!r} is not known here: give its IP address") from None
    if ipaddress.ip_address(address).is_global and not allow_public:
        raise AstraError(
            f"--coordinator: {address} is a public address, and nothing that hosts send is protected: use a private "
            "network (WireGuard, say), or add --insecure-public"
        )
    return str(address), int(match[2])


def own_address(coordinator: str, port: int) -> str:
    """The address of this host on the way to the coordinator. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((coordinator, port))
        return str(probe.getsockname()[0])


def check(hosts: Hosts) -> None:
    """Raises AstraError unless either all or none of coordinator, hosts and host are given, and fit each other."""
    given = {"--coordinator": hosts.coordinator, "--hosts": hosts.hosts, "--host": hosts.host}
    missing = [option for option, value in given.items() if value is None]
    if len(missing) == len(given):
        return
    if missing:
        raise AstraError(f"several hosts need --coordinator, --hosts and --host: {' and '.join(missing)} is missing")
    assert hosts.hosts is not None and hosts.host is not None
    if hosts.hosts < 1:
        raise AstraError(f"--hosts is {hosts.hosts}; it must be at least 1")
    if not 0 <= hosts.host < hosts.hosts:
        raise AstraError(f"--host is {hosts.host}; with --hosts {hosts.hosts} it is from 0 to {hosts.hosts - 1}")
    if not 0 < hosts.start_seconds < math.inf:
        raise AstraError(f"--start-seconds is {hosts.start_seconds:g}; it must be above 0: try 60")
    if not 2 * BEAT_SECONDS <= hosts.patience < math.inf:
        raise AstraError(f"--patience is {hosts.patience:g}; it must be at least {2 * BEAT_SECONDS:g} seconds: try 30")


def _gloo_at(address: str) -> None:
    """Lets gloo bind this address. By itself it binds what the host name resolves to, which on Debian is 127.0.1.1."""

    def make() -> Any:
        collectives = _jax.make_gloo_tcp_collectives(distributed.global_state.client, hostname=address)
        return xla_bridge.make_cpu_client(collectives)

    register_backend_factory("cpu", make, priority=0, fail_quietly=False)


def _meet(mesh: Mesh) -> None:
    """The first collectives, which connect the hosts with each other. gloo says so on the output: not here."""
    total = jax.shard_map(
        lambda: Peers(SEQ).total(jnp.zeros(())), mesh=mesh, in_specs=(), out_specs=P(), check_vma=False
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


def join(hosts: Hosts, devices_per_host: int = 1) -> int:
    """Makes this process one of several hosts, before JAX starts its backend. Waits until all of them are there.

    From then on a host that is gone ends the others with one line (`astra_jax.lifeline`).

    Args:
      hosts: which hosts, and which of them this is.
      devices_per_host: how many devices a CPU host has.

    Returns:
      The number of this host; 0 where there is one host only.

    Raises:
      AstraError: the options do not fit, the port is in use, not all hosts came in time, or their versions differ.
    """
    global _lifeline
    check(hosts)
    detected = hosts.coordinator is None and any(name in os.environ for name in _DETECTED)
    if hosts.coordinator is None and not detected:
        return 0
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_XLA_FLAGS}"
    jax.config.update("jax_num_cpu_devices", devices_per_host)
    # By itself JAX aborts a process, with a page of its own logs, when another one is gone.
    jax.config.update("jax_enable_recoverability", True)
    jax.config.update("jax_enable_preemption_service", False)
    start = partial(jax.distributed.initialize, heartbeat_timeout_seconds=GIVE_UP_SECONDS)
    if detected:
        start()
        address, port = parse_address(str(distributed.global_state.coordinator_address), hosts.insecure_public)
        count, host, watched = jax.process_count(), jax.process_index(), port + 1
    else:
        assert hosts.coordinator is not None and hosts.hosts is not None and hosts.host is not None
        address, port = parse_address(hosts.coordinator, hosts.insecure_public)
        count, host, watched = hosts.hosts, hosts.host, port
    facts = {"astra": __version__, "jax": jax.__version__, "hosts": str(count)}
    _lifeline = Lifeline(address, watched, count, host, facts, hosts.start_seconds, hosts.patience)
    atexit.register(_at_exit)
    if not detected:
        _gloo_at(address if host == 0 else own_address(address, port))
        bound = f"{address}:{port + 1}"
        # Bound to this address alone: JAX by itself takes all addresses of the host.
        start(bound, count, host, cluster_detection_method="deactivate", coordinator_bind_address=bound)
    return host


def leave() -> None:
    """Ends what `join` began, once all hosts are done."""
    global _lifeline
    if _lifeline is not None:
        _lifeline.close(jax.distributed.shutdown)
        _lifeline = None


def _at_exit() -> None:
    """Where nobody called `leave`: a program that ends with an error must not be waited for."""
    error = getattr(sys, "last_value", None)
    if error is not None:
        lost(error)
    leave()


def abandon(message: str) -> None:
    """Where this is one of several hosts: tells the others why it ends, and ends it."""
    if _lifeline is not None:
        _lifeline.abandon(message)
        die(message)


def lost(error: BaseException) -> None:
    """Where this is one of several hosts, after an unexpected error, which mostly is that another host is gone: gives
    the lifeline time to say which one (it ends the process), or else tells the others and ends it."""
    if _lifeline is not None:
        time.sleep(VERDICT_SECONDS)
        abandon(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def open_mesh(devices: str | None, hosts: Hosts, default: str = "1") -> Mesh:
    """The mesh that `--devices` picks, on this host or on several, of which only host 0 prints and writes from now on.

    Args:
      devices: N or DxN; None for all that several hosts have, or else for `default`.

    Raises:
      AstraError: see `join` and `astra_jax.sharding.make_mesh`; or the hosts cannot share so many devices equally.
    """
    data, N = parse_devices(devices or default)
    per_host, rest = divmod(data * N, hosts.hosts or 1) if devices else (1, 0)
    if rest:
        raise AstraError(f"--devices {devices} cannot be shared equally by {hosts.hosts} hosts: use a multiple of them")
    host = join(hosts, per_host)
    if host:
        be_quiet(f"host {host}: done; the answer is on host 0")
    if devices is None and jax.distributed.is_initialized():
        N = jax.device_count()
    mesh = make_mesh(N, data)
    if mesh.is_multi_process:
        _meet(mesh)
    return mesh
