"""Workers on slow, lossy, changing and unequal links and hosts: what each does to the time of an answer, measured.

    make network

Hosts of the lab, with a share of a core each, run `astra worker`; a program on host 0 asks them for one picture after
the other, and where a row compares, in turns with workers that are one host alone. A time is that of the pass, as host
0 measures it. What was measured of this code is kept in build/network and not measured anew: remove a file of it for
that. Needs root, a machine with two cores that does nothing else, and a quarter of an hour.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

import checkpoints
from astra_jax.cli.arguments import parse
from astra_jax.cli.main import guarded
from astra_jax.errors import AstraError
from astra_jax.files import write_atomically
from astra_jax.report import Report
from eval import plots
from eval.cost.workload import Setting, open_workload
from eval.network.lab import Lab
from eval.network.model import parse_rate
from eval.reports.lab import folder_of
from eval.reports.tables import Rows, insert, markdown

HOSTS, CPU, RATE = 4, 0.4, "10mbit"  # of a core each, which leaves a fifth of two cores to the links between them
GROUPS = (1, 32)
LOSSES = (0.0, 0.05, 0.2)
REQUESTS, FAST = 50, "100mbit"  # of which the middle half are asked over a slow link
SLOW = "500kbit"
UNEQUAL = (0.4, 0.1, 0.4, 0.4)  # of a core
SPLITS = 16  # requests in which hosts learn how fast they are
WARM = 2  # answers before any that is measured
ANSWER_SECONDS = 600

# What asks, on host 0: a line of standard input is a checkpoint and an invitation, one of its output the answer.
ASK = """
import dataclasses, json, sys
from pathlib import Path
from astra_jax.hosts.invitation import Invitation
from eval.service.client import ask
from eval.service.requests import Request
picture = Path(sys.argv[1])
request = Request((picture.name,), (picture.read_bytes(),))
for line in sys.stdin:
    checkpoint, invitation = json.loads(line)
    said = ask(Invitation.read(invitation, None), Path(checkpoint), request)
    print(json.dumps({type(part).__name__: dataclasses.asdict(part) for part in said}), flush=True)
"""


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of the report."""

    model: str = "vit-base"
    """A ViT whose architecture is known."""
    tokens: int | None = 1024
    """T of the first table."""
    fewer_tokens: int | None = 256
    """T of the others."""
    repeats: int = 7
    """How often each pass is measured."""
    requests: int = REQUESTS
    """How many pictures are asked for while the rate of a link changes."""
    folder: Path = Path("build/network")
    """Where measurements are kept."""
    markdown: Path | None = None
    """Also put the tables into this file, between its marks, and a plot beside it."""


class Asker:
    """Asks workers of a lab."""

    def __init__(self, lab: Lab, picture: Path):
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = lab.start(0, [sys.executable, "-c", ASK, str(picture)], **pipes)

    def __call__(self, checkpoint: Path, invitation: str) -> dict[str, Any]:
        """The parts of an answer by their kinds. Raises AstraError where there is none."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(checkpoint), invitation]) + "\n")
        self._process.stdin.flush()
        if not (line := self._process.stdout.readline()):
            raise AstraError("the workers did not answer: what was printed says why")
        return dict(json.loads(line))


def made(args: Args, tokens: int | None, groups: int, codec: str, folder: Path) -> Path:
    """A checkpoint with random weights and codebooks: times do not depend on them."""
    work = open_workload(args.model, tokens, None, jnp.float32)
    work = dataclasses.replace(work, config=dataclasses.replace(work.config, num_channels=3))
    work = work.of(Setting("astra", HOSTS, groups, codec=codec))
    model = work.model(work.weights(), groups)
    size = {"height": work.config.side, "width": work.config.side}
    labels = tuple(f"class {i}" for i in range(work.config.num_labels))
    path = folder / f"{codec}-{groups}"
    meta = checkpoints.Checkpoint(
        work.family, work.config, model.astra, labels, {"size": size}, {}, "float32", (), model
    )
    checkpoints.save(path, meta)
    return path


def picture(args: Args, tokens: int | None, folder: Path) -> Path:
    """A picture that the model reads as it is; smooth, so that its file is small."""
    side = open_workload(args.model, tokens, None, jnp.float32).config.side
    row = np.linspace(0, 255, side).astype(np.uint8)
    Image.fromarray(np.stack(np.broadcast_arrays(row, row[:, None], row[::-1]), -1)).save(folder / "picture.png")
    return folder / "picture.png"


def workers(lab: Lab, checkpoint: Path, hosts: Sequence[int], *options: str, port: int = 7777) -> str:
    """Starts workers on hosts, host 0 first; returns the invitation once all of them can take part."""
    run = [sys.executable, "-m", "astra_jax.cli.main", "worker", str(checkpoint)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True}
    first = lab.start(0, [*run, "--listen", f"{lab.address(0)}:{port}", *options], **pipes)
    invitation = _said(first, "ready: ").split()[-1]
    for worker in [lab.start(host, [*run, "--join", invitation], **pipes) for host in hosts[1:]]:
        _said(worker, "ready; UDP port")
    return invitation


def _said(process: subprocess.Popen[str], text: str) -> str:
    """The line of a worker's with this text."""
    assert process.stdout is not None
    for line in iter(process.stdout.readline, ""):
        if text in line:
            return line
    raise AstraError("a worker ended before it was ready: what was printed says why")


@contextmanager
def asking(image: Path, rate: str = RATE, loss: float = 0.0) -> Iterator[tuple[Lab, Asker]]:
    """A lab, and what asks in it."""
    with Lab(HOSTS, parse_rate(rate), CPU, loss) as lab:
        yield lab, Asker(lab, image)


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"measured s": float(np.median(seconds)), "least s": min(seconds), "most s": max(seconds)}


def computed(answer: dict[str, Any]) -> list[float]:
    """Seconds that every host computed for an answer."""
    return [(row["total ms"] - row["waited ms"]) / 1e3 for row in answer["HostTimes"]["rows"]]


def hosts(args: Args, folder: Path) -> Rows:
    """Several hosts and one, in turns."""
    rows: Rows = []
    for groups in GROUPS:
        checkpoint = made(args, args.tokens, groups, "vq", folder)
        with asking(picture(args, args.tokens, folder)) as (lab, ask):
            several = workers(lab, checkpoint, range(HOSTS))
            alone = workers(lab, checkpoint, [0], port=8888)
            answers = [[ask(checkpoint, where) for where in (several, alone)] for _ in range(WARM + args.repeats)]
        together, single = zip(*answers[WARM:], strict=True)
        ours, one = ([a["PassTime"]["seconds"] for a in part] for part in (together, single))
        allowed = float(np.median(one)) / float(np.median([max(computed(a)) for a in together]))
        faster = float(np.median(one) / np.median(ours))
        rows.append(
            {"G": groups, "one host s": float(np.median(one)), **summary(ours), "times faster": faster}
            | {"compute alone allows": allowed, "of that %": 100 * faster / allowed}
        )
    return rows


def losses(args: Args, folder: Path) -> Rows:
    """Packets that are dropped, where codes are waited for and where they are done without, in turns."""
    rows, tokens = list[dict[str, Any]](), args.fewer_tokens
    checkpoint = made(args, tokens, GROUPS[-1], "vq", folder)
    with asking(picture(args, tokens, folder), loss=LOSSES[-1]) as (lab, ask):
        for host in range(HOSTS):
            lab.set_packet_loss(host, 0.0)
        late = {
            how: workers(lab, checkpoint, range(HOSTS), "--late", how, port=port)
            for how, port in (("wait", 7777), ("predict", 8888))
        }
        for loss in LOSSES:
            for host in range(HOSTS):
                lab.set_packet_loss(host, loss)
            answers = [{how: ask(checkpoint, where) for how, where in late.items()} for _ in range(WARM + args.repeats)]
            rows += [lossy(loss, how, [answer[how] for answer in answers[WARM:]]) for how in late]
    for row in rows:
        row["times as long as without losses"] = row["measured s"] / rows[0]["measured s"]
    return rows


def lossy(loss: float, late: str, answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A row of these answers; packets are counted over all hosts, for one of them."""
    of_hosts = [row for answer in answers for row in answer["HostTimes"]["rows"]]
    counts = {name: sum(row[name] for row in of_hosts) / len(answers) for name in ("sent again", "missing")}
    return {"dropped": f"{loss:.0%}", "--late": late, **summary([a["PassTime"]["seconds"] for a in answers]), **counts}


def rates(args: Args, folder: Path) -> Rows:
    """A request after the other, while the links of all hosts change from fast to slow and back."""
    checkpoint, rows = made(args, args.fewer_tokens, GROUPS[-1], "nested-pq", folder), []
    with asking(picture(args, args.fewer_tokens, folder), FAST) as (lab, ask):
        invitation = workers(lab, checkpoint, range(HOSTS))
        for number in range(WARM + args.requests):
            at = number - WARM
            rate = SLOW if args.requests // 4 <= at < 3 * args.requests // 4 else FAST
            for host in range(HOSTS):
                lab.set_rate(host, parse_rate(rate))
            answer = ask(checkpoint, invitation)
            left_out = sum(row["left out"] for row in answer["HostTimes"]["rows"])
            rows.append({"request": at, "rate": rate, "s": answer["PassTime"]["seconds"], "left out": left_out})
        steady = []
        for host in range(HOSTS):
            lab.set_rate(host, parse_rate(RATE))
        for _ in range(args.repeats + WARM):
            answer = ask(checkpoint, invitation)
            left_out = sum(row["left out"] for row in answer["HostTimes"]["rows"])
            steady.append({"request": None, "rate": RATE, "s": answer["PassTime"]["seconds"], "left out": left_out})
    return rows[WARM:] + steady[WARM:]


def by_rate(rows: Rows, requests: int) -> Rows:
    """A row for every stretch of requests at one rate."""
    steady = [row for row in rows if row["request"] is None]
    quarter = requests // 4
    asked = [row for row in rows if row["request"] is not None]
    stretches = [asked[:quarter], asked[quarter : 3 * quarter], asked[3 * quarter :], steady]
    middle = float(np.median([row["s"] for row in steady]))
    return [
        {"rate": part[0]["rate"], "requests": len(part), **summary([row["s"] for row in part])}
        | {"packets left out of each": sum(row["left out"] for row in part) / len(part)}
        | {f"most, times {RATE}": max(row["s"] for row in part) / middle}
        for part in stretches
        if part
    ]


def unequal(args: Args, folder: Path) -> Rows:
    """Hosts of which one is slower: how the split is learned."""
    checkpoint, rows = made(args, args.fewer_tokens, 1, "vq", folder), []
    with asking(picture(args, args.fewer_tokens, folder)) as (lab, ask):
        invitation = workers(lab, checkpoint, range(HOSTS))
        for host, cpu in enumerate(UNEQUAL):
            lab.set_cpu(host, cpu)
        for number in range(SPLITS):
            answer = ask(checkpoint, invitation)
            of_hosts = answer["HostTimes"]["rows"]
            rows.append(
                {"request": number, "s": answer["PassTime"]["seconds"]}
                | {"compiled s": answer["PassTime"]["first_seconds"]}
                | {f"tokens % of host {row['host']}": row["tokens %"] for row in of_hosts}
                | {"slowest computes s": max(computed(answer)), "fastest s": min(computed(answer))}
            )
    return rows


# Name of a table -> its title, and what measures its rows.
SECTIONS: dict[str, tuple[str, Callable[[Args, Path], Rows]]] = {
    "hosts": (f"{HOSTS} hosts with {CPU} of a core each, {RATE}", hosts),
    "losses": (f"packets that are dropped, G={GROUPS[-1]}", losses),
    "rates": (f"links that change from {FAST} to {SLOW} and back", rates),
    "unequal": (f"hosts with {', '.join(map(str, UNEQUAL))} of a core", unequal),
}


def main(args: Args) -> None:
    """Measures, and prints and writes the tables."""
    report, folder = Report("network"), folder_of(args.folder, args.model)
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Rows] = {}
    for name, (title, measure) in SECTIONS.items():
        size = args.tokens if name == "hosts" else args.fewer_tokens
        kept = folder / f"{name}-{args.model}-{size}-{args.repeats}-{args.requests}.json"
        if not kept.exists():
            with tempfile.TemporaryDirectory(prefix="astra") as scratch:
                write_atomically(kept, json.dumps(measure(args, Path(scratch)), indent=1))
        found[name] = list(json.loads(kept.read_text(encoding="utf8")))
        rows = by_rate(found[name], args.requests) if name == "rates" else found[name]
        report.table(name, title, rows)
        if args.markdown:
            insert(args.markdown, name, markdown(rows), "make network")
    if args.markdown:
        plot = args.markdown.with_suffix(".png")
        plots.changing_rates(found["rates"], plot)
        report.say(f"tables: {args.markdown}; plot: {plot}")
    report.close()


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(parse(Args, description=__doc__))))
