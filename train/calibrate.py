"""Find codebooks: run real inputs through the model at full precision and cluster what every block's quantizer sees.

Needs no labels and no training; the result runs on several devices at once. `astra finetune` then wins back most of the
accuracy that quantization costs.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jaxtyping import Array, Float

import checkpoints
from astra_jax.config import AstraConfig, ClassToken, Site
from astra_jax.console import Report, progress
from astra_jax.errors import AstraError
from astra_jax.quantizer import usage
from astra_jax.strategies import Single
from astra_jax.text import Text
from checkpoints import Checkpoint
from eval.data import DataArgs, batches
from train.data import sequences
from train.kmeans import assign, kmeans

TOKENS_AT_ONCE = 8192


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
    """What every block's quantizer sees, for up to `tokens` random tokens of the batches that would be sent."""
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


def fit(model: Any, y: Float[np.ndarray, "L M D"], iterations: int, seed: int) -> list[float]:
    """Sets the codebooks and statistics of `model` by k-means, in place.

    Returns every block's error, `mean ||y - y^||^2 / mean ||y||^2`. Raises AstraError with fewer tokens than codewords.
    """
    codec = model.codec
    L, G, K, d = codec.codebook[...].shape
    M = y.shape[1]
    if M < K:
        raise AstraError(f"{M} tokens are too few for {K} codewords: give more --samples or fewer --codewords")

    @jax.jit
    def one_block(y: Float[Array, "M D"], key: Any) -> tuple[Array, ...]:
        vectors = y.reshape(M, G, d)
        C, _ = kmeans(vectors, K, iterations, key)
        z, count, _ = assign(vectors, C)
        residual = y - jax.vmap(lambda c, k: c[k], in_axes=(0, 1), out_axes=1)(C, z).reshape(M, -1)
        error = jnp.mean(residual**2) / jnp.mean(y**2)
        return C, count / M, residual.mean(0), residual.var(0), error

    found = []
    with progress("k-means", L) as advance:
        for block, key in enumerate(jax.random.split(jax.random.key(seed), L)):
            found.append(jax.device_get(one_block(jnp.asarray(y[block]), key)))
            advance(error=float(found[-1][-1]))
    C, count, mean, var, error = (np.stack(parts) for parts in zip(*found, strict=True))
    codec.codebook[...] = jnp.asarray(C)
    codec.count[...] = jnp.asarray(count)
    codec.total[...] = jnp.asarray(C * count[..., None])
    codec.residual_mean[...] = jnp.asarray(mean)
    codec.residual_var[...] = jnp.asarray(var)
    return [float(e) for e in error]


def main(args: Args) -> None:
    """Runs `astra calibrate`."""
    report = Report("calibrate", args.json)
    astra = AstraConfig(args.groups, args.codewords, args.site, args.class_token)
    source = checkpoints.load(args.checkpoint, param_dtype=None)  # what is not trained keeps its number format
    checkpoint = checkpoints.with_codebooks(source, astra)
    model = checkpoint.model
    y = capture(model, inputs(checkpoint, args), args.tokens, args.seed)
    errors = fit(model, y, args.iterations, args.seed)
    used = usage(model.codec.count[...])
    report.table(
        "blocks",
        f"G={astra.groups}, K={astra.codewords}: {astra.groups * astra.bits} bits per token and block",
        [
            {
                "block": block,
                "relative error": error,
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
