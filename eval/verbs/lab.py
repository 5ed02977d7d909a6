"""Run a command on several hosts with slow links and slow CPUs, which are made of one Linux machine.

    astra lab run --hosts 4 --rate 10mbit --cpu 0.4 --packet-loss 5% -- astra run CHECKPOINT --image cat.png \\
      --coordinator {coordinator} --hosts {hosts} --host {host}

In COMMAND, {host} becomes the number of the host, {hosts} how many there are, and {coordinator} an address and port of
host 0. Needs root, iproute2, nftables and util-linux. What a host is stands in network/lab.py.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from astra_jax.errors import AstraError
from astra_jax.report import Report
from eval.network.lab import Lab, parse_packet_loss
from eval.network.model import parse_rate


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of `astra lab`."""

    what: Annotated[Literal["run"], tyro.conf.Positional]
    """Run COMMAND on every host at once; the exit code is that of host 0."""
    rate: str
    """Rate of every host's link, in both directions, such as 10mbit; or of each, such as 100mbit,100mbit,10mbit."""
    command: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="-- COMMAND")] = ()
    """What every host runs. {host}, {hosts} and {coordinator} in it are replaced."""
    hosts: int = 4
    """How many hosts there are."""
    cpu: float | None = None
    """How much of one core every host has, such as 0.4; by default all hosts share all cores."""
    packet_loss: str = "0%"
    """How many of the packets that arrive at a host are lost, such as 5%."""
    json: Path | None = None
    """Also write exit codes, seconds and bytes of every host to this file."""


def main(args: Args) -> None:
    """Runs `astra lab run`."""
    if not args.command:
        raise AstraError("there is nothing to run: give a command after --, such as -- hostname")
    report = Report("lab", args.json)
    rates = [parse_rate(rate) for rate in args.rate.split(",")]
    rate, packet_loss = rates[0] if len(rates) == 1 else rates, parse_packet_loss(args.packet_loss)
    with Lab(args.hosts, rate, args.cpu, packet_loss) as lab:
        ended = lab.run(args.command)
    columns = ("exit code", "seconds", "bytes sent", "bytes received")
    rows = [{"host": host, **dict(zip(columns, end, strict=True))} for host, end in enumerate(ended)]
    report.table("hosts", f"{args.hosts} hosts at {args.rate}", rows)
    report.close()
    if ended[0].code:
        sys.exit(ended[0].code)
