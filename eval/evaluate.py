"""Quality, bits and predicted latency of one or more checkpoints, as one table and one plot.

Quality is the accuracy of a classifier of images or texts, the perplexity of a language model over sliding windows, or
how well the similarity of sentence embeddings follows what people say (Pearson's and Spearman's correlation).

A checkpoint with codebooks runs as ASTRA over the mesh that --devices picks, one without on a single device: give the
original first to compare. On a CPU the devices are made by the program itself.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jaxtyping import Array, Float

import checkpoints
from astra_jax.console import Report, progress
from astra_jax.errors import AstraError
from astra_jax.sharding import make_mesh, parse_devices
from astra_jax.strategies import Astra, Single, Virtual, need_codec, parallelize
from astra_jax.text import Text, longest
from checkpoints import Checkpoint
from eval import plots
from eval.data import DataArgs, batches, check_counts
from eval.hlo import collectives_in
from eval.network import latency, parse_rate
from eval.perplexity import NextTokenLoss, perplexity
from eval.text import run_batches, windows
from eval.timing import compute_seconds

# config.task -> what is measured; a model without that field classifies images.
TASKS = {"causal-lm": "perplexity", "classification": "classification", "embedding": "similarity"}
# Task -> the column of the plot.
METRICS = {"perplexity": "perplexity", "classification": "accuracy %", "similarity": "Spearman"}
LONGEST = 1024  # the longest default window, in tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(DataArgs):
    """Arguments of `astra eval`."""

    checkpoints: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT...")]
    """One or more checkpoints, the original first."""
    task: Literal["auto", "perplexity", "classification", "similarity"] = "auto"
    """What to measure; `auto` is what the checkpoint was made for."""
    split: str = "test"
    """Which part of the data; a slice such as test[:1000] goes too."""
    devices: str = "4"
    """The mesh: N devices over the tokens, or DxN for D batches at once."""
    virtual: bool = False
    """Run the N shards on one device: the same numbers, no mesh needed."""
    strategy: Literal["auto", "single"] = "auto"
    """`single` also runs checkpoints with codebooks on one device, without exchange."""
    length: int | None = None
    """Text: tokens of a window, and of the sequence that is timed; by default the model's limit, but at most 1024."""
    stride: int | None = None
    """Perplexity: tokens by which the windows move on; by default half of their length."""
    batch_size: int | None = None
    """Images, texts or windows per batch; by default 64, of windows 8."""
    limit: int | None = None
    """Stop after this many images, documents, texts or pairs."""
    rates: tuple[str, ...] = ("10mbit", "20mbit", "50mbit", "100mbit", "200mbit", "500mbit")
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
    if args.stride is not None and task != "perplexity":
        raise AstraError(f"--stride is for perplexity; {first} is a model for {task}: leave the option out")
    if args.length is not None and any(map(takes_images, described.values())):
        raise AstraError("--length is for text; a ViT's images all have the same size: leave the option out")
    return task


def takes_images(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint's model takes images, not text."""
    return checkpoint.family == "vit"


def window(config: Any, args: Args) -> tuple[int, int]:
    """Length and stride in tokens, for a model of text. Raises AstraError if the model cannot take that."""
    limit = config.max_position_embeddings
    length = min(limit, LONGEST) if args.length is None else args.length
    if not 2 <= length <= limit:
        raise AstraError(f"--length is {length}; this model takes from 2 to {limit} tokens")
    stride = length // 2 if args.stride is None else args.stride
    if not 1 <= stride <= length:
        raise AstraError(f"--stride is {stride}; windows of {length} tokens move by 1 to {length} tokens")
    return length, stride


def example(checkpoint: Checkpoint, length: int) -> Any:
    """One input of a model: an image, or a sequence of `length` tokens."""
    config = checkpoint.config
    if takes_images(checkpoint):
        return jnp.zeros((1, config.image_size, config.image_size, config.num_channels))
    return Text(jnp.zeros((1, length), jnp.int32), jnp.full((1,), length, jnp.int32))


def sent_bytes(model: Any, inputs: Any, N: int, virtual: bool) -> tuple[int, int]:
    """Bytes that one device sends for one input: codes in all blocks, and the state that the head reads, at the end.

    Read from the compiled program, or as the strategy predicts where the shards are virtual and no program gathers.
    Raises AstraError if the two differ.
    """
    config = model.config
    predicted = Astra(model.shards(N, inputs)).wire_bits(need_codec(model.codec)) * config.num_hidden_layers
    if virtual:
        return predicted // 8, 0 if model.per_token else 4 * config.hidden_size
    program = parallelize(model, make_mesh(N)).lower(inputs).compile().as_text()
    found = collectives_in(program)
    codes = sum(c.bytes // N * (c.trip_count or 1) for c in found if c.kind == "all-gather")
    if 8 * codes != predicted:
        raise AstraError(f"the program gathers {8 * codes} bits, but {predicted} were predicted: please report it")
    return codes, sum(c.bytes for c in found if c.kind != "all-gather")


@dataclasses.dataclass(frozen=True)
class Trial:
    """A checkpoint on N devices, about to show what it can do; `say` is told what is done to its texts."""

    checkpoint: Checkpoint
    args: Args
    N: int
    say: Callable[[str], None]

    def run(self, model: Any) -> Callable[[Any], Array]:
        """Inputs -> outputs of the checkpoint's model, or of one around it: on a (data, N) mesh, or on one device with
        N virtual shards."""
        if not self.args.virtual:
            return parallelize(model, make_mesh(self.N, parse_devices(self.args.devices)[0]))
        graphdef, state = nnx.split(model)

        @jax.jit
        def run(state: Any, inputs: Any) -> Array:
            model = nnx.merge(graphdef, state)
            tokens, shards = model.to_tokens(inputs), model.shards(self.N, inputs)
            out = model(shards.scatter(tokens), Virtual(shards) if self.N > 1 else Single(shards))[0]
            return shards.gather(out, tokens.shape[1]) if model.per_token else out

        return lambda inputs: run(state, inputs)

    def encode(self, texts: Sequence[str], limit: int | None = None) -> list[list[int]]:
        """The token ids of texts, cut to `limit` tokens if given."""
        tokenizer, encoded, cut = self.checkpoint.tokenizer, [], 0
        with progress("tokens", len(texts)) as advance:
            for text in texts:
                ids = tokenizer.encode(text)
                if limit is not None and len(ids) > limit:
                    ids, cut = tokenizer.encode(text, limit), cut + 1
                encoded.append(ids)
                advance()
        if cut:
            self.say(f"{cut:,} of {len(texts):,} texts were cut to {limit:,} tokens")
        return encoded

    def say_short(self, sequences: Sequence[Sequence[int]], what: str) -> None:
        """Says how many sequences cannot be split over all devices."""
        needed = self.N + self.checkpoint.model.shards(self.N).class_slots
        short = sum(len(ids) < needed for ids in sequences)
        if short:
            self.say(
                f"{short:,} of {len(sequences):,} {what} have fewer tokens than there are devices ({self.N}) and use "
                "only some of them"
            )

    def outputs(self, texts: Sequence[str]) -> Float[np.ndarray, "texts outputs"]:
        """What the model makes of every text: logits or an embedding."""
        limit = longest(self.checkpoint.config)
        sequences = self.encode(texts, limit)
        self.say_short(sequences, "texts")
        run = self.run(self.checkpoint.model)
        rows = dict(run_batches(run, sequences, limit, self.args.batch_size or 64, "texts"))
        return np.stack([rows[place] for place in range(len(rows))])


def image_accuracy(trial: Trial) -> dict[str, Any]:
    """Share of the images whose highest logit is their label."""
    args, batch = trial.args, trial.args.batch_size or 64
    data, classify = args.open(trial.checkpoint.labels), trial.run(trial.checkpoint.model)
    total = min(len(data), args.limit or len(data))
    right = 0
    with progress("images", total) as advance:
        for images, labels in batches(data, trial.checkpoint.processor, batch, limit=args.limit):
            # The last batch is filled up, so that one compiled program serves all.
            filled = np.pad(images, [(0, batch - len(images))] + [(0, 0)] * 3)
            predicted = np.argmax(np.asarray(classify(jnp.asarray(filled))), axis=-1)[: len(labels)]
            right += int((predicted == labels).sum())
            advance(len(labels), accuracy=right / total)
    return {"accuracy %": 100 * right / total}


def text_accuracy(trial: Trial) -> dict[str, Any]:
    """Share of the texts whose highest logit is their label."""
    data = trial.args.open_labelled(trial.checkpoint.labels)
    rows = [data[i] for i in range(min(len(data), trial.args.limit or len(data)))]
    predicted = np.argmax(trial.outputs([row["text"] for row in rows]), axis=-1)
    return {"accuracy %": 100 * float(np.mean(predicted == [row["label"] for row in rows]))}


def text_perplexity(trial: Trial) -> dict[str, Any]:
    """Perplexity of the documents over sliding windows."""
    length, stride = window(trial.checkpoint.config, trial.args)
    documents = trial.encode(trial.args.open_documents()[: trial.args.limit])
    trial.say(f"{len(documents):,} document(s) in windows of {length:,} tokens, stride {stride:,}")
    trial.say_short([part.ids for ids in documents for part in windows(ids, length, stride)], "windows")
    run = trial.run(NextTokenLoss(trial.checkpoint.model))
    found = perplexity(run, documents, length, stride, trial.args.batch_size or 8)
    return {"perplexity": found.perplexity, "nats per token": found.nll, "tokens": found.tokens}


def similarity(trial: Trial) -> dict[str, Any]:
    """How the cosines of the embeddings of two sentences correlate with what people say of them."""
    first, second, scores = zip(*trial.args.open_pairs()[: trial.args.limit], strict=True)
    embeddings = trial.outputs(first + second)
    return correlations(embeddings[: len(first)], embeddings[len(first) :], np.asarray(scores))


def correlations(
    first: Float[np.ndarray, "pairs D"], second: Float[np.ndarray, "pairs D"], scores: Float[np.ndarray, "pairs"]
) -> dict[str, float]:
    """Pearson's and Spearman's correlation of scores with the cosines of embeddings.

    Raises AstraError where there is none: fewer than two pairs, or all scores or all cosines the same.
    """
    from scipy import stats

    norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    cosines = np.einsum("pd,pd->p", first, second) / np.maximum(norms, np.finfo(np.float32).tiny)
    for what, values in (("scores", scores), ("cosines", cosines)):
        if len(values) < 2 or np.ptp(values) == 0:
            raise AstraError(
                f"the {what} of {len(values)} pairs are all the same, so nothing correlates: give more or other pairs"
            )
    return {
        "Pearson": float(stats.pearsonr(cosines, scores).statistic),
        "Spearman": float(stats.spearmanr(cosines, scores).statistic),
    }


MEASURES = {"perplexity": text_perplexity, "classification": text_accuracy, "similarity": similarity}


def measure(path: Path, args: Args, say: Callable[[str], None]) -> dict[str, Any]:
    """One row of the table: what a checkpoint reaches and what it costs. `say` is told what is done to its texts."""
    checkpoint = checkpoints.load(path)
    model, config, astra = checkpoint.model, checkpoint.config, checkpoint.astra
    N = parse_devices(args.devices)[1]
    if astra is None or args.strategy == "single":
        astra, N = None, 1
    images = takes_images(checkpoint)
    T = config.num_patches if images else window(config, args)[0]
    trial = Trial(checkpoint, args, N, lambda text: say(f"{path.name}: {text}"))
    reached = image_accuracy(trial) if images else MEASURES[task_of(config)](trial)
    inputs = example(checkpoint, T)
    codes, pooled = sent_bytes(model, inputs, N, args.virtual) if N > 1 else (0, 0)
    compute = compute_seconds(model, N, inputs)
    bits = astra.groups * astra.bits if astra else None
    return {
        "checkpoint": path.name,
        "N": N,
        "G": astra.groups if astra else None,
        "T": T,
        **reached,
        "bits": bits,
        "ratio": config.hidden_size * 32 / bits if bits else None,
        "bytes": codes + pooled,
        "compute ms": 1e3 * compute,
        **{rate: 1e3 * latency(compute, 8 * codes, 8 * pooled, parse_rate(rate)) for rate in args.rates},
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
    data_devices, N = parse_devices(args.devices)
    if not args.virtual:
        make_mesh(N, data_devices)  # before JAX starts, so that it makes enough CPU devices
    task = check_task(args)
    notes: list[str] = []

    def say(text: str) -> None:
        notes.append(text)
        report.say(text, notes=notes)

    rows = [measure(path, args, say) for path in args.checkpoints]
    what = "image" if takes_images(checkpoints.read_meta(args.checkpoints[0])) else "sequence of T tokens"
    report.table("rows", f"{args.data} [{args.split}]", rows)
    report.say(
        "N devices; bits per token and block; compression ratio; "
        f"bytes that a device sends for one {what}, as compiled\n"
        f"compute: one device's share of one {what}, measured here; then its latency in ms, predicted for each rate"
    )
    if args.plot:
        plots.metric_and_latency(rows, METRICS[task], what.removesuffix(" of T tokens"), args.rates, args.plot)
        report.say(f"plot: {args.plot}", plot=str(args.plot))
    report.close()
