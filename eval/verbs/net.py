"""Whether several hosts can run a model together: code, settings, checkpoint, and the link between each pair of them.

    astra net check [MODEL] --coordinator 10.0.0.1:7777 --hosts 4 --host 0

The same on every host, with another --host; host 0 prints what was found. Round trips and rates are measured over plain
TCP, one pair at a time, and nothing of JAX is started for it. Of a checkpoint, all files must be the same everywhere.

With a MODEL, a checkpoint or a known architecture, the advice is that of `astra plan` for the slowest link: compute is
measured on host 0, every device gets its messages by itself (counting each), and an exchange takes half of the longest
round trip besides.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from astra_jax.errors import AstraError
from astra_jax.hosts.findings import Findings, pair_rows
from astra_jax.hosts.options import Hosts, detect
from astra_jax.hosts.preflight import RATE_SECONDS, check_hosts
from astra_jax.hosts.rendezvous import About
from astra_jax.report import Report, be_quiet
from eval.cost.advice import Option, candidates, reached_here, reason, usual_groups
from eval.cost.cost import cost
from eval.cost.workload import ONE, Setting, Workload, open_workload
from eval.network.devices import Devices
from eval.network.model import Link


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of `astra net`."""

    what: Annotated[Literal["check"], tyro.conf.Positional]
    """Check the hosts."""
    model: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = None
    """What is to be run: a checkpoint, or vit-base, vit-large, bert-base, gpt2-s, gpt2-m, llama-s, llama-3-8b."""
    several: Annotated[Hosts, tyro.conf.arg(name="several hosts"), tyro.conf.OmitArgPrefixes] = Hosts()
    rate_seconds: float = RATE_SECONDS
    """How long each direction of a pair is measured."""
    json: Path | None = None
    """Also write everything printed to this file."""


def host_rows(findings: Findings, N: int) -> list[dict[str, Any]]:
    """The table of hosts: who came, and whether code, versions, settings and checkpoint are those of host 0."""
    there = {about.host: about for about in findings.hosts}
    return [
        {
            "host": host,
            "address": there[host].address if host in there else None,
            "name": there[host].name if host in there else None,
            "as host 0": agreement(there[host], there.get(0)) if host in there else "did not take part",
        }
        for host in range(N)
    ]


def agreement(about: About, first: About | None) -> str:
    """Whether a host has what host 0 has: "yes", or what is different."""
    if first is None:
        return "-"
    names = [name for name in first.versions if about.versions[name] != first.versions[name]]
    names += ["checkpoint"] if about.digest != first.digest else []
    if about.same is not None and first.same is not None:
        names += [name for name in {**first.same, **about.same} if about.same.get(name) != first.same.get(name)]
    return f"no: {', '.join(names)}" if names else "yes"


def advice(work: Workload, N: int, link: Link) -> str:
    """What `astra plan` says for up to N equal devices like this one, in a sentence."""
    ways = candidates(work, Devices().of(N), usual_groups(work))
    reached = reached_here(work, [ONE, *ways])

    def option(way: Setting) -> Option:
        return Option(cost(work, way, Devices().of(way.N), reached[way.strategy, way.groups]), link)

    return reason(option(ONE), [option(way) for way in ways])


def main(args: Args) -> None:
    """Runs `astra net check`."""
    report, hosts = Report("net", args.json), detect(args.several)
    work = open_workload(args.model, None, None, "float32") if args.model else None
    if hosts.host:
        be_quiet(f"host {hosts.host}: checked; the answer is on host 0")
    findings = check_hosts(hosts, [work.checkpoint] if work and work.checkpoint else [], args.rate_seconds)
    N = hosts.hosts or 0
    report.table("hosts", "hosts", host_rows(findings, N))
    report.table("pairs", f"pairs, {args.rate_seconds:g} s of sending each way", pair_rows(findings.pairs))
    for note in findings.notes:
        report.say(note)
    slowest, round_trip = findings.slowest, findings.round_trip
    if slowest is not None and slowest.rate:
        report.say(
            f"slowest link: {slowest.rate / 1e6:,.4g} Mbps from host {slowest.source} to host {slowest.target}; "
            f"longest round trip: {1e3 * round_trip:,.4g} ms",
            slowest_mbps=slowest.rate / 1e6,
            round_trip_ms=1e3 * round_trip,
        )
        if work and not findings.problems:
            why = advice(work, N, Link(slowest.rate, round_trip / 2, "each"))
            report.say(f"{why}.", reason=why)
    report.data |= {"notes": list(findings.notes), "problems": list(findings.problems)}
    report.close()
    if findings.problems:
        raise AstraError("; ".join(findings.problems))
