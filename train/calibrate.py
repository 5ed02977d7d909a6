"""Find codebooks: run real inputs through the model at full precision and cluster what every block's quantizer sees.

Needs no labels and no training; the result runs on several devices at once. `astra finetune` then wins back most of the
accuracy that quantization costs.
"""

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

import checkpoints
from astra_jax.codecs.config import AstraConfig, ClassToken, Codec, Prediction, SideInfo, Site, doubling
from astra_jax.codecs.predictor import Around, Known, Predictor, around
from astra_jax.codecs.quantizer import RotatedQuantizer, VectorQuantizer, padded, usage
from astra_jax.errors import AstraError
from astra_jax.inputs.token_batches import Text
from astra_jax.models.blocks import block_at
from astra_jax.report import Report, progress
from astra_jax.strategies.base import Single, Virtual
from checkpoints import Checkpoint
from eval.datasets.account import Tell, telling
from eval.datasets.labelled import DataArgs
from eval.datasets.labels import model_classes
from train.axes import candidates, codeword_spread, key_value_metric, principal_axes
from train.data import sequences
from train.fit_predictor import regress, train_mlp
from train.kmeans import kmeans

TOKENS_AT_ONCE = 2048
SPARE = 2  # of so many tokens that the model sees one is clustered: more texts differ more, but take longer
LATER = 4  # see `fit`
ERROR_TOKENS = 8192  # that errors are shown of: no more than twice as many, because more say the same
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
    small network that also sees a mean of the tokens around (`mlp`: says more, and takes longer to find). Costs
    computing, on every device for all tokens."""
    hidden_units: int = 128
    """Of the predictor mlp."""
    side_info: SideInfo = "none"
    """Of a text, send the token ids once, so that the first block needs no codes; with a predictor."""
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
        y = model(shards.scatter(model.to_tokens(batch)), Single(shards, capture=True))[1]  # [L,B,S,D]
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


def choose_widths(
    source: Checkpoint,
    astra: AstraConfig,
    levels: tuple[int, ...],
    y: Float[np.ndarray, "L M D"],
    batch: Any,
    seed: int,
) -> AstraConfig:
    """The configuration of a codec with axes of its own: how many of them every group gets.

    Of several splits it takes the one with which what the model computes on `TRIAL_SHARDS` devices is closest to what
    one computes, measured with fewer tokens and iterations, from the one with the fewest axes on until one is worse
    than one before. The error of keys and values alone does not tell: a few tokens that all others attend to can be far
    off without being seen in it.

    Args:
      source: without codebooks.
      astra: all but the widths, as of `vq`.
      levels: groups of every level of `nested-pq`.
      y: from `capture`.
      batch: what the model takes.
    """
    predictor = astra.predictor
    if predictor == "mlp":  # whose linear part will do for this
        astra = dataclasses.replace(astra, predictor="linear")
    blocks = checkpoints.with_codebooks(source, AstraConfig(groups=1, site=astra.site)).model.blocks
    variances, before = [], None
    with progress("axes", len(y)) as advance:
        for number in range(len(y)):
            attention = block_at(blocks, number).attention
            sent = rest = np.asarray(attention.codec_input(jnp.asarray(y[number])))
            if astra.predictor != "none" and before is not None:  # from exact vectors: estimates are not there yet
                rest = sent - np.asarray(_predictor(astra, before, sent)(jnp.asarray(before), jnp.asarray))
            variances.append(principal_axes(rest, key_value_metric(attention)).variance)
            before = sent
            advance()
    splits = candidates(np.stack(variances), levels, astra.codewords)
    tries = [dataclasses.replace(astra, codec="nested-pq", widths=widths, levels=levels) for widths in splits]
    if len(tries) == 1:
        return dataclasses.replace(tries[0], predictor=predictor)
    exact, distances = head_input(source.model, batch, 1), list[float]()
    for one in tries:
        model = checkpoints.with_codebooks(source, one).model
        fit(model, y[:, : max(TRIAL_TOKENS, 2 * astra.codewords)], TRIAL_ITERATIONS, seed)
        distances.append(distance(exact, head_input(model, batch, TRIAL_SHARDS)))
        if distances[-1] > min(distances):
            break
    return dataclasses.replace(tries[int(np.argmin(distances))], predictor=predictor)


def head_input(model: Any, batch: Any, N: int) -> Array:
    """What a model's head reads, on N virtual shards or, for N = 1, one device at full precision."""
    return _head_input(*nnx.split(model), batch, N)


@partial(jax.jit, static_argnames=("graphdef", "N"))
def _head_input(graphdef: Any, state: Any, batch: Any, N: int) -> Array:
    model = nnx.merge(graphdef, state)
    shards, tokens = model.shards(N, batch), model.to_tokens(batch)
    features, _ = model.features(shards.scatter(tokens), Virtual(shards) if N > 1 else Single(shards))
    return shards.gather(features, tokens.shape[1]) if model.per_token else features


def distance(exact: Float[Array, "*of D"], found: Float[Array, "*of D"]) -> float:
    """How far what a model's head reads is from what it is to read: the mean square of the difference, over that of the
    latter."""
    return float(jnp.sum((found - exact) ** 2) / jnp.sum(exact**2))


def _predictor(astra: AstraConfig, x: Float[np.ndarray, "M W"], y: Float[np.ndarray, "M W"]) -> Predictor:
    """A predictor of y from x."""
    predictor = Predictor(astra, x.shape[1])
    _set(predictor, regress(x, y))
    return predictor


def _set(predictor: Predictor, values: dict[str, Float[np.ndarray, "..."]]) -> None:
    for name, value in values.items():
        getattr(predictor, name)[...] = jnp.asarray(value, jnp.float32)


def _around(S: int, causal: bool, x: Float[Array, "M W"]) -> Float[Array, "M W"]:
    """What is around every token in its shard of S."""
    shards = x.reshape(-1, S, x.shape[-1])
    return around(shards, jnp.ones(shards.shape[:2], bool), causal).reshape(x.shape)


class Errors(NamedTuple):
    """What a block's codec loses: of the vectors that are sent, and of remote tokens' keys and values. Mean squares
    over the variance, so that 1 is what the mean alone would lose."""

    vector: float
    key_value: float


def fit(model: Any, y: Float[np.ndarray, "L M D"], iterations: int, seed: int, S: int = 1) -> list[Errors]:
    """Finds the codecs of `model`, block after block, in place: predictors from the estimates of the block before, the
    axes of `nested-pq`, and codewords by k-means along these. Its levels after the first take a `LATER`-th of the
    iterations: there are many, and what is left to them is nearly noise (our choice).

    Predictors of nested codes are to serve every number of levels, with one set of weights: each shard's estimates are
    made of a number of its own, the same in all blocks (our choice).

    Args:
      y: from `capture`.
      S: tokens of a shard in y.

    Returns:
      Every block's errors; without a predictor of the last clusters of k-means, which are a little more (see `kmeans`).

    Raises:
      AstraError: there are fewer tokens than codewords.
    """
    K, M, astra = model.codec.codewords, y.shape[1], model.astra
    if M < K:
        raise AstraError(f"{M} tokens are too few for {K} codewords: give more --samples or fewer --codewords")
    states, errors, estimate = [], [], None
    levels = max(1, len(astra.levels))
    depth = jax.random.randint(jax.random.key(seed), (M // S, 1), 1, levels + 1)  # levels that a shard is sent with
    depth = jnp.repeat(depth, S, axis=0)
    with progress("codewords", len(y)) as advance:
        for number, key in enumerate(jax.random.split(jax.random.key(seed), len(y))):
            attention = block_at(model.blocks, number).attention
            sent = attention.codec_input(jnp.asarray(y[number])).astype(jnp.float32)
            if number == 0 and astra.side_info == "token-ids":
                best = estimate = sent
            else:
                near = partial(_around, S, model.shards(1).causal)
                best, estimate = _fit_block(attention, astra, estimate, near, sent, depth, iterations, key)
            errors.append(_errors(attention, best, sent))
            states.append(nnx.state(attention.codec))
            advance(error=errors[-1].key_value)
    nnx.update(model.codec, jax.tree.map(lambda *blocks: jnp.asarray(np.stack(blocks)), *states))
    return errors


def _fit_block(
    attention: Any,
    astra: AstraConfig,
    before: Any,
    around: Around,
    sent: Float[Array, "M W"],
    depth: Int[Array, "M 1"],
    iterations: int,
    key: Any,
) -> tuple[Float[Array, "M W"], Float[Array, "M W"]]:
    """Finds the codec of one block, in place, and returns what receivers make of all its codes, and of those that come.

    Args:
      before: the estimate of the block before; None in the first block, or without predictor.
      around: see `Predictor`.
      sent: what the codec is to quantize.
      depth: how many levels of a token's codes come.
    """
    codec, p = attention.codec, jnp.zeros(sent.shape[1])
    settle = astra.predictor != "none"  # the next block goes on from what devices will have
    if astra.predictor != "none":
        if before is None:
            codec.predictor.bias[...] = sent.mean(0)
            p = codec.predict(Known(None), around)
        else:
            codec.predictor = _predictor(astra, np.asarray(before), np.asarray(sent))
            if astra.predictor == "mlp":
                seen, target = np.concatenate([before, around(before)], axis=1), np.asarray(sent)
                metric = key_value_metric(attention)
                _set(codec.predictor, train_mlp(astra.hidden_units, seen, target, metric, key))
            p = codec.predict(before, around)
    rest = sent - p
    if not isinstance(codec, RotatedQuantizer):
        widths = (codec.width // codec.groups,) * codec.groups
        estimate = p + _fit_codewords(codec, np.asarray(rest), widths, iterations, key, settle)
        return estimate, estimate
    axes = principal_axes(np.asarray(rest), key_value_metric(attention))
    codec.mean[...] = jnp.asarray(axes.mean, jnp.float32)
    codec.analysis[...] = jnp.asarray(axes.analysis[:, : codec.width], jnp.float32)
    codec.synthesis[...] = jnp.asarray(axes.synthesis[: codec.width], jnp.float32)
    u = left = np.asarray(codec.axes(rest))
    missing = u.copy()
    for number, (level, widths, _) in enumerate(codec.each()):
        steps = -(-iterations // LATER) if number else iterations
        of_level = jax.random.fold_in(key, number)
        left = left - _fit_codewords(level, left, widths, steps, of_level, settle, principal=True)
        np.copyto(missing, left, where=number < np.asarray(depth))
    best, estimate = (p + codec.from_coordinates(jnp.asarray(u - rest)) for rest in (left, missing))
    return best, estimate


def _fit_codewords(
    codec: VectorQuantizer,
    y: Float[np.ndarray, "M A"],
    widths: tuple[int, ...],
    iterations: int,
    key: Any,
    settle: bool,
    principal: bool = False,
) -> Float[np.ndarray, "M A"]:
    """Finds the codewords for some vectors, in place, and returns what the vectors' codes stand for, to the letter if
    `settle` (see `kmeans`).

    Every group by itself, padded with zeros to few different widths: padding all to the widest is several times the
    work where widths differ, and a program for every width takes its time to compile.

    Args:
      widths: how many axes every group has, one behind the other. Axes behind the last group are in none.
      principal: along these axes the vectors do not correlate, and have no mean.
    """
    C, share, estimate = np.zeros(codec.codebook.shape, np.float32), np.zeros(codec.count.shape), np.zeros_like(y)
    variance = np.einsum("ma,ma->a", y, y) / len(y)

    def one_group(g: int, end: int, width: int, group_key: Any) -> None:
        axes = slice(end - width, end)
        spread = codeword_spread(variance[axes], codec.bits) if principal else np.ones(width)
        padding = (0, 0), (0, _rounded(width) - width)
        u, shrink = (jnp.asarray(np.pad(part, padding), jnp.float32) for part in (y[:, axes], spread[None]))
        found = jax.device_get(kmeans(u[:, None], codec.codewords, iterations, group_key, shrink, settle))
        C[g, :, :width], estimate[:, axes] = found.codewords[0, :, :width], found.estimate[:, 0, :width]
        share[g] = found.count[0] / len(y)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # one alone leaves cores idle
        places = range(len(widths)), np.cumsum(widths).tolist(), widths, jax.random.split(key, len(widths))
        list(pool.map(one_group, *places))
    codec.codebook[...], codec.count[...], codec.total[...] = map(jnp.float32, (C, share, C * share[..., None]))
    rest = y - estimate
    codec.residual_mean[...], codec.residual_var[...] = padded(jnp.stack([rest.mean(0), rest.var(0)]), widths)
    return estimate


def _rounded(width: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is no less."""
    step = max(1, 1 << (width - 1).bit_length() >> 2)
    return -(-width // step) * step


def _errors(attention: Any, estimate: Float[Array, "M W"], sent: Float[Array, "M W"]) -> Errors:
    metric = key_value_metric(attention)

    def squares(x: Float[np.ndarray, "M W"]) -> Float[np.ndarray, "2"]:
        """Of vectors, and of what they add to keys and values."""
        moments = x.T @ x
        return np.array([np.trace(moments), (moments * metric).sum()])

    few = slice(None, None, max(1, len(sent) // ERROR_TOKENS))
    exact, found = np.asarray(sent[few]), np.asarray(estimate[few])
    return Errors(*map(float, squares(exact - found) / squares(exact - exact.mean(0))))


def main(args: Args) -> None:
    """Runs `astra calibrate`."""
    for name in ("samples", "tokens", "iterations"):
        if (value := getattr(args, name)) < 1:
            raise AstraError(f"--{name} is {value}; it must be at least 1")
    if args.seed < 0:
        raise AstraError(f"--seed is {args.seed}; it must be 0 or more")
    report = Report("calibrate", args.json)
    astra = AstraConfig(
        *(args.groups, args.codewords, args.site, args.class_token),
        predictor=args.predictor,
        hidden_units=args.hidden_units,
        side_info=args.side_info,
    )
    source = checkpoints.load(args.checkpoint, param_dtype=None)  # what is not trained keeps its number format
    if astra.side_info != "none" and source.config.input_kind == "images":
        raise AstraError(f"--side-info {astra.side_info} is for texts; this is a {source.family}: leave it out")
    batches = inputs(source, args, telling(report))
    S = 1
    if astra.predictor == "mlp":  # which looks at the tokens around: as long as shards of the trials
        S = max(1, int(np.median(_sent(source.model, batches[0], args.class_token).sum(1))) // TRIAL_SHARDS)
    y = capture(source.model, batches, args.tokens, args.seed, args.class_token, S)
    if args.codec != "vq":
        trial = batches[-2:][0]  # the last may have few
        astra = choose_widths(source, astra, doubling(args.groups), y, trial, args.seed)
    checkpoint = checkpoints.with_codebooks(source, astra)
    model = checkpoint.model
    errors = fit(model, y, args.iterations, args.seed, S)
    used = usage(model.codec.counts())
    report.table(
        "blocks",
        f"G={astra.groups}, K={astra.codewords}: {astra.token_bits} bits per token and block",
        [
            {
                "block": block,
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
    report.say(f"next: astra finetune {args.out} {args.out}-finetuned --data {args.data}")
    report.close()
