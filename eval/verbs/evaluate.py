"""Quality, bits and predicted latency of one or more checkpoints, as one table and one plot.

Quality is the accuracy of a classifier of images or texts, the perplexity of a language model over sliding windows, or
how well the similarity of sentence embeddings follows what people say (Pearson's and Spearman's correlation).

A checkpoint with codebooks runs as ASTRA over the mesh that --devices picks, one without on a single device: give the
original first to compare. On a CPU the devices are made by the program itself.

--loss tells what is left of it on links that lose packets, as the mean of a few tries and their standard deviation, and
--speeds splits the tokens over unequal devices. Both are simulated on virtual shards, as by --virtual.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jaxtyping import Array, Bool, Float

import checkpoints
from astra_jax.cli.arguments import Integers, Numbers, Texts
from astra_jax.codecs.bitpacking import tokens_per_packet
from astra_jax.codecs.config import AstraConfig
from astra_jax.errors import AstraError
from astra_jax.hosts.agreement import options
from astra_jax.hosts.options import Hosts
from astra_jax.hosts.runtime import open_mesh, say_read
from astra_jax.inputs.token_batches import Text, longest
from astra_jax.mesh.sharding import Shards, make_mesh, parse_devices
from astra_jax.models.weight_quantization import Weights, quantize_weights, weight_bytes
from astra_jax.report import Report, progress
from astra_jax.serving.compile import STRATEGIES, parallelize
from astra_jax.strategies.base import Astra, Single, Virtual
from checkpoints import Checkpoint
from checkpoints.configs import need_one_class
from eval import plots
from eval.cost.timing import compute_seconds
from eval.cost.traffic import messages
from eval.datasets.account import Tell, telling
from eval.datasets.labelled import DataArgs, batches, check_counts
from eval.datasets.labels import model_classes
from eval.datasets.windows import encode, even_strides, run_batches, windows
from eval.network.model import Link, parse_rate, pass_seconds
from eval.network.packet_loss import Loss, arrived
from eval.quality.perplexity import NextTokenLoss, perplexity
from eval.quality.reached import METRICS
from eval.quality.similarity import correlations

# config.task -> what is measured; a model without that field classifies images.
TASKS = {"causal-lm": "perplexity", "classification": "classification", "embedding": "similarity"}
LONGEST = 1024  # the longest default window, in tokens
BURST = 8.0  # the default mean length of a burst, in packets
SEEDS = 5  # the default number of tries under packet loss

Run = Callable[[Any], Array]  # inputs -> outputs
Metrics = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(DataArgs):
    """Arguments of `astra eval`."""

    checkpoints: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT...")]
    """One or more checkpoints, the original first."""
    task: Literal["auto", "perplexity", "classification", "similarity"] = "auto"
    """What to measure; `auto` is what the checkpoint was made for."""
    split: str = "test"
    """Which part of the data; a slice such as test[:1000] goes too."""
    devices: str | None = None
    """The mesh: N devices over the tokens, or DxN for D batches at once; by default 4, or one on each host."""
    several: Annotated[Hosts, tyro.conf.arg(name="")] = Hosts()
    virtual: bool = False
    """Run the N shards on one device: the same numbers, no mesh needed."""
    strategy: Literal["auto", "single", "astra", "sp", "tp", "bp-ag", "bp-sp"] = "auto"
    """How the devices share the work; `auto` is `astra` for a checkpoint with codebooks, and else `single`."""
    groups: Integers = ()
    """Evaluate with only the first so many groups of the codes of a nested-pq codec, one number after the other."""
    coded_blocks: int | None = None
    """Let only the first so many blocks send codes; the others go by what is predicted from these, which takes a
    predictor (docs/accuracy-per-bit.md). By default as the checkpoint was made for: all, unless it was finetuned so."""
    weights: Weights | None = None
    """Round the weights of the blocks to 8 or 4 bits; by default they stay in full precision."""
    fast_path: Literal["on", "off"] = "on"
    """Exact short cuts where they pay (docs/performance.md); off for the plain form. Virtual shards always have that,
    and there it only says how compute is timed."""
    loss: float | None = None
    """Share of the packets that are lost on every link, such as 0.05."""
    loss_model: Literal["bernoulli", "burst"] | None = None
    """Whether packets are lost one by one, or in a row; by default bernoulli."""
    lost: Literal["masked", "predicted"] | None = None
    """What becomes of tokens whose codes are lost: they are masked out of that block's attention, or what a predictor
    expects of them stands in; by default predicted, of a checkpoint without a predictor masked."""
    packet: int | None = None
    """Payload of a packet in bytes, by default 1400. It holds whole tokens."""
    burst: float | None = None
    """Loss model burst: the mean number of packets that are lost in a row, by default 8."""
    seeds: int | None = None
    """How often everything is run under packet loss, by default 5."""
    speeds: Numbers = ()
    """Relative speeds of the N devices, such as 1,1,0.5,0.5, to split the tokens in proportion to; by default equal."""
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


def task_of(config: Any) -> str:
    """What is measured of a model with this configuration."""
    return TASKS[getattr(config, "task", "classification")]


def check_task(args: Args) -> str:
    """The task of all checkpoints. Raises AstraError if they differ, or options do not fit it."""
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
    if args.stride is not None and task != "perplexity":
        raise AstraError(f"--stride is for perplexity; {first} is a model for {task}: leave the option out")
    if args.length is not None and any(meta.config.input_kind == "images" for meta in described.values()):
        raise AstraError("--length is for text; a ViT's images all have the same size: leave the option out")
    return task


def devices_of(args: Args) -> tuple[int, int]:
    """(D, N) of the mesh."""
    return parse_devices(args.devices or str(args.several.hosts or 4))


def strategy_of(checkpoint: Checkpoint, args: Args) -> str:
    """The name in `STRATEGIES` under which a checkpoint runs."""
    if devices_of(args)[1] == 1:
        return "single"
    if args.strategy == "auto":
        return "astra" if checkpoint.astra else "single"
    return args.strategy


def check_simulation(args: Args) -> Args:
    """The arguments, with --virtual where another option needs it. Raises AstraError where options do not fit."""
    wanted = [f"--{name}" for name, value in (("loss", args.loss is not None), ("speeds", args.speeds)) if value]
    if wanted and (devices_of(args)[1] == 1 or args.strategy == "single"):
        raise AstraError(f"{wanted[0]} is for several devices; one alone sends nothing: leave the option out")
    wanted += ["--virtual"] * args.virtual
    if wanted and args.strategy not in ("auto", "single", "astra"):
        raise AstraError(
            f"{wanted[0]} simulates the exchange of codes, which strategy {args.strategy} does not do: "
            "use strategy astra, or leave the option out"
        )
    if wanted and args.several != Hosts():
        raise AstraError(
            f"{wanted[0]} is simulated on one device: run it on one host, without --coordinator, --hosts and --host"
        )
    return dataclasses.replace(args, virtual=bool(wanted))


def loss_of(args: Args) -> Loss | None:
    """The packet loss that is asked for, if any. Raises AstraError if an option is out of range or does not fit."""
    details = {
        "--loss-model": args.loss_model, "--lost": args.lost, "--packet": args.packet, "--burst": args.burst,
        "--seeds": args.seeds,
    }  # fmt: skip
    given = [option for option, value in details.items() if value is not None]
    if args.loss is None:
        if given:
            raise AstraError(f"{given[0]} is about packets that are lost, and none are: give --loss, such as 0.05, too")
        return None
    if args.burst is not None and args.loss_model != "burst":
        raise AstraError("--burst is for losses in a row: give --loss-model burst, too, or leave the option out")
    if args.seeds is not None and args.seeds < 1:
        raise AstraError(f"--seeds is {args.seeds}; it must be at least 1: try {SEEDS}")
    loss = Loss(args.loss) if args.packet is None else Loss(args.loss, packet=args.packet)
    if args.loss_model == "burst":
        loss = dataclasses.replace(loss, burst=BURST if args.burst is None else args.burst)
    for path in args.checkpoints:
        astra = checkpoints.read_meta(path).astra
        if astra is None:
            continue
        tokens_per_packet(astra.token_bits, loss.packet)
        if args.lost == "predicted" and astra.predictor == "none":
            raise AstraError(
                f"{path} has no predictor, so nothing is expected of tokens that are lost: use --lost masked, "
                "or `astra calibrate --predictor`"
            )
    return loss


def lost_of(astra: AstraConfig, args: Args) -> Literal["masked", "predicted"]:
    """What becomes of tokens of a checkpoint whose codes are lost."""
    return args.lost or ("masked" if astra.predictor == "none" else "predicted")


def window(config: Any, args: Args) -> tuple[int, int]:
    """Length and stride in tokens, for a model of text. Raises AstraError if the model cannot take that, or if a stride
    does not count all places of a shard alike."""
    limit = config.max_position_embeddings
    length = min(limit, LONGEST) if args.length is None else args.length
    if not 2 <= length <= limit:
        raise AstraError(f"--length is {length}; this model takes from 2 to {limit} tokens")
    N, strides = devices_of(args)[1], list[int]()
    if any(strategy_of(checkpoints.read_meta(path), args) == "astra" for path in args.checkpoints):
        shards = Shards.split(length, min(N, length), speeds=args.speeds)
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
    return length, stride


def example(checkpoint: Checkpoint, length: int) -> Any:
    """One input of a model: an image, or a sequence of `length` tokens."""
    config = checkpoint.config
    if checkpoint.config.input_kind == "images":
        return jnp.zeros((1, config.image_size, config.image_size, config.num_channels))
    return Text(jnp.zeros((1, length), jnp.int32), jnp.full((1,), length, jnp.int32))


@partial(jax.jit, static_argnames=("graphdef", "N", "speeds", "lost"))
def run_virtual(
    graphdef: Any,
    state: Any,
    inputs: Any,
    N: int,
    speeds: tuple[float, ...],
    there: Bool[Array, "L B N slots"] | None = None,
    lost: Literal["masked", "predicted"] = "predicted",
) -> Array:
    """Inputs -> outputs of a model on one device with N virtual shards, of which `there` tells what codes arrived.

    Jitted here, not where it is used, so that all tries under packet loss share one program.
    """
    model = nnx.merge(graphdef, state)
    tokens, shards = model.to_tokens(inputs), model.shards(N, inputs, speeds)
    strategy = Virtual(shards, arrived=there, lost=lost) if N > 1 else Single(shards)
    out = model(shards.scatter(tokens), strategy)[0]
    return shards.gather(out, tokens.shape[1]) if model.per_token else out


def mean_and_spread(found: Sequence[Metrics]) -> Metrics:
    """The mean of every column over several tries, and behind it the standard deviation (of a sample; None of one try).

    Counts, which are whole numbers, are the same in all of them.
    """
    row: Metrics = {}
    for column, first in found[0].items():
        values = [metrics[column] for metrics in found]
        if isinstance(first, int):
            row[column] = first
        else:
            row[column] = float(np.mean(values))
            row[f"{column} sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return row


@dataclasses.dataclass(frozen=True)
class Trial:
    """A checkpoint on N devices, about to show what it can do; `say` is told what is done to its texts, and `tell` what
    is read."""

    checkpoint: Checkpoint
    args: Args
    N: int
    strategy: str
    say: Callable[[str], None]
    loss: Loss | None
    tell: Tell

    @property
    def speeds(self) -> tuple[float, ...]:
        """Of the N devices; () for equal ones."""
        return self.args.speeds if self.N > 1 else ()

    def run(self, model: Any, seed: int | None = None) -> Run:
        """Inputs -> outputs of the checkpoint's model, or of one around it: on a (data, N) mesh, or on one device with
        N virtual shards, under packet loss if there is a seed: it and the number of a batch decide what is lost."""
        # Of several hosts, each does by itself what takes one device.
        alone = self.N == 1 and jax.distributed.is_initialized()
        if not (self.args.virtual or alone):
            mesh = make_mesh(self.N, devices_of(self.args)[0])
            make = STRATEGIES[self.strategy].of
            program, batch = parallelize(model, mesh, make, self.args.fast_path == "on"), itertools.count(1)

            def together(inputs: Any) -> Array:
                say_read(f"batch {next(batch)} of the data", inputs)
                return program(inputs)

            return together
        graphdef, state = nnx.split(model)
        if seed is None:
            return lambda inputs: run_virtual(graphdef, state, inputs, self.N, self.speeds)
        loss, astra, L = self.loss, self.checkpoint.astra, self.checkpoint.config.num_hidden_layers
        assert loss is not None and astra is not None
        number, silent = itertools.count(), int(astra.side_info != "none")

        def lossy(inputs: Any) -> Array:
            shards, B = model.shards(self.N, inputs, self.speeds), jax.tree.leaves(inputs)[0].shape[0]
            rng = np.random.default_rng([seed, next(number)])
            there = jnp.asarray(arrived(loss, shards, astra.token_bits, L, B, rng, silent))
            return run_virtual(graphdef, state, inputs, self.N, self.speeds, there, lost_of(astra, self.args))

        return lossy

    def reached(self, model: Any, score: Callable[[Run, str], Metrics]) -> Metrics:
        """What `score(run, label)` finds; under packet loss mean, standard deviation and `seeds`, what each try found.

        Args:
          model: what is run.
          score: its label is what a progress bar has to show behind its own.
        """
        if self.args.loss is None:
            return score(self.run(model), "")
        if self.loss is None:  # one device, beside others that lose packets
            found = [score(self.run(model), "")]
        else:
            found = [score(self.run(model, seed), f", seed {seed}") for seed in range(self.args.seeds or SEEDS)]
        return {**mean_and_spread(found), "seeds": found}

    def encode(self, texts: Sequence[str], limit: int | None = None) -> list[list[int]]:
        """The token ids of texts, cut to `limit` tokens if given."""
        encoded, cut = encode(self.checkpoint.tokenizer, texts, limit)
        if cut:
            self.say(f"{cut:,} of {len(texts):,} texts were cut to {limit:,} tokens")
        return encoded

    def say_short(self, sequences: Sequence[Sequence[int]], what: str) -> None:
        """Says how many sequences cannot be split over all devices."""
        lengths = np.asarray([len(ids) for ids in sequences])
        no_ids = np.broadcast_to(np.int32(0), (len(lengths), max(lengths, default=1)))
        shards = self.checkpoint.model.shards(self.N, Text(no_ids, lengths), self.speeds)
        short = int(np.sum(np.min(shards.lengths, axis=-1) < 1))
        if short:
            self.say(
                f"{short:,} of {len(lengths):,} {what} are too short for all {self.N} devices and use only some of them"
            )

    def outputs(self, run: Run, sequences: Sequence[list[int]], label: str) -> Float[np.ndarray, "texts outputs"]:
        """What a model makes of every text: logits or an embedding."""
        limit, batch = longest(self.checkpoint.config), self.args.batch_size or 64
        rows = dict(run_batches(run, sequences, limit, batch, f"texts{label}"))
        return np.stack([rows[place] for place in range(len(rows))])

    def short_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of texts that the model takes whole, or cut to what it takes."""
        sequences = self.encode(texts, longest(self.checkpoint.config))
        self.say_short(sequences, "texts")
        return sequences


def image_accuracy(trial: Trial) -> Metrics:
    """Share of the images whose highest logit is their label."""
    args, batch = trial.args, trial.args.batch_size or 64
    data = args.open(model_classes(trial.checkpoint))
    trial.tell(data.account.first(args.limit, data.labels))
    total = min(len(data), args.limit or len(data))

    def score(run: Run, label: str) -> Metrics:
        right = 0
        with progress(f"images{label}", total) as advance:
            for images, labels in batches(data, trial.checkpoint.processor, batch, limit=args.limit):
                # The last batch is filled up, so that one compiled program serves all.
                filled = np.pad(images, [(0, batch - len(images))] + [(0, 0)] * 3)
                predicted = np.argmax(np.asarray(run(filled)), axis=-1)[: len(labels)]
                right += int((predicted == labels).sum())
                advance(len(labels), accuracy=right / total)
        return {"accuracy %": 100 * right / total}

    return trial.reached(trial.checkpoint.model, score)


def text_accuracy(trial: Trial) -> Metrics:
    """Share of the texts whose highest logit is their label."""
    data = trial.args.open_labelled(model_classes(trial.checkpoint))
    trial.tell(data.account.first(trial.args.limit, data.labels))
    rows = [data[i] for i in range(min(len(data), trial.args.limit or len(data)))]
    labels, sequences = [row["label"] for row in rows], trial.short_texts([row["text"] for row in rows])

    def score(run: Run, label: str) -> Metrics:
        predicted = np.argmax(trial.outputs(run, sequences, label), axis=-1)
        return {"accuracy %": 100 * float(np.mean(predicted == labels))}

    return trial.reached(trial.checkpoint.model, score)


def text_perplexity(trial: Trial) -> Metrics:
    """Perplexity of the documents over sliding windows."""
    length, stride = window(trial.checkpoint.config, trial.args)
    texts = trial.args.open_documents()
    trial.tell(texts.account.first(trial.args.limit))
    documents = trial.encode(texts[: trial.args.limit])
    if short := sum(len(ids) < 2 for ids in documents):
        trial.say(f"{short:,} document(s) of less than 2 tokens are left out: nothing is predicted in them")
    trial.say(f"{len(documents):,} document(s) in windows of {length:,} tokens, stride {stride:,}")
    parts = [part for ids in documents for part in windows(ids, length, stride)]
    trial.say_short([part.ids for part in parts], "windows")
    ends = sum(len(part.ids) - 1 - part.counted for part in parts if part.counted and len(part.ids) < length)
    if trial.strategy == "astra" and ends:
        total = sum(len(part.ids) - 1 - part.counted for part in parts)
        trial.say(
            f"{ends:,} of {total:,} predictions count in the shorter last window of a document, at the ends of shards "
            "alone, where more of the context is exact"
        )

    def score(run: Run, label: str) -> Metrics:
        found = perplexity(run, documents, length, stride, trial.args.batch_size or 8, f"windows{label}")
        return {"perplexity": found.perplexity, "nats per token": found.nll, "tokens": found.tokens}

    return trial.reached(NextTokenLoss(trial.checkpoint.model), score)


def similarity(trial: Trial) -> Metrics:
    """How the similarities of the embeddings of two sentences correlate with what people say of them."""
    pairs = trial.args.open_pairs()
    trial.tell(pairs.account.first(trial.args.limit))
    first, second, scores = zip(*pairs[: trial.args.limit], strict=True)
    sequences, by = trial.short_texts(first + second), trial.checkpoint.config.similarity

    def score(run: Run, label: str) -> Metrics:
        embeddings = trial.outputs(run, sequences, label)
        return correlations(embeddings[: len(first)], embeddings[len(first) :], np.asarray(scores), by)

    return trial.reached(trial.checkpoint.model, score)


MEASURES = {"perplexity": text_perplexity, "classification": text_accuracy, "similarity": similarity}


def measure(
    path: Path, args: Args, say: Callable[[str], None], groups: int | None = None, tell: Tell | None = None
) -> dict[str, Any]:
    """One row of the table: what a checkpoint reaches and what it costs.

    `say` is told what is done to its texts, and `tell` what is read; without `tell` that is said, too.

    With `groups` only the first so many are used, where it has a codec that allows that.

    Beside the columns it has `astra`, the configuration of the codes, for those who read the JSON; under packet loss
    `seeds`, too: the metrics of every try.
    """
    coded_blocks = args.coded_blocks if checkpoints.read_meta(path).astra else None  # beside an original
    checkpoint = checkpoints.load(path, groups=groups, coded_blocks=coded_blocks)
    if args.weights:
        checkpoint = dataclasses.replace(checkpoint, model=quantize_weights(checkpoint.model, args.weights))
    model, config = checkpoint.model, checkpoint.config
    strategy = strategy_of(checkpoint, args)
    N = devices_of(args)[1] if strategy != "single" else 1
    astra = checkpoint.astra if strategy == "astra" else None
    images = checkpoint.config.input_kind == "images"
    T = config.num_patches if images else window(config, args)[0]
    loss = loss_of(args) if N > 1 else None
    make, fast_path = STRATEGIES[strategy].of, args.fast_path == "on"
    make(model, N)  # what cannot be split is told before any data are read
    model.shards(N, speeds=args.speeds if N > 1 else ())
    told = tell or (lambda account: say(str(account)))
    trial = Trial(checkpoint, args, N, strategy, lambda text: say(f"{path.name}: {text}"), loss, told)
    reached = image_accuracy(trial) if images else MEASURES[task_of(config)](trial)
    say_read("all data", ())
    inputs = example(checkpoint, T)
    coded = Astra(model.shards(N, inputs, args.speeds)) if astra else None
    sent = coded.messages(model) if coded and args.virtual else messages(model, N, inputs, make, fast_path)
    # How long a device of another speed would take is not known here.
    compute = None if N > 1 and args.speeds else compute_seconds(model, N, inputs, make, fast_path=fast_path)
    bits = astra.mean_bits(config.num_hidden_layers) if astra else None
    return {
        "checkpoint": path.name,
        "astra": dataclasses.asdict(astra) if astra else None,
        "strategy": strategy,
        "N": N,
        "G": astra.groups if astra else None,
        "T": T,
        **({"lost": lost_of(astra, args) if astra else None} if args.loss is not None else {}),
        **reached,
        "weight MB": weight_bytes(model) / 1e6,
        "bits": bits,
        "ratio": config.hidden_size * 32 / bits if bits else None,
        "bytes": sum(m.bits * m.times for m in sent) // 8,
        "compute ms": None if compute is None else 1e3 * compute,
        **{
            rate: None if compute is None else 1e3 * pass_seconds(compute, sent, N, Link(parse_rate(rate)))
            for rate in args.rates
        },
    }


def main(args: Args) -> None:
    """Runs `astra eval`."""
    report = Report("eval", args.json)
    if not args.checkpoints:
        raise AstraError("no checkpoint was given: astra eval CHECKPOINT [CHECKPOINT ...] --data DATA")
    for rate in args.rates:
        parse_rate(rate)
    check_counts(args.batch_size, args.limit)
    if args.plot:
        plots.check_plot(args.plot)
    args = check_simulation(args)
    if not args.virtual:
        D, N = devices_of(args)
        # Before JAX starts, so that it makes enough CPU devices.
        open_mesh(f"{D}x{N}", args.several, checkpoints=args.checkpoints, same=lambda: options(args))
    task, loss = check_task(args), loss_of(args)
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
    kind = checkpoints.read_meta(args.checkpoints[0]).config.input_kind
    what = "image" if kind == "images" else "sequence of T tokens"
    shown = [{column: value for column, value in row.items() if column != "astra"} for row in rows]
    report.table("rows", f"{args.data} [{args.split}]", shown)
    report.data["rows"] = rows
    report.say(
        f"N devices; weights as {args.weights or 'in full precision'}; bits per token and block; compression ratio; "
        f"bytes that a device sends for one {what}, {'as predicted' if args.virtual else 'as compiled'}\n"
        f"compute: one device's share of one {what}, measured here; then its latency in ms, predicted for each rate"
    )
    if loss is not None:
        how = "one by one" if loss.burst is None else f"in bursts of {loss.burst:g} on average"
        report.say(
            f"a share of {loss.rate:g} of the packets of {loss.packet:,} bytes is lost, {how}, on virtual shards: "
            f"mean and standard deviation (sd) over {args.seeds or SEEDS} seed(s)\n"
            "lost: tokens in them are masked out of a block's attention, or predicted from the block before",
            loss=dataclasses.asdict(loss),
            seeds=tries,
        )
    if args.speeds:
        report.say(
            f"tokens are split for speeds {' '.join(f'{s:g}' for s in args.speeds)}, on virtual shards; "
            "unequal devices are not timed here",
            speeds=list(args.speeds),
        )
    if args.plot:
        plots.metric_and_latency(rows, METRICS[task], what.removesuffix(" of T tokens"), args.rates, args.plot)
        report.say(f"plot: {args.plot}", plot=str(args.plot))
    report.close()
