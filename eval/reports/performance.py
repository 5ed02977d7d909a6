"""How fast all this is: hosts on slow links, long inputs, transformers beside us, how long a program takes to start.

    make bench

Measures what docs/performance.md shows and writes its tables and plots, section by section. Hosts are those of the
lab; everything else is one process on all cores of this machine. What was measured of this code is kept in
build/bench and not measured anew: remove a file of it for that. Needs root, a machine with two cores that does nothing
else, and half an hour, a third of it for tensor parallelism.

torch stands in tests alone, so that the pass of transformers is timed by a program of its own beside the tests that
compare numbers with it. Where torch is missing, its table says so.
"""

import dataclasses
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array
from PIL import Image

import checkpoints
from astra_jax.cli.arguments import parse
from astra_jax.cli.main import guarded
from astra_jax.codecs.config import AstraConfig, VQConfig
from astra_jax.errors import AstraError
from astra_jax.files import write_atomically
from astra_jax.models.attention import Partial, attend
from astra_jax.models.interface import Codes, Remote
from astra_jax.models.vit import ViTConfig
from astra_jax.report import Report
from astra_jax.strategies.coded import Astra, AstraPlain
from eval import plots
from eval.cost import encoding
from eval.cost.encoding import Block, one_block
from eval.cost.timing import wall_seconds
from eval.cost.workload import open_workload
from eval.reports.lab import CPU, HOSTS, folder_of, measurement, rows_of
from eval.reports.tables import Rows, insert, markdown

RATE = "10mbit"
EIGHT, LITTLE_CPU = 8, 0.2
LONG = (1024, 4096, 16384)  # tokens of the sequence, on HOSTS devices
LOCAL, DEVICES = 1024, (2, 4, 8, 16)  # tokens on each of so many devices
BRIEF_REPEATS = 11  # of what takes less than a second
GROUPS = (1, 8, 16, 32)
SIDE_BY_SIDE = Path(__file__).parents[2] / "tests" / "parity" / "side_by_side.py"
SIDE = 14  # patches along a picture's side, with which ViT-Base was published


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of the benchmark."""

    model: str = "vit-base"
    """A ViT: a checkpoint, or a known architecture."""
    llama: str = "llama-s"
    """A Llama: a checkpoint, or a known architecture."""
    tokens: int = 1024
    """T of all passes but those of long inputs."""
    repeats: int = 5
    """How often a pass is measured."""
    slow_repeats: int = 1
    """How often one of sp and tp is, which take half a minute and two minutes on so slow a link."""
    folder: Path = Path("build/bench")
    """Where measurements are kept."""
    markdown: Path | None = None
    """Also put the tables into this file, between its marks, and plots beside it."""


def measured_once(path: Path, measure: Callable[[], Rows]) -> Rows:
    """The rows that were measured before and are kept in a file; measured now where it is not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(measure(), indent=1))
    return list(json.loads(path.read_text(encoding="utf8")))


def config_of(args: Args) -> ViTConfig:
    """The architecture of the ViT, at T tokens. Raises AstraError where it is none."""
    config = open_workload(args.model, args.tokens, None, jnp.float32).config
    if not isinstance(config, ViTConfig):
        raise AstraError(f"--model {args.model}: is no ViT: try vit-base")
    return config


def in_lab(args: Args, hosts: int, cpu: float, model: str, **options: Any) -> Rows:
    """Rows that `astra bench` measured on hosts of the lab, in seconds and over one device.

    Args:
      options: of `astra bench`, with `_` for `-`.
    """
    options = {"tokens": args.tokens, "repeats": args.repeats, **options}
    options = {name.replace("_", "-"): value for name, value in options.items()}
    name = "-".join(map(str, (Path(model).name, hosts, *options.values())))
    found = measurement(args.folder / f"{name}.json", hosts, cpu, RATE, model, options)
    columns = ("strategy", "measured s", "least s", "most s", "times faster than one device")
    return [{column: row[column] for column in columns} for row in rows_of(RATE, found["measured"])]


def beside(ours: Rows, theirs: Rows) -> Rows:
    """One table of two runs, with how many times faster every row of the first is than those of the second.

    A run has its own `single`, and times are compared within a run alone: a ratio of rows of both is a ratio of how
    many times each is faster than its own `single`.
    """
    faster = "times faster than one device"
    others = [row for row in theirs if row["strategy"] != "single"]
    rows = [
        {**row, **{f"times faster than {other['strategy']}": row[faster] / other[faster] for other in others}}
        for row in ours
    ]
    empty = {f"times faster than {other['strategy']}": None for other in others}
    again = [{**row, "strategy": f"{row['strategy']}, again"} for row in theirs if row["strategy"] == "single"]
    return [*rows, *({**row, **empty} for row in (*again, *others))]


def hosts(args: Args) -> Rows:
    """Four hosts: ASTRA, with and without its tables, sequence and tensor parallelism."""
    ours = in_lab(args, HOSTS, CPU, args.model, strategies="single,astra,astra-plain", groups="1,32")
    theirs = in_lab(args, HOSTS, CPU, args.model, strategies="single,sp,tp", repeats=args.slow_repeats)
    return beside(ours, theirs)


def slower(args: Args) -> Rows:
    """Four hosts with half as much of a core each."""
    return in_lab(args, HOSTS, LITTLE_CPU, args.model, strategies="single,astra", groups="1")


def eight(args: Args) -> Rows:
    """Eight hosts with half as much of a core each."""
    return in_lab(args, EIGHT, LITTLE_CPU, args.model, strategies="single,astra", groups="1")


def llama(args: Args) -> Rows:
    """A prompt: the time to its first token."""
    return in_lab(args, HOSTS, CPU, args.llama, strategies="single,astra", groups="1", site="kv")


def against_torch(args: Args) -> Rows:
    """A pass on one device, ours and that of transformers, in turns."""
    path = args.folder / f"torch-{args.tokens}-{args.repeats}.json"
    if not path.exists() and importlib.util.find_spec("torch") is None:
        return [{"not measured": "torch is missing: make .venv/installed-test"}]

    def measure() -> Rows:
        wanted = {"model": args.model, "tokens": args.tokens, "repeats": args.repeats}
        words = [f"--{name}={value}" for name, value in wanted.items()]
        done = subprocess.run([sys.executable, SIDE_BY_SIDE, *words], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise AstraError(f"{SIDE_BY_SIDE} ended with exit code {done.returncode}: what it printed says why")
        return torch_rows(json.loads(done.stdout))

    return measured_once(path, measure)


def torch_rows(walls: dict[str, list[float]]) -> Rows:
    """A row for each of two that took turns, and how long it takes over the last of them."""
    (*_, last) = walls.values()
    return [
        {
            "pass of": name,
            "measured s": float(np.median(seconds)),
            "least s": min(seconds),
            "most s": max(seconds),
            f"over {list(walls)[-1]}": float(np.median(seconds) / np.median(last)),
        }
        for name, seconds in walls.items()
    ]


def long_inputs(args: Args) -> Rows:
    """One block of one device alone, and one device's share of it, by tokens of the sequence."""

    def measure() -> Rows:
        return [share_row(config_of(args), T, HOSTS, VQConfig(groups=1), args.repeats) for T in LONG]

    return measured_once(args.folder / f"long-{Path(args.model).name}-{args.repeats}.json", measure)


def share_row(config: ViTConfig, T: int, N: int, astra: AstraConfig, repeats: int) -> dict[str, Any]:
    """Milliseconds of a block of one device, and of its share on N devices, on the fast path and plain."""
    blocks = [one_block(config, T), *(one_block(config, T, N, astra, way) for way in (Astra, AstraPlain))]
    single, fast, plain = (
        1e3 * float(np.median(seconds)) for seconds in wall_seconds([b.call() for b in blocks], repeats)
    )
    return {
        "tokens": T,
        "N": N,
        "one device ms": single,
        "fast path ms": fast,
        "plain ms": plain,
        "times faster than one device": single / fast,
        "plain": single / plain,
    }


def remote_tokens(args: Args) -> Rows:
    """Attention to remote tokens alone, by how many there are."""

    def measure() -> Rows:
        return remote_rows(config_of(args), LOCAL, DEVICES, VQConfig(groups=1), BRIEF_REPEATS)

    return measured_once(args.folder / f"remote-{Path(args.model).name}-{BRIEF_REPEATS}.json", measure)


def remote_rows(config: ViTConfig, S: int, devices: tuple[int, ...], astra: AstraConfig, repeats: int) -> Rows:
    """Milliseconds in which S local tokens attend to those of the other devices, S on each, in one block."""
    ways = itertools.product(devices, (Astra, AstraPlain))
    calls = [remote_attention(one_block(config, N * S, N, astra, way)) for N, way in ways]
    median = [1e3 * float(np.median(seconds)) for seconds in wall_seconds(calls, repeats)]
    return [
        {"N": N, "local tokens": S, "remote tokens": (N - 1) * S}
        | {"fast path ms": fast, "plain ms": plain, "plain / fast path": plain / fast}
        for N, fast, plain in zip(devices, median[::2], median[1::2], strict=True)
    ]


def remote_attention(block: Block) -> Callable[[], Partial]:
    """What attends from all slots of a device to all remote tokens, from their codes on, to be timed."""
    attention = nnx.merge(block.graphdef, block.state).attention
    G, K, _ = attention.codec.codebook.shape
    position = np.asarray(block.strategy.remote_tokens().position)
    rng = np.random.default_rng(2)
    codes = jnp.asarray(rng.integers(0, K, (1, position.shape[-1], G), np.uint16))
    query = jnp.asarray(rng.standard_normal((1, block.x.shape[1], attention.H, attention.E), np.float32))

    @jax.jit
    def run(state: Any, query: Array, codes: Array) -> Partial:
        attention = nnx.merge(block.graphdef, state).attention
        return attend(query, attention.remote_source(Remote(Codes(codes), position, None), query.dtype))

    return lambda: run(block.state, query, codes)


def encoding_share(args: Args) -> Rows:
    """What encoding takes of a block (`python -m eval.cost.encoding`)."""
    codecs = [None, *(VQConfig(groups=G) for G in GROUPS)]

    def measure() -> Rows:
        return [encoding.measure(config_of(args), args.tokens, HOSTS, astra) for astra in codecs]

    return measured_once(args.folder / f"encoding-{Path(args.model).name}-{args.tokens}.json", measure)


def start(args: Args) -> Rows:
    """`astra run` as a process: the first time, and again when the programs that it compiled are kept."""

    def measure() -> Rows:
        with tempfile.TemporaryDirectory(prefix="astra") as folder:
            words = picture_and_checkpoint(config_of(args), Path(folder))
            return start_rows([start_seconds(words) for _ in range(args.repeats)])

    return measured_once(args.folder / f"start-{Path(args.model).name}-{args.repeats}.json", measure)


def picture_and_checkpoint(config: ViTConfig, folder: Path) -> list[str]:
    """Makes a checkpoint with random weights and a picture; returns the words that follow `astra run`."""
    config = dataclasses.replace(config, image_size=SIDE * config.patch_size, num_channels=3)
    work = dataclasses.replace(open_workload("vit-base", None, None, jnp.float32), config=config, T=config.num_patches)
    size = {"height": config.image_size, "width": config.image_size}
    labels = tuple(f"class {i}" for i in range(config.num_labels))
    model = work.model(work.weights(), None)
    checkpoint = checkpoints.Checkpoint("vit", config, None, labels, {"size": size}, {}, "float32", (), model)
    checkpoints.save(folder / "vit", checkpoint)
    pixels = np.random.default_rng(0).integers(0, 255, (config.image_size, config.image_size, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    return [str(folder / "vit"), "--image", str(folder / "picture.png")]


def start_seconds(words: list[str]) -> tuple[float, float]:
    """Seconds of the whole process `astra run` with an empty cache, and once more with what is in it then."""
    with tempfile.TemporaryDirectory(prefix="astra") as cache:
        environment = {**os.environ, "XDG_CACHE_HOME": cache}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # it would come before ours
        seconds = []
        for _ in range(2):
            begun = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-m", "astra_jax.cli.main", "run", *words],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            seconds.append(time.perf_counter() - begun)
            if done.returncode:
                raise AstraError(f"`astra run` ended with exit code {done.returncode}: {done.stderr.strip()}")
    return seconds[0], seconds[1]


def start_rows(pairs: list[tuple[float, float]]) -> Rows:
    """A row of first starts and one of those after them."""
    return [
        {"start": name, "measured s": float(np.median(seconds)), "least s": min(seconds), "most s": max(seconds)}
        for name, seconds in zip(("first", "second"), zip(*pairs, strict=True), strict=True)
    ]


# Name of a table -> its title, and what measures its rows.
SECTIONS: dict[str, tuple[str, Callable[[Args], Rows]]] = {
    "hosts": (f"{HOSTS} hosts with {CPU} of a core each, {RATE}", hosts),
    "slower": (f"{HOSTS} hosts with {LITTLE_CPU} of a core each, {RATE}", slower),
    "eight": (f"{EIGHT} hosts with {LITTLE_CPU} of a core each, {RATE}", eight),
    "llama": (f"a Llama's first token, {HOSTS} hosts with {CPU} of a core each, {RATE}", llama),
    "torch": ("one device, beside transformers", against_torch),
    "long": ("one block, G=1, by the length of the input", long_inputs),
    "remote": ("attention to remote tokens in one block, G=1", remote_tokens),
    "encoding": ("what encoding takes of a block", encoding_share),
    "start": ("`astra run`, the whole process", start),
}


def main(args: Args) -> None:
    """Measures, and prints and writes the tables."""
    report, args = Report("performance"), dataclasses.replace(args, folder=folder_of(args.folder, args.model))
    found: dict[str, Rows] = {}
    for name, (title, measure) in SECTIONS.items():
        found[name] = measure(args)
        report.table(name, title, found[name])
    if args.markdown:
        for name, rows in found.items():
            insert(args.markdown, name, markdown(rows), "make bench")
        speed, length = (args.markdown.with_suffix(".png"), args.markdown.with_name(f"{args.markdown.stem}-long.png"))
        labels = {"hosts": f"{HOSTS} hosts", "eight": f"{EIGHT} hosts", "llama": f"{HOSTS} hosts, Llama"}
        plots.times_faster([(label, found[name]) for name, label in labels.items()], speed)
        plots.remote_attention(found["remote"], length)
        report.say(f"tables: {args.markdown}; plots: {speed}, {length}")
    report.close()


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(parse(Args, description=__doc__))))
