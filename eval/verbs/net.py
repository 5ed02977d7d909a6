"""How fast the links between workers are, and what that means for a model.

    astra net check [MODEL] --join INVITATION

`astra worker` has to run on the hosts already, with any checkpoint. Every host sends every other one a train of
packets, one way after the other; a table says at which rate they came, how long a round trip is, how many were lost.

With a MODEL, a checkpoint or a known architecture, the advice is that of `astra plan` for the slowest link and as many
hosts: compute is measured here, every host gets its messages by itself (counting each), and an exchange takes half of
the longest round trip besides.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from astra_jax.hosts.invitation import Invitation
from astra_jax.report import Report
from eval.cost.advice import Option, candidates, reached_here, reason, usual_groups
from eval.cost.cost import cost
from eval.cost.workload import ONE, Setting, Workload, open_workload
from eval.network.devices import Devices
from eval.network.model import Link
from eval.service.client import check
from eval.service.screen import Screen


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of `astra net`."""

    what: Annotated[Literal["check"], tyro.conf.Positional]
    """Check the hosts."""
    model: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = None
    """What is to be run: a checkpoint, or vit-base, vit-large, bert-base, gpt2-s, gpt2-m, llama-s, llama-3-8b."""
    join: str = dataclasses.field(kw_only=True)
    """The invitation that the first worker printed, or its address and port."""
    secret_file: Path | None = None
    """A file with the secret of the invitation; by default ASTRA_SECRET has it."""
    json: Path | None = None
    """Also write everything printed to this file."""


def advice(work: Workload, N: int, link: Link) -> str:
    """What `astra plan` says for up to N equal devices like this one, in a sentence."""
    ways = candidates(work, Devices().of(N), usual_groups(work))
    reached = reached_here(work, [ONE, *ways])

    def option(way: Setting) -> Option:
        return Option(cost(work, way, Devices().of(way.N), reached[way.strategy, way.groups]), link)

    return reason(option(ONE), [option(way) for way in ways])


def main(args: Args) -> None:
    """Runs `astra net check`."""
    report = Report("net", args.json)
    work = open_workload(args.model, None, None, "float32") if args.model else None
    found = check(Invitation.read(args.join, args.secret_file))
    Screen(report, ()).print(found)
    if found.hosts == 1:
        report.say("there is one worker alone: start others with --join")
    elif work and found.rate:
        why = advice(work, found.hosts, Link(found.rate, (found.round_trip or 0.0) / 2, "each"))
        report.say(f"{why}.", reason=why)
    report.close()
