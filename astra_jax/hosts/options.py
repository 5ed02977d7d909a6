"""Which hosts run a command together: the options, and the addresses by which they reach each other."""

import dataclasses
import ipaddress
import math
import os
import re
import socket
from typing import Literal

from jax._src.clusters import ClusterEnv, K8sCluster, OmpiCluster, SlurmCluster

from astra_jax.errors import AstraError
from astra_jax.hosts.connection import BEAT_SECONDS

Policy = Literal["fail", "single", "shrink"]  # what happens when another host is gone


class _OpenMpi(OmpiCluster):
    """What the variables of all versions of Open MPI say. From 0.11 on JAX asks mpi4py under Open MPI 5 instead, which
    need not be there: where host 0 is can be said by the user, and all else is in the variables."""

    opt_in_only_method = True  # not for JAX to find

    @classmethod
    def _is_ompi_5(cls) -> bool:
        return False


# Variables that say who started this process as one of several, and what knows more: all processes of mpirun and srun
# have them, and the pods of an indexed Kubernetes job.
_CLUSTERS: dict[str, type[ClusterEnv]] = {
    "OMPI_COMM_WORLD_SIZE": _OpenMpi,
    "SLURM_STEP_NODELIST": SlurmCluster,
    "JOB_COMPLETION_INDEX": K8sCluster,
}


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Which hosts run a command together; nothing where there is one, or where mpirun, Slurm or Kubernetes says it."""

    coordinator: str | None = None
    """Address of host 0 and a port, such as 10.0.0.1:7777; it and the next one must be free. The same on every host."""
    hosts: int | None = None
    """How many hosts there are."""
    host: int | None = None
    """Which of them this one is, from 0. Host 0 prints the answer."""
    start_seconds: float = 60.0
    """How long hosts wait for each other to start."""
    patience: float = 30.0
    """Seconds without a sign of life after which a host counts as gone; more on a link that is very slow."""
    insecure_public: bool = False
    """Allow an address of the public internet, where anybody could read and change what is sent."""


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


def detect(hosts: Hosts) -> Hosts:
    """Where only the coordinator is given, or nothing: the rest, as mpirun (Open MPI), Slurm or Kubernetes says it.
    Nothing where they started one process.

    Raises:
      AstraError: they do not say enough.
    """
    name = next((name for name in _CLUSTERS if name in os.environ), None)
    if name is None or hosts.hosts is not None or hosts.host is not None:
        return hosts
    cluster = _CLUSTERS[name]
    try:
        cluster.is_env_present()  # connects to Kubernetes
        found = dataclasses.replace(hosts, hosts=cluster.get_process_count(), host=cluster.get_process_id())
        if hosts.coordinator is None and found.hosts == 1:
            return hosts
        coordinator = hosts.coordinator or _coordinator(cluster)
    except Exception as error:  # those of Kubernetes are of many types
        raise AstraError(
            f"{name} is set, so this is one of several hosts, but where host 0 is was not found out "
            f"({type(error).__name__}: {error}): add --coordinator with its address and a free port, and if that is "
            "not enough --hosts and --host"
        ) from error
    local = cluster.get_local_process_id()
    if local is not None:  # as JAX does by itself: each process of a machine has one accelerator
        os.environ.setdefault("JAX_LOCAL_DEVICE_IDS", str(local))
    return dataclasses.replace(found, coordinator=coordinator)


def _coordinator(cluster: type[ClusterEnv]) -> str:
    """Address of host 0 and a port, made even, as the last of all has no next one."""
    address, _, port = cluster.get_coordinator_address(60, None).rpartition(":")
    if int(os.environ.get("SLURM_STEP_NUM_NODES", 1)) > 1 and socket.gethostbyname(address).startswith("127."):
        raise ValueError(f"{address} is {socket.gethostbyname(address)} to itself, where no other node reaches it")
    return f"{address}:{int(port) // 2 * 2}"


def parse_address(text: str, allow_public: bool) -> tuple[str, int]:
    """`"10.0.0.1:7777"` -> ("10.0.0.1", 7777); a name becomes its IPv4 address.

    Raises:
      AstraError: it is no address with a port, the name is not known, or it is public.
    """
    match = re.fullmatch(r"([\w.-]+):([0-9]{1,5})", text.strip())
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
