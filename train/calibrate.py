"""Find codebooks: run real inputs through the model at full precision and cluster what every block's quantizer sees.

Needs no labels and no training; the result runs on several devices at once. `astra finetune` then wins back most of the
accuracy that quantization costs.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

import checkpoints
from astra_jax.codecs.axes import candidates, principal_axes
from astra_jax.codecs.base import usage
from astra_jax.codecs.config import (
    CODED,
    AstraConfig,
    ClassToken,
    Codec,
    Kind,
    NestedPQConfig,
    Prediction,
    Site,
    VQConfig,
    codec_and_predictor,
    doubling,
)
from astra_jax.errors import AstraError
from astra_jax.inputs.token_batches import Text
from astra_jax.report import Report, progress
from astra_jax.strategies.base import Single
from astra_jax.strategies.coded import Astra
from checkpoints import Checkpoint
from checkpoints.tensor_maps import embeds
from eval.datasets.account import Tell, telling
from eval.datasets.labelled import DataArgs
from eval.datasets.labels import model_classes
from train.data import sequences
from train.fit_codecs import attention_at, fit, key_value_metric, linear_predictor

TOKENS_AT_ONCE = 2048
Schedule = Literal["coded", "known", "auto", "known+auto"]

SPARE = 2  # of so many tokens that the model sees one is clustered: more texts differ more, but take longer
TRIAL_SHARDS, TRIAL_TOKENS, TRIAL_ITERATIONS = 4, 4096, 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(DataArgs):
    """Arguments of `astra calibrate`."""

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A checkpoint made by `astra convert`."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Where the checkpoint with codebooks goes."""
    groups: int = 32
    """G: codes per token and block. More groups cost more bits and keep more accuracy."""
    codewords: int = 1024
    """K: codewords per group, a power of two. A code takes log2(K) bits."""
    codec: Codec = "vq"
    """`vq` cuts vectors into equal groups, as the paper does; `nested-pq` finds axes along which bits say more, and its
    first groups are a good code by themselves, for links that carry less."""
    predictor: Prediction = "none"
    """Let codes say how a token differs from what is expected of it after the block before, by a linear map, or by a
    small network that also sees a mean of the tokens around (`mlp`: says most, and takes longest to find). Costs
    computing, on every device for all tokens."""
    hidden_units: int = 128
    """Of the predictor mlp."""
    schedule: Schedule = "coded"
    """With a predictor: whether codes of all blocks are sent (`coded`); token ids once, so that a text's first block
    needs none (`known`); or, of the first so many blocks, chosen so that at the same bits the result is closest to that
    of one device (`auto`, and `known+auto`)."""
    site: Site = "hidden"
    """What is quantized: the input of the K and V projections, or K and V themselves."""
    class_token: ClassToken = "distributed"
    """One class token replica per device, or one on the first device only."""
    samples: int = 1024
    """How many images or texts to look at."""
    length: int | None = None
    """Tokens of a text; by default what the model takes, but at most 512."""
    tokens: int = 32_768
    """How many of their tokens to cluster in every block."""
    iterations: int = 12
    """Iterations of k-means."""
    seed: int = 0
    """Seed of the random starting codewords."""
    json: Path | None = None
    """Also write everything printed to this file."""

    @property
    def without_codes(self) -> str:
        """What devices go by where none of the codes arrive."""
        return f"token ids alone, {self.predictor}" if "known" in self.schedule else "nothing of other devices"


def codec_options(name: str, text: bool, auto: bool) -> dict[str, Any]:
    """The fields of `Args` for `CODEC` or `CODEC+PREDICTOR`. Raises AstraError if there is no such thing.

    Args:
      text: whether the model reads texts, of which with a predictor token ids are sent.
      auto: whether, with a predictor, calibration is to choose how many blocks send codes.
    """
    codec, predictor = codec_and_predictor(name)
    parts = [] if predictor == "none" else ["known"] * text + ["auto"] * auto
    return {"codec": codec, "predictor": predictor, "schedule": "+".join(parts) or "coded"}


def inputs(checkpoint: Checkpoint, args: Args, tell: Tell) -> list[Any]:
    """Batches of what the model takes: images, or `Text` of equal length. `tell` is told what is read."""
    if checkpoint.config.input_kind == "images":
        # Whose classes they are matters to nobody here, but what is said of them is to be right.
        data = args.open(model_classes(checkpoint) if args.labels else None)
        rows = np.random.default_rng(args.seed).permutation(len(data))[: args.samples]
        tell(data.account.some(rows, data.labels))
        parts = np.split(rows, range(32, len(rows), 32))
        return [checkpoint.processor([data[int(i)]["image"] for i in part]) for part in parts]
    text, _ = sequences(checkpoint, args, args.length, tell)
    rows = np.random.default_rng(args.seed).permutation(len(text.ids))[: args.samples]
    size = max(1, TOKENS_AT_ONCE // text.ids.shape[1])
    return [Text(text.ids[part], text.lengths[part]) for part in np.split(rows, range(size, len(rows), size))]


def capture(
    model: Any, batches: list[Any], tokens: int, seed: int, class_token: ClassToken, S: int = 1
) -> Float[np.ndarray, "L M D"]:
    """The inputs of every block's projections, for up to `tokens` random tokens of the batches that would be sent.

    The model sees no more batches than hold `SPARE` times as many.

    Args:
      class_token: `single` is sent as any other token is, replicas of a `distributed` one are not.
      S: tokens come in shards of so many that follow each other in a sequence.
    """
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state: Any, batch: Any) -> Array:
        model = nnx.merge(graphdef, state)
        shards = model.shards(1, batch)
        y = model(shards.scatter(model.to_tokens(batch)), Single(shards, capture=True))[1].captured  # [L,B,S,D]
        return y.reshape(y.shape[0], -1, y.shape[-1]).astype(jnp.float32)

    places = [_in_shards(_sent(model, batch, class_token), S) for batch in batches]
    there = np.cumsum([len(of_batch) for of_batch in places])
    there = there[: 1 + np.searchsorted(there, SPARE * tokens // S)]
    rng = np.random.default_rng(seed)
    kept = []
    shares = np.diff(np.round(there / there[-1] * min(tokens // S, there[-1])), prepend=0)
    with progress("activations", len(there)) as advance:
        for batch, of_batch, share in zip(batches, places, shares, strict=False):
            chosen = rng.permutation(len(of_batch))[: int(share)]
            kept.append(np.asarray(run(state, batch))[:, of_batch[np.sort(chosen)].reshape(-1)])
            advance()
    return np.concatenate(kept, axis=1)


def _sent(model: Any, batch: Any, class_token: ClassToken) -> Bool[np.ndarray, "B S"]:
    """Which tokens have codes to be sent: no replicas of the class token, and no padding."""
    shards = model.shards(1, batch)
    if shards.class_token is not None:  # a model without codebooks does not know which kind it is to have
        shards = dataclasses.replace(shards, class_token=class_token)
    tokens = Single(shards).tokens()
    sent = np.asarray(tokens.valid & tokens.sent)
    return np.broadcast_to(sent, (len(jax.tree.leaves(batch)[0]), sent.shape[-1]))


def _in_shards(sent: Bool[np.ndarray, "B T"], S: int) -> Int[np.ndarray, "shards S"]:
    """The places of tokens that are sent, among B T, in shards of S neighbours; a sequence's last few are left out."""
    rows = (np.flatnonzero(row) + number * sent.shape[1] for number, row in enumerate(sent))
    return np.concatenate([row[: len(row) // S * S].reshape(-1, S) for row in rows])


def check_schedule(args: Args) -> None:
    """Raises AstraError where a schedule needs a predictor."""
    if args.schedule != "coded" and args.predictor == "none":
        raise AstraError(f"--schedule {args.schedule} needs a predictor: give --predictor linear, too")


def schedules(astra: VQConfig, schedule: Schedule, L: int, codec: Codec, width: int) -> list[VQConfig]:
    """The configurations that `--schedule` lets calibration choose from: all take as many bits, or where the groups of
    `vq` have to divide the width a little fewer (our choice).

    Of `auto` all blocks are coded, or the first half of them with twice as many groups, or a quarter with four times.

    Args:
      L: blocks.
      width: of what is quantized, which the groups of `vq` must divide.
    """
    nothing: tuple[Kind, ...] = ()
    known: tuple[Kind, ...] = ("known",)
    predicted: tuple[Kind, ...] = ("predicted",)
    before = known if "known" in schedule else nothing
    coded, found = L - len(before), []
    shares = (1, 2, 4) if "auto" in schedule else (1,)
    for first in dict.fromkeys(-(-coded // share) for share in shares):
        groups = astra.groups * coded // first
        if codec == "vq" and groups != astra.groups:
            groups = max(g for g in range(1, groups + 1) if width % g == 0)
        kinds = before + CODED * first + predicted * (coded - first)
        found.append(dataclasses.replace(astra, groups=groups, schedule=() if kinds == CODED * L else kinds))
    return found


def axis_variances(source: Checkpoint, astra: AstraConfig, y: Float[np.ndarray, "L M D"]) -> Float[np.ndarray, "L W"]:
    """How much tokens differ along every block's axes, the greatest first; with a predictor what it leaves, from exact
    vectors, as estimates are not there yet.

    Args:
      source: without codebooks.
      y: from `capture`.
    """
    blocks = checkpoints.with_codebooks(source, VQConfig(groups=1, site=astra.site)).model.blocks
    variances, before = [], None
    with progress("axes", len(y)) as advance:
        for number in range(len(y)):
            attention = attention_at(blocks, number)
            sent = rest = np.asarray(attention.codec_input(jnp.asarray(y[number])))
            if astra.predictor != "none" and before is not None:
                rest = sent - np.asarray(linear_predictor(astra, before, sent)(jnp.asarray(before), jnp.asarray))
            variances.append(principal_axes(rest, key_value_metric(attention)).variance)
            before = sent
            advance()
    return np.stack(variances)


def _splits(astra: AstraConfig, variances: Float[np.ndarray, "L W"]) -> list[AstraConfig]:
    """Nested codes with as many groups, whose axes are divided among these in several ways."""
    levels = doubling(astra.groups)
    return [NestedPQConfig.of(astra, widths, levels) for widths in candidates(variances, levels, astra.codewords)]


def _closest(
    source: Checkpoint, tries: Sequence[AstraConfig], y: Float[np.ndarray, "L M D"], batch: Any, exact: Any, seed: int
) -> tuple[float, AstraConfig]:
    """The least distance of several tries, up to the first that is worse than one before, and the try."""
    distances = list[float]()
    for one in tries:
        model = checkpoints.with_codebooks(source, one).model
        fit(model, y[:, : max(TRIAL_TOKENS, 2 * one.codewords)], TRIAL_ITERATIONS, seed)
        distances.append(distance(exact, head_input(model, batch, TRIAL_SHARDS)))
        if distances[-1] > min(distances):
            break
    return min(distances), tries[int(np.argmin(distances))]


def choose(
    source: Checkpoint,
    schedules: Sequence[AstraConfig],
    codec: Codec,
    y: Float[np.ndarray, "L M D"],
    batch: Any,
    seed: int,
) -> AstraConfig:
    """Of several configurations the one with which what the model computes on `TRIAL_SHARDS` devices is closest to what
    one computes, measured with fewer tokens and iterations. The error of keys and values alone does not tell: a few
    tokens that all others attend to can be far off without being seen in it.

    Nested codes are tried with several splits of their axes into groups, from the one with the fewest axes on until one
    is worse than one before.

    Args:
      source: without codebooks.
      schedules: all but what the codec adds.
      y: from `capture`.
      batch: what the model takes.
    """
    # The linear part of an `mlp` will do for this.
    tried = [
        dataclasses.replace(one, predictor="linear" if one.predictor == "mlp" else one.predictor) for one in schedules
    ]
    tries: list[list[AstraConfig]] = [[one] for one in tried]
    if codec == "nested-pq":
        variances = axis_variances(source, tried[0], y)
        tries = [_splits(one, variances) for one in tried]
    best = tries[0][0]
    if sum(map(len, tries)) > 1:
        exact = head_input(source.model, batch, 1)
        best = min((_closest(source, one, y, batch, exact, seed) for one in tries), key=lambda found: found[0])[1]
    return dataclasses.replace(best, predictor=schedules[0].predictor)


def head_input(model: Any, batch: Any, N: int) -> Array:
    """What a model's head reads, on N virtual shards or, for N = 1, one device at full precision."""
    return _head_input(*nnx.split(model), batch, N)


@partial(jax.jit, static_argnames=("graphdef", "N"))
def _head_input(graphdef: Any, state: Any, batch: Any, N: int) -> Array:
    model = nnx.merge(graphdef, state)
    shards, tokens = model.shards(N, batch), model.to_tokens(batch)
    features, _ = model.features(shards.scatter(tokens), Astra.virtual(shards) if N > 1 else Single(shards))
    return shards.gather(features, tokens.shape[1]) if model.per_token else features


def distance(exact: Float[Array, "*of D"], found: Float[Array, "*of D"]) -> float:
    """How far what a model's head reads is from what it is to read: the mean square of the difference, over that of the
    latter."""
    return float(jnp.sum((found - exact) ** 2) / jnp.sum(exact**2))


def main(args: Args) -> None:
    """Runs `astra calibrate`."""
    for name in ("samples", "tokens", "iterations"):
        if (value := getattr(args, name)) < 1:
            raise AstraError(f"--{name} is {value}; it must be at least 1")
    if args.seed < 0:
        raise AstraError(f"--seed is {args.seed}; it must be 0 or more")
    report = Report("calibrate", args.json)
    astra = VQConfig(
        *(args.groups, args.codewords, args.site, args.class_token),
        predictor=args.predictor,
        hidden_units=args.hidden_units,
    )
    check_schedule(args)
    source = checkpoints.load(args.checkpoint, param_dtype=None)  # what is not trained keeps its number format
    if "known" in args.schedule and source.config.input_kind == "images":
        raise AstraError(f"--schedule {args.schedule}: token ids are of texts; this is a {source.family}: use auto")
    batches = inputs(source, args, telling(report))
    S = 1
    if astra.predictor == "mlp":  # which looks at the tokens around: as long as shards of the trials
        S = max(1, int(np.median(_sent(source.model, batches[0], args.class_token).sum(1))) // TRIAL_SHARDS)
    y = capture(source.model, batches, args.tokens, args.seed, args.class_token, S)
    width = checkpoints.with_codebooks(source, VQConfig(groups=1, site=args.site)).model.codec.width
    trial = batches[-2:][0]  # the last may have few
    chosen = choose(source, schedules(astra, args.schedule, len(y), args.codec, width), args.codec, y, trial, args.seed)
    checkpoint = checkpoints.with_codebooks(source, chosen)
    model = checkpoint.model
    errors = fit(model, y, args.iterations, args.seed, S)
    used = jax.device_get(jax.jit(usage)(model.codec.counts()))
    report.table(
        "blocks",
        f"G={chosen.groups}, K={chosen.codewords}: {chosen.mean_bits(len(y)):g} bits per token and block",
        [
            {
                "block": block,
                "tokens are": chosen.kinds(len(y))[block],
                "relative error": error.vector,
                "of keys and values": error.key_value,
                "codewords used": float(used.used[block].mean()),
                "perplexity": float(used.perplexity[block].mean()),
            }
            for block, error in enumerate(errors)
        ],
    )
    provenance = {
        "verb": "calibrate",
        "checkpoint_sha256": source.digest,
        "data": args.data,
        "split": args.split,
        "tokens": int(y.shape[1]),
    }
    checkpoint = dataclasses.replace(checkpoint, history=(*checkpoint.history, provenance))
    checkpoints.save(args.out, checkpoint)
    report.say(f"wrote {args.out}", out=str(args.out))
    verb = f"eval {args.out}" if embeds(checkpoint.config) else f"finetune {args.out} {args.out}-finetuned"
    report.say(f"next: astra {verb} --data {args.data}")
    report.close()
