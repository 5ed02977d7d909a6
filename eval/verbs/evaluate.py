"""Quality, bits and predicted latency of one or more checkpoints, as one table and one plot.

Quality is the accuracy of a classifier of images or texts, the perplexity of a language model over sliding windows, or
how well the similarity of sentence embeddings follows what people say (Pearson's and Spearman's correlation), and of
embeddings of pictures how often the nearest other ones are of the same class.

A checkpoint with codebooks runs as ASTRA over the mesh that --devices picks, one without on a single device: give the
original first to compare. On a CPU the devices are made by the program itself.

--packet-loss tells what is left of it on links that lose packets, as the mean of a few tries and their standard
deviation, and --speeds splits the tokens over unequal devices. Both are simulated on virtual shards, as by --virtual.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np
import tyro

import checkpoints
from astra_jax.cli.arguments import Integers, Texts
from astra_jax.codecs.bitpacking import tokens_per_packet
from astra_jax.codecs.config import AstraConfig
from astra_jax.errors import AstraError
from astra_jax.hosts.agreement import contents, options
from astra_jax.hosts.distributed import Hosts, have_read, open_mesh
from astra_jax.inputs.token_batches import Text, most_tokens
from astra_jax.mesh.sharding import Shards, parse_devices
from astra_jax.models.weight_quantization import Weights, quantize_weights, weight_bytes
from astra_jax.report import Report
from astra_jax.serving.compile import STRATEGIES
from astra_jax.strategies.base import Message
from astra_jax.strategies.coded import Astra
from checkpoints import Checkpoint
from checkpoints.configs import need_one_class
from eval import plots
from eval.cost.timing import compute_seconds
from eval.cost.traffic import messages
from eval.datasets.account import Tell, telling
from eval.datasets.labelled import DataArgs, check_counts
from eval.datasets.windows import even_strides
from eval.network.devices import Devices
from eval.network.model import Link, parse_rate, pass_seconds
from eval.network.packet_loss import PacketLoss
from eval.quality.tasks import METRICS, task_of
from eval.quality.trial import Sliding, Trial, reached
from eval.quality.ways import Lossy, Lost, OnMesh, Simulated, Way, mean_and_spread

LONGEST = 1024  # the longest default window, in tokens
SEEDS = 5  # the default number of tries under packet loss


@dataclasses.dataclass(frozen=True)
class Losses:
    """Packets that are lost on the way, simulated on virtual shards."""

    packet_loss: float | None = None
    """Share of the packets that are lost on every link, such as 0.05."""
    burst: float | None = None
    """The mean number of packets that are lost in a row, such as 8; by default each is lost on its own."""
    packet: int | None = None
    """Payload of a packet in bytes, by default 1400. It holds whole tokens."""
    lost: Lost | None = None
    """What becomes of tokens whose codes are lost: they are masked out of that block's attention, or what a predictor
    expects of them stands in; by default predicted, of a checkpoint without a predictor masked."""
    seeds: int | None = None
    """How often everything is run under packet loss, by default 5."""

    @property
    def of_packets(self) -> list[str]:
        """The options that say how packets are lost."""
        given = {"--burst": self.burst, "--packet": self.packet, "--lost": self.lost, "--seeds": self.seeds}
        return [option for option, value in given.items() if value is not None]

    @property
    def links(self) -> PacketLoss | None:
        """What links lose. Raises AstraError where that cannot be."""
        if self.packet_loss is None:
            return None
        packet = {} if self.packet is None else {"packet": self.packet}
        return PacketLoss(self.packet_loss, self.burst, **packet)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(DataArgs):
    """Arguments of `astra eval`."""

    checkpoints: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT...")]
    """One or more checkpoints, the original first."""
    task: Literal["auto", "perplexity", "classification", "similarity", "neighbours"] = "auto"
    """What to measure; `auto` is what the checkpoint was made for."""
    split: str = "test"
    """Which part of the data; a slice such as test[:1000] goes too."""
    devices: str | None = None
    """The mesh: N devices over the tokens, or DxN for D batches at once; by default 4, or one on each host."""
    several: Annotated[Hosts, tyro.conf.arg(name="several hosts as one mesh"), tyro.conf.OmitArgPrefixes] = Hosts()
    virtual: bool = False
    """Run the N shards on one device: the same numbers, no mesh needed."""
    strategy: Literal["auto", "single", "astra", "sp", "tp", "bp-ag", "bp-sp"] = "auto"
    """How the devices share the work; `auto` is `astra` for a checkpoint with codebooks, and else `single`."""
    groups: Integers = ()
    """Evaluate with only the first so many groups of the codes of a nested-pq codec, one number after the other."""
    weights: Weights | None = None
    """Round the weights of the blocks to 8 or 4 bits; by default they stay in full precision."""
    losses: Annotated[Losses, tyro.conf.arg(name="lost packets"), tyro.conf.OmitArgPrefixes] = Losses()
    unequal: Annotated[Devices, tyro.conf.arg(name="")] = Devices()
    length: int | None = None
    """Text: tokens of a window, and of the sequence that is timed; by default the model's limit, but at most 1024."""
    stride: int | None = None
    """Perplexity: tokens by which the windows move on, of several devices the last so many shards of a window; by
    default half of its length."""
    batch_size: int | None = None
    """Images, texts or windows per batch; by default 64, of windows 8."""
    limit: int | None = None
    """Stop after this many images, documents, texts or pairs."""
    rates: Texts = ("10mbit", "20mbit", "50mbit", "100mbit", "200mbit", "500mbit")
    """Link rates to predict the latency of one image or sequence for."""
    plot: Path | None = None
    """Draw quality over bits and latency over the link's rate into this file (PNG or SVG)."""
    json: Path | None = None
    """Also write everything printed to this file."""

    @property
    def simulated(self) -> list[str]:
        """The options that are simulated on virtual shards."""
        given = {
            "--packet-loss": self.losses.packet_loss is not None,
            "--speeds": self.unequal.N,
            "--virtual": self.virtual,
        }
        return [option for option, value in given.items() if value]

    @property
    def mesh(self) -> tuple[int, int]:
        """D and N: batches at once, and devices over the tokens."""
        return parse_devices(self.devices or str(self.several.devices(4)))


def check(args: Args) -> None:
    """Raises AstraError, before any work, for what cannot be, or does not go together."""
    check_counts(args.batch_size, args.limit)
    for rate in args.rates:
        parse_rate(rate)
    simulated, of_packets = next(iter(args.simulated), ""), next(iter(args.losses.of_packets), "")
    several_devices = args.losses.packet_loss is not None or args.unequal.N > 0
    # What is the case, and what is said of it. The first that is so is said.
    rules = (
        (not args.checkpoints, "no checkpoint was given: astra eval CHECKPOINT [CHECKPOINT ...] --data DATA"),
        (
            several_devices and (args.mesh[1] == 1 or args.strategy == "single"),
            f"{simulated} is for several devices; one alone sends nothing: leave the option out",
        ),
        (
            simulated and args.strategy not in ("auto", "single", "astra"),
            f"{simulated} simulates the exchange of codes, which strategy {args.strategy} does not do: "
            "use strategy astra, or leave the option out",
        ),
        (
            simulated and args.several != Hosts(),
            f"{simulated} is simulated on one device: run it on one host, without --coordinator, --hosts and --host",
        ),
        (
            of_packets and args.losses.packet_loss is None,
            f"{of_packets} is about packets that are lost, and none are: give --packet-loss, such as 0.05, too",
        ),
        (
            args.losses.seeds is not None and args.losses.seeds < 1,
            f"--seeds is {args.losses.seeds}; it must be at least 1: try {SEEDS}",
        ),
    )
    for so, said in rules:
        if so:
            raise AstraError(said)
    if args.plot:
        plots.check_plot(args.plot)


def check_task(args: Args) -> str:
    """The task of all checkpoints. Raises AstraError if they differ, or options do not fit them."""
    described = {path: checkpoints.read_meta(path) for path in args.checkpoints}
    first = args.checkpoints[0]
    task = task_of(described[first].config) if args.task == "auto" else args.task
    for path, checkpoint in described.items():
        if (own := task_of(checkpoint.config)) != task:
            wanted = (
                f"{first} for {task}: evaluate them one by one" if args.task == "auto" else f"not for --task {task}"
            )
            raise AstraError(f"{path} is a model for {own}, {wanted}")
        need_one_class(checkpoint, path, "evaluated by")
        check_packets(path, checkpoint.astra, args)
    if args.stride is not None and task != "perplexity":
        raise AstraError(f"--stride is for perplexity; {first} is a model for {task}: leave the option out")
    if args.length is not None and any(meta.config.input_kind == "images" for meta in described.values()):
        raise AstraError("--length is for text; a model's images all have the same size: leave the option out")
    return task


def check_packets(path: Path, astra: AstraConfig | None, args: Args) -> None:
    """Raises AstraError where a packet takes no token of these codes, or nothing is expected of those that are lost."""
    links = args.losses.links
    if links is None or astra is None:
        return
    tokens_per_packet(astra.token_bits, links.packet)
    if args.losses.lost == "predicted" and not astra.expects:
        raise AstraError(
            f"{path} has no predictor, so nothing is expected of tokens that are lost: use --lost masked, "
            "or `astra calibrate --predictor`"
        )


def way_of(checkpoint: Checkpoint, args: Args) -> Way:
    """How a checkpoint is run: where it has no codes and no other strategy is asked for, on one device."""
    (rows, N), astra = args.mesh, checkpoint.astra
    strategy = ("astra" if astra else "single") if args.strategy == "auto" else args.strategy
    if N == 1 or strategy == "single":
        return Simulated(1) if args.simulated else OnMesh("single", 1, rows)
    if not args.simulated:
        return OnMesh(strategy, N, rows)
    if args.losses.links is None or astra is None:
        return Simulated(N, args.unequal)
    lost: Lost = args.losses.lost or ("predicted" if astra.expects else "masked")
    tries = args.losses.seeds or SEEDS
    return Lossy(N, args.unequal, packet_loss=args.losses.links, codes=astra, lost=lost, tries=tries)


def sliding(config: Any, args: Args) -> Sliding:
    """Length and stride in tokens, for a model of text. Raises AstraError if the model cannot take that, or if a stride
    does not count all places of a shard alike."""
    limit = most_tokens(config)
    length = min(limit, LONGEST) if args.length is None else args.length
    if not 2 <= length <= limit:
        raise AstraError(f"--length is {length}; this model takes from 2 to {limit} tokens")
    N, strides = args.mesh[1], list[int]()
    if any(way_of(checkpoints.read_meta(path), args).strategy == "astra" for path in args.checkpoints):
        shards = args.unequal.split(Shards.split(length, min(N, length)))
        strides = even_strides(np.asarray(shards.lengths).tolist())
    usual = min(strides, key=lambda n: abs(n - length / 2)) if strides else length // 2
    stride = usual if args.stride is None else args.stride
    if not 1 <= stride <= length:
        raise AstraError(f"--stride is {stride}; windows of {length} tokens move by 1 to {length} tokens")
    if strides and stride not in strides:
        raise AstraError(
            f"--stride is {stride}; on {N} devices it counts some places of a shard more often than others, which have "
            f"more exact context: use {' or '.join(map(str, strides))}, or another --length"
        )
    return Sliding(length, stride)


def example(checkpoint: Checkpoint, windows: Sliding | None) -> Any:
    """One input of a model: an image, or a sequence as long as a window."""
    config = checkpoint.config
    if windows is None:
        return jnp.zeros((1, config.side, config.side, config.num_channels))
    return Text(jnp.zeros((1, windows.length), jnp.int32), jnp.full((1,), windows.length, jnp.int32))


def measure(
    path: Path, args: Args, say: Callable[[str], None], groups: int | None = None, tell: Tell | None = None
) -> dict[str, Any]:
    """One row of the table: what a checkpoint reaches and what it costs.

    `say` is told what is done to its texts, and `tell` what is read; without `tell` that is said, too.

    With `groups` only the first so many are used, where it has a codec that allows that.

    Beside the columns it has `astra`, the configuration of the codes, for those who read the JSON; under packet loss
    `seeds`, too: the metrics of every try.
    """
    checkpoint = checkpoints.load(path, groups=groups)
    if args.weights:
        checkpoint = dataclasses.replace(checkpoint, model=quantize_weights(checkpoint.model, args.weights))
    model, config, way = checkpoint.model, checkpoint.config, way_of(checkpoint, args)
    windows = None if config.input_kind == "images" else sliding(config, args)
    STRATEGIES[way.strategy].of(model, way.N)  # what cannot be split is told before any data are read
    way.shards(model)
    trial = Trial(
        checkpoint,
        way,
        args,
        lambda text: say(f"{path.name}: {text}"),
        tell or (lambda account: say(str(account))),
        args.limit,
        args.batch_size,
        windows,
    )
    found = reached(trial)
    have_read("all data", ())
    astra, lossy = checkpoint.astra if way.strategy == "astra" else None, args.losses.packet_loss is not None
    bits = astra.mean_bits(config.num_hidden_layers) if astra else None
    return {
        "checkpoint": path.name,
        "astra": astra.as_dict() if astra else None,
        "strategy": way.strategy,
        "N": way.N,
        "G": astra.groups if astra else None,
        "T": windows.length if windows else config.num_patches,
        **({"lost": way.lost if isinstance(way, Lossy) else None} if lossy else {}),
        **({**mean_and_spread(found), "seeds": found} if lossy else found[0]),
        "weight MB": weight_bytes(model) / 1e6,
        "bits": bits,
        "ratio": config.hidden_size * 32 / bits if bits else None,
        **costs(model, way, example(checkpoint, windows), args),
    }


def costs(model: Any, way: Way, inputs: Any, args: Args) -> dict[str, Any]:
    """Columns of what one input costs: bytes that a device sends, the time it computes, and the latency at every rate.

    How long a device of another speed would take is not known here.
    """
    make = STRATEGIES[way.strategy].of
    if isinstance(way, Simulated) and way.N > 1:
        sent: Sequence[Message] = Astra(way.shards(model, inputs)).messages(model)
    else:
        sent = messages(model, way.N, inputs, make)
    unequal = isinstance(way, Simulated) and way.devices.N
    compute = None if unequal else compute_seconds(model, way.N, inputs, make)

    def latency(rate: str) -> float | None:
        return None if compute is None else 1e3 * pass_seconds(compute, sent, way.N, Link(parse_rate(rate)))

    return {
        "bytes": sum(m.bits * m.times for m in sent) // 8,
        "compute ms": None if compute is None else 1e3 * compute,
        **{rate: latency(rate) for rate in args.rates},
    }


def input_name(args: Args) -> str:
    """What one input is called."""
    return "image" if checkpoints.read_meta(args.checkpoints[0]).config.input_kind == "images" else "sequence"


def main(args: Args) -> None:
    """Runs `astra eval`."""
    report = Report("eval", args.json)
    check(args)
    if not args.simulated:
        D, N = args.mesh
        # Before JAX starts, so that it makes enough CPU devices.
        open_mesh(f"{D}x{N}", args.several, same=lambda: options(args) | contents(args.checkpoints))
    task = check_task(args)
    notes: list[str] = []

    def say(text: str) -> None:
        notes.append(text)
        report.say(text, notes=notes)

    tell = telling(report)
    rows = [
        measure(path, args, say, groups, tell)
        for path in args.checkpoints
        for groups in (args.groups if checkpoints.read_meta(path).astra else ()) or (None,)
    ]
    tries = [
        {"checkpoint": row["checkpoint"], "seed": seed if row["N"] > 1 else None, **metrics}
        for row in rows
        for seed, metrics in enumerate(row.pop("seeds", ()))
    ]
    shown = [{column: value for column, value in row.items() if column != "astra"} for row in rows]
    report.table("rows", f"{args.data} [{args.split}]", shown)
    report.data["rows"] = rows
    explain(report, args, tries)
    if args.plot:
        plots.metric_and_latency(rows, METRICS[task], input_name(args), args.rates, args.plot)
        report.say(f"plot: {args.plot}", plot=str(args.plot))
    report.close()


def explain(report: Report, args: Args, tries: Sequence[dict[str, Any]]) -> None:
    """Says below the table what its columns are."""
    one = input_name(args).replace("sequence", "sequence of T tokens")
    report.say(
        f"N devices; weights as {args.weights or 'in full precision'}; bits per token and block; compression ratio; "
        f"bytes that a device sends for one {one}, {'as predicted' if args.simulated else 'as compiled'}\n"
        f"compute: one device's share of one {one}, measured here; then its latency in ms, predicted for each rate"
    )
    if (links := args.losses.links) is not None:
        how = "one by one" if links.burst is None else f"in bursts of {links.burst:g} on average"
        report.say(
            f"a share of {links.rate:g} of the packets of {links.packet:,} bytes is lost, {how}, on virtual shards: "
            f"mean and standard deviation (sd) over {args.losses.seeds or SEEDS} seed(s)\n"
            "lost: tokens in them are masked out of a block's attention, or predicted from the block before",
            packet_loss=dataclasses.asdict(links),
            seeds=tries,
        )
    if args.unequal.N:
        report.say(
            f"tokens are split for speeds {args.unequal}, on virtual shards; unequal devices are not timed here",
            speeds=list(args.unequal.speeds),
        )
