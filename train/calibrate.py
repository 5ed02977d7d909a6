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
from eval.data import DataArgs, batches
from train.kmeans import assign, kmeans


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
    images: int = 1024
    """How many images to look at."""
    tokens: int = 32_768
    """How many of their tokens to cluster in every block."""
    iterations: int = 12
    """Iterations of k-means."""
    seed: int = 0
    """Seed of the random starting codewords."""
    json: Path | None = None
    """Also write everything printed to this file."""


def capture(model: Any, images: list[np.ndarray], tokens: int, seed: int) -> Float[np.ndarray, "L M D"]:
    """What every block's quantizer sees, for up to `tokens` random tokens of the images (batches [B,h,w,c])."""
    graphdef, state = nnx.split(model)
    shards = model.shards(1)
    T = shards.T
    total = sum(len(batch) for batch in images) * T

    @jax.jit
    def run(state: Any, batch: Array) -> Array:
        model = nnx.merge(graphdef, state)
        y = model(model.to_tokens(batch), Single(shards, capture=True))[1]  # [L,B,S,D]
        sent = y[:, :, y.shape[2] - T :]  # class tokens are not among the codes that training has to serve
        return sent.reshape(sent.shape[0], -1, sent.shape[-1]).astype(jnp.float32)

    rng = np.random.default_rng(seed)
    kept = []
    with progress("activations", len(images)) as advance:
        for batch in images:
            y = np.asarray(run(state, batch))
            share = min(y.shape[1], round(tokens * len(batch) * T / total))
            kept.append(y[:, np.sort(rng.permutation(y.shape[1])[:share])])
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
        raise AstraError(f"{M} tokens are too few for {K} codewords: give more --images or fewer --codewords")

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
    source = checkpoints.load(args.checkpoint)
    checkpoint = checkpoints.with_codebooks(source, astra)
    data = args.open()
    processor = checkpoint.processor
    images = [images for images, _ in batches(data, processor, 32, limit=args.images)]
    model = checkpoint.model
    y = capture(model, images, args.tokens, args.seed)
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
