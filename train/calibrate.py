"""Find codebooks: run real inputs through the model at full precision and cluster what every block's quantizer sees.

Needs no labels and no training; the result runs on several devices at once. `astra finetune` then wins back most of the
accuracy that quantization costs.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jaxtyping import Array, Float, Int

import checkpoints
from astra_jax.config import AstraConfig, ClassToken, Codec, Prediction, SideInfo, Site, doubling
from astra_jax.console import Report, progress
from astra_jax.errors import AstraError
from astra_jax.models.blocks import block_at
from astra_jax.models.decoder import Decoder
from astra_jax.predictor import Known, Predictor
from astra_jax.quantizer import RotatedQuantizer, VectorQuantizer, padded, unpadded, usage
from astra_jax.strategies import Single, Virtual
from astra_jax.text import Text
from checkpoints import Checkpoint
from eval.data import DataArgs, batches
from train import rotation
from train.data import sequences
from train.kmeans import assign, kmeans, lookup
from train.prediction import regress

TOKENS_AT_ONCE = 8192
TRIAL_SHARDS, TRIAL_TOKENS, TRIAL_ITERATIONS, TRIAL_BATCHES = 4, 8192, 4, 2


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
    """`vq` cuts vectors into equal groups, as the paper does; `rotated-pq` finds axes along which bits say more;
    `nested-pq` does, too, and its first groups are a good code by themselves, for links that carry less."""
    predictor: Prediction = "none"
    """Let codes say how a token differs from what is expected of it after the block before, by a linear map or parts of
    one. Costs computing, on every device for all tokens."""
    rank: int = 16
    """Of the predictor low-rank."""
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


def inputs(checkpoint: Checkpoint, args: Args) -> list[Any]:
    """Batches of what the model takes: images, or `Text` of equal length."""
    if checkpoint.family == "vit":
        return [images for images, _ in batches(args.open(), checkpoint.processor, 32, limit=args.samples)]
    text, _ = sequences(checkpoint, args, args.length)
    rows = np.random.default_rng(args.seed).permutation(len(text.ids))[: args.samples]
    size = max(1, TOKENS_AT_ONCE // text.ids.shape[1])
    return [Text(text.ids[part], text.lengths[part]) for part in np.split(rows, range(size, len(rows), size))]


def capture(model: Any, batches: list[Any], tokens: int, seed: int) -> Float[np.ndarray, "L M D"]:
    """The inputs of every block's projections, for up to `tokens` random tokens of the batches that would be sent."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state: Any, batch: Any) -> tuple[Array, Array]:
        model = nnx.merge(graphdef, state)
        shards = model.shards(1, batch)
        strategy = Single(shards, capture=True)
        y = model(shards.scatter(model.to_tokens(batch)), strategy)[1]  # [L,B,S,D]
        # Replicas of the class token and padding are not among the codes that training has to serve.
        sent = jnp.broadcast_to(strategy.tokens().valid & strategy.tokens().sent, y.shape[1:3])
        return y.reshape(y.shape[0], -1, y.shape[-1]).astype(jnp.float32), sent.reshape(-1)

    rng = np.random.default_rng(seed)
    rows = [len(jax.tree.leaves(batch)[0]) for batch in batches]
    kept = []
    with progress("activations", len(batches)) as advance:
        for batch, share in zip(batches, np.diff(np.round(np.cumsum([0, *rows]) / sum(rows) * tokens)), strict=True):
            y, sent = run(state, batch)
            chosen = rng.permutation(np.flatnonzero(sent))[: int(share)]
            kept.append(np.asarray(y)[:, np.sort(chosen)])
            advance()
    return np.concatenate(kept, axis=1)


def choose_widths(
    source: Checkpoint,
    astra: AstraConfig,
    levels: tuple[int, ...],
    y: Float[np.ndarray, "L M D"],
    batches: list[Any],
    seed: int,
) -> AstraConfig:
    """The configuration of a codec with axes of its own: how many of them every group gets.

    Of several splits it takes the one with which what the model computes on `TRIAL_SHARDS` devices is closest to what
    one computes, measured with fewer tokens and iterations. The error of keys and values alone does not tell: a few
    tokens that all others attend to can be far off without being seen in it.

    Args:
      source: without codebooks.
      astra: all but the widths, as of `vq`.
      levels: groups of every level of `nested-pq`; none for `rotated-pq`.
      y: from `capture`.
      batches: some inputs of the model.
    """
    blocks = checkpoints.with_codebooks(source, AstraConfig(groups=1, site=astra.site)).model.blocks
    variances, before = [], None
    with progress("axes", len(y)) as advance:
        for number in range(len(y)):
            attention = block_at(blocks, number).attention
            sent = rest = np.asarray(attention.codec_input(jnp.asarray(y[number])))
            if astra.predictor != "none" and before is not None:  # from exact vectors: estimates are not there yet
                rest = sent - np.asarray(_predictor(astra, before, sent)(jnp.asarray(before)))
            variances.append(rotation.principal_axes(rest, rotation.key_value_metric(attention)).variance)
            before = sent
            advance()
    splits = rotation.candidates(np.stack(variances), levels or (astra.groups,), astra.codewords)
    codec: Codec = "nested-pq" if levels else "rotated-pq"
    tries = [dataclasses.replace(astra, codec=codec, widths=widths, levels=levels) for widths in splits]
    if len(tries) == 1:
        return tries[0]
    distances = []
    for one in tries:
        model = checkpoints.with_codebooks(source, one).model
        fit(model, y[:, :TRIAL_TOKENS], TRIAL_ITERATIONS, seed)
        distances.append(distance(model, batches))
    return tries[int(np.argmin(distances))]


def distance(model: Any, batches: list[Any], N: int = TRIAL_SHARDS) -> float:
    """How far what a model's head reads on N virtual shards is from what it reads on one device: the mean square of the
    difference, over that of the latter."""

    @nnx.jit
    def squares(model: Any, batch: Any) -> tuple[Array, Array]:
        def run(strategy: Any) -> Array:
            shards, tokens = strategy.shards, model.to_tokens(batch)
            features, _ = model.features(shards.scatter(tokens), strategy)
            return shards.gather(features, tokens.shape[1]) if model.per_token else features

        exact = run(Single(model.shards(1, batch)))
        return jnp.sum((run(Virtual(model.shards(N, batch))) - exact) ** 2), jnp.sum(exact**2)

    found = [squares(model, batch) for batch in batches]
    return float(sum(a for a, _ in found) / sum(b for _, b in found))


def _predictor(astra: AstraConfig, x: Float[np.ndarray, "M W"], y: Float[np.ndarray, "M W"]) -> Predictor:
    """A predictor of y from x."""
    predictor = Predictor(astra, x.shape[1])
    for name, value in regress(astra.predictor, astra.rank, x, y).items():
        getattr(predictor, name)[...] = jnp.asarray(value, jnp.float32)
    return predictor


class Errors(NamedTuple):
    """What a block's codec loses: of the vectors that are sent, and of remote tokens' keys and values. Mean squares
    over the variance, so that 1 is what the mean alone would lose."""

    vector: float
    key_value: float


def fit(model: Any, y: Float[np.ndarray, "L M D"], iterations: int, seed: int) -> list[Errors]:
    """Finds the codecs of `model`, block after block, in place: predictors by least squares from the estimates of the
    block before, the axes of rotated ones, and codewords by k-means along these.

    Predictors of nested codes are to serve every number of levels, with one set of weights: each token's estimates are
    made of a number of its own, the same in all blocks (our choice).

    Args:
      y: from `capture`.

    Returns:
      Every block's errors.

    Raises:
      AstraError: there are fewer tokens than codewords.
    """
    K, M, astra = model.codec.codewords, y.shape[1], model.astra
    if M < K:
        raise AstraError(f"{M} tokens are too few for {K} codewords: give more --samples or fewer --codewords")
    states, errors, estimate = [], [], None
    levels = len(model.astra.level_widths) if astra.rotated else 1
    depth = jax.random.randint(jax.random.key(seed), (M, 1), 1, levels + 1)  # how many levels a token is sent with
    with progress("codewords", len(y)) as advance:
        for number, key in enumerate(jax.random.split(jax.random.key(seed), len(y))):
            attention = block_at(model.blocks, number).attention
            sent = attention.codec_input(jnp.asarray(y[number])).astype(jnp.float32)
            if number == 0 and astra.side_info == "token-ids":
                best = estimate = sent
            else:
                best, estimate = _fit_block(attention, astra, estimate, sent, depth, iterations, key)
            errors.append(_errors(attention, best, sent))
            states.append(nnx.state(attention.codec))
            advance(error=errors[-1].key_value)
    nnx.update(model.codec, jax.tree.map(lambda *blocks: jnp.stack(blocks), *states))
    return errors


def _fit_block(
    attention: Any,
    astra: AstraConfig,
    before: Any,
    sent: Float[Array, "M W"],
    depth: Int[Array, "M 1"],
    iterations: int,
    key: Any,
) -> tuple[Float[Array, "M W"], Float[Array, "M W"]]:
    """Finds the codec of one block, in place, and returns what receivers make of all its codes, and of those that come.

    Args:
      before: the estimate of the block before; None in the first block, or without predictor.
      sent: what the codec is to quantize.
      depth: how many levels of a token's codes come.
    """
    codec, p = attention.codec, jnp.zeros(sent.shape[1])
    if astra.predictor != "none":
        if before is None:
            codec.predictor.bias[...] = sent.mean(0)
            p = codec.predict(Known(None))
        else:
            codec.predictor = _predictor(astra, np.asarray(before), np.asarray(sent))
            p = codec.predict(before)
    rest = sent - p
    if not isinstance(codec, RotatedQuantizer):
        estimate = p + _fit_codewords(codec, rest, iterations, key)
        return estimate, estimate
    axes = rotation.principal_axes(np.asarray(rest), rotation.key_value_metric(attention))
    codec.mean[...] = jnp.asarray(axes.mean, jnp.float32)
    codec.analysis[...] = jnp.asarray(axes.analysis[:, : codec.width], jnp.float32)
    codec.synthesis[...] = jnp.asarray(axes.synthesis[: codec.width], jnp.float32)
    u = left = missing = codec.axes(rest)
    for number, (level, widths, _) in enumerate(codec.each()):
        found = _fit_codewords(level, padded(left, widths), iterations, jax.random.fold_in(key, number))
        left = left - unpadded(found, widths, codec.width)
        missing = jnp.where(number < depth, left, missing)
    return p + codec.from_coordinates(u - left), p + codec.from_coordinates(u - missing)


def _fit_codewords(codec: VectorQuantizer, y: Float[Array, "M W"], iterations: int, key: Any) -> Float[Array, "M W"]:
    """Finds the codewords for some vectors, in place, and returns what the vectors' codes stand for."""
    C, z, count = _kmeans(codec.in_groups(y), codec.codewords, iterations, key)
    estimate = lookup(C, z).reshape(y.shape)
    share = count / len(y)
    codec.codebook[...], codec.count[...], codec.total[...] = C, share, C * share[..., None]
    codec.residual_mean[...], codec.residual_var[...] = (y - estimate).mean(0), (y - estimate).var(0)
    return estimate


@partial(jax.jit, static_argnames=("K", "iterations"))
def _kmeans(u: Float[Array, "M G d"], K: int, iterations: int, key: Any) -> tuple[Array, Array, Array]:
    """Codewords, the codes of all vectors, and how often each was chosen."""
    C, _ = kmeans(u, K, iterations, key)
    z, count, _ = assign(u, C)
    return C, z, count


def _errors(attention: Any, estimate: Float[Array, "M W"], sent: Float[Array, "M W"]) -> Errors:
    def error(estimate: Array, exact: Array) -> float:
        return float(jnp.mean((exact - estimate) ** 2) / jnp.mean((exact - exact.mean(0)) ** 2))

    def key_value(sent: Array) -> Array:
        return sent if attention.site == "kv" else jnp.concatenate([attention.k(sent), attention.v(sent)], axis=-1)

    return Errors(error(estimate, sent), error(key_value(estimate), key_value(sent)))


def main(args: Args) -> None:
    """Runs `astra calibrate`."""
    report = Report("calibrate", args.json)
    astra = AstraConfig(
        *(args.groups, args.codewords, args.site, args.class_token),
        predictor=args.predictor,
        rank=args.rank,
        side_info=args.side_info,
    )
    source = checkpoints.load(args.checkpoint, param_dtype=None)  # what is not trained keeps its number format
    if astra.side_info != "none" and not isinstance(source.model, Decoder):
        raise AstraError(f"--side-info {astra.side_info} is for decoders; this is a {source.family}: leave it out")
    batches = inputs(source, args)
    y = capture(source.model, batches, args.tokens, args.seed)
    if args.codec != "vq":
        levels = doubling(args.groups) if args.codec == "nested-pq" else ()
        astra = choose_widths(source, astra, levels, y, batches[:TRIAL_BATCHES], args.seed)
    checkpoint = checkpoints.with_codebooks(source, astra)
    model = checkpoint.model
    errors = fit(model, y, args.iterations, args.seed)
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
    provenance = {"verb": "calibrate", "data": args.data, "split": args.split, "tokens": int(y.shape[1])}
    checkpoint = dataclasses.replace(checkpoint, history=(*checkpoint.history, provenance))
    checkpoints.save(args.out, checkpoint)
    report.say(f"wrote {args.out}", out=str(args.out))
    report.say(f"next: astra finetune {args.out} {args.out}-finetuned --data {args.data}")
    report.close()
