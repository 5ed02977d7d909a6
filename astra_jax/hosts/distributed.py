"""Several hosts as one mesh: `jax.distributed`, for those of a TPU slice or of a cluster with a fast, private network.

The same command is started on every host. JAX does the rest: its coordination service on host 0 tells the hosts of each
other, and collectives run over ICI (TPU), NCCL (GPU) or gloo (CPU). None of them authenticates or encrypts anything,
and a host that is gone ends the others, with JAX's own words. Hosts on ordinary networks are a `Company`.
"""

import contextlib
import dataclasses
import ipaddress
import json
import os
import re
import socket
import sys
from typing import Any

import jax
import numpy as np
from jax._src.distributed import global_state  # JAX has no public way to count hosts before its backend starts
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from astra_jax.errors import AstraError, first_line
from astra_jax.hosts.agreement import Same, differences, fingerprint, settings, versions
from astra_jax.mesh.sharding import make_mesh, parse_devices
from astra_jax.report import be_quiet

START_SECONDS = 300  # that hosts wait for each other to start
AUTO = "auto"  # as a coordinator
WAIT_SECONDS = 24 * 3600  # that hosts which are done wait for one that goes on with a text, say


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The hosts of a TPU slice or of a cluster, as one mesh; those of ordinary networks are for `astra worker`."""

    coordinator: str | None = None
    """Address of host 0 and a free port, such as 10.0.0.1:7777; or auto, where Cloud TPU, Slurm, mpirun or Kubernetes
    started the hosts."""
    hosts: int | None = None
    """How many hosts there are."""
    host: int | None = None
    """Which of them this one is, from 0. Host 0 prints the answer."""

    def devices(self, default: int) -> int:
        """How many devices all have, one each, where --devices does not say it.

        Raises:
          AstraError: how many hosts there are is not known yet.
        """
        if self.coordinator == AUTO:
            raise AstraError("--coordinator auto does not say how many devices there are: add --devices")
        return self.hosts or default


def check(hosts: Hosts) -> None:
    """Raises AstraError unless either all or none of coordinator, hosts and host are given, and fit each other."""
    given = {"--coordinator": hosts.coordinator, "--hosts": hosts.hosts, "--host": hosts.host}
    missing = [option for option, value in given.items() if value is None]
    if len(missing) == len(given):
        return
    if hosts.coordinator == AUTO:
        if len(missing) < 2:
            raise AstraError("--coordinator auto finds out --hosts and --host: leave them out")
        return
    if missing:
        raise AstraError(f"several hosts need --coordinator, --hosts and --host: {' and '.join(missing)} is missing")
    assert hosts.hosts is not None and hosts.host is not None
    if hosts.hosts < 1:
        raise AstraError(f"--hosts is {hosts.hosts}; it must be at least 1")
    if not 0 <= hosts.host < hosts.hosts:
        raise AstraError(f"--host is {hosts.host}; with --hosts {hosts.hosts} it is from 0 to {hosts.hosts - 1}")


def parse_address(text: str) -> tuple[str, int]:
    """`"10.0.0.1:7777"` -> ("10.0.0.1", 7777); a name becomes its IPv4 address.

    Raises:
      AstraError: it is no address with a port, the name is not known, or it is public.
    """
    match = re.fullmatch(r"([\w.-]+):([0-9]{1,5})", text.strip(), re.ASCII)
    if not match or not 0 < int(match[2]) < 65536:
        raise AstraError(f"--coordinator is {text!r}; write the address of host 0 and a port, such as 10.0.0.1:7777")
    try:
        address = str(socket.getaddrinfo(match[1], None, socket.AF_INET)[0][4][0])
    except (OSError, UnicodeError):
        raise AstraError(f"--coordinator: the host {match[1]!r} is not known here: give its IP address") from None
    if ipaddress.ip_address(address).is_global:
        raise AstraError(
            f"--coordinator: {address} is a public address, and nothing that these hosts send is protected: use a "
            "private network, or astra worker"
        )
    return address, int(match[2])


def join(hosts: Hosts, devices: int | None = None) -> int:
    """Makes this process one of several hosts, before JAX starts its backend. Waits until all of them are there.

    Args:
      hosts: which hosts, and which of them this is.
      devices: how many devices all CPU hosts have together; None for one each.

    Returns:
      The number of this host; 0 where there is one host only.

    Raises:
      AstraError: the options do not fit, or JAX does not bring the hosts together.
    """
    check(hosts)
    if hosts.coordinator is None:
        return 0
    where = dict[str, Any]()
    if hosts.coordinator != AUTO:
        _share(devices, hosts.hosts or 1)  # before anybody is waited for
        address, port = parse_address(hosts.coordinator)
        place = f"{address}:{port}"
        # JAX by itself listens at all addresses of the host.
        where = dict(coordinator_address=place, num_processes=hosts.hosts, process_id=hosts.host)
        where |= dict(coordinator_bind_address=place, cluster_detection_method="deactivate")
    try:
        jax.distributed.initialize(**where, initialization_timeout=START_SECONDS, shutdown_timeout_seconds=WAIT_SECONDS)
    except Exception as error:  # of many types
        hint = "" if where else ": where nothing started the hosts, give the address of host 0, --hosts and --host"
        raise AstraError(f"JAX did not bring the hosts together ({first_line(error)}){hint}") from error
    _keep_output()
    jax.config.update("jax_num_cpu_devices", _share(devices, global_state.num_processes))
    return int(global_state.process_id)


def _share(devices: int | None, hosts: int) -> int:
    """Of so many devices, those of each host."""
    share, rest = divmod(devices or hosts, hosts)
    if rest:
        raise AstraError(f"--devices {devices} cannot be shared equally by {hosts} hosts: use a multiple of them")
    return share


def gather(told: Any) -> list[Any]:
    """What every host tells, on all of them; JSON must be able to say it. All have to call this in the same order."""
    mine = np.frombuffer(json.dumps(told).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(mine.size))).reshape(-1)
    padded = np.pad(mine, (0, sizes.max() - mine.size))
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def agree(same: Same) -> None:
    """Finds out whether all hosts have the same; one alone is not asked.

    Args:
      same: finds out what has to be the same; may raise AstraError.

    Raises:
      AstraError: on all hosts, where one differs from host 0, or does not know what it has.
    """
    if jax.process_count() == 1:
        return
    try:
        mine: dict[str, Any] = {"same": dict(same())}
    except (AstraError, OSError) as error:
        mine = {"failed": str(error)}
    first, *others = gather(mine)
    wrong = [f"host {host}: {one['failed']}" for host, one in enumerate((first, *others)) if "failed" in one]
    if not wrong:
        found = ((host, differences(first["same"], one["same"])) for host, one in enumerate(others, 1))
        wrong = [f"on host {host}, {why}" for host, why in found if why]
    if wrong:
        leave()  # while all of them are there
        raise AstraError(f"{'; '.join(wrong)}: the hosts need the same")


def have_read(what: str, inputs: Any) -> None:
    """Raises AstraError on all hosts where they have not read the same.

    Args:
      what: what these inputs are called.
      inputs: arrays.
    """
    agree(lambda: {"data": f"{what} (hash {fingerprint(inputs)})"})


def leave() -> None:
    """Ends what `join` began, once all hosts are done."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def abandon(code: int) -> None:
    """Ends this process as one of several hosts, with an exit code, and waits for none of them: they learn of it."""
    if jax.distributed.is_initialized():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def _keep_output() -> None:
    """From now on only Python itself writes to stdout: gloo tells there whom it has met, beside the answer."""
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = open(own, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)  # noqa: SIM115


def open_mesh(devices: str | None, hosts: Hosts, default: str = "1", to_run: bool = True, same: Same = dict) -> Mesh:
    """The mesh that `--devices` picks, on this host or on several, of which only host 0 prints and writes from now on.

    Args:
      devices: N or DxN; None for all that several hosts have, or else for `default`.
      to_run: see `astra_jax.mesh.sharding.make_mesh`.
      same: finds out what has to be the same on all hosts.

    Raises:
      AstraError: see `join`, `agree` and `astra_jax.mesh.sharding.make_mesh`.
    """
    data, N = parse_devices(devices or default)
    host = join(hosts, data * N if devices else None)
    if host:
        be_quiet(f"host {host}: done; the answer is on host 0")
    if devices is None and jax.distributed.is_initialized():
        N = jax.device_count()
    mesh = make_mesh(N, data, to_run=to_run)
    if mesh.is_multi_process:
        agree(lambda: versions() | settings() | dict(same()))
    return mesh
