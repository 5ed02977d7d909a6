"""Fits the codecs of a model, block after block: predictors by least squares, what the codec quantizes by k-means."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from astra_jax.codecs.axes import codeword_spread
from astra_jax.codecs.base import Calibrated
from astra_jax.codecs.config import (
    AstraConfig,
    Kind,
)
from astra_jax.codecs.nested import padded
from astra_jax.codecs.predictor import Around, Predictor, around
from astra_jax.codecs.product import VectorQuantizer
from astra_jax.errors import AstraError
from astra_jax.models.blocks import block_at
from astra_jax.report import progress
from train.fit_predictor import regress, train_mlp
from train.kmeans import kmeans

LATER = 4  # see `fit`
ERROR_TOKENS = 8192  # that errors are shown of: no more than twice as many, because more say the same


@jax.jit  # or two programs are compiled for every weight
def attention_at(blocks: Any, number: Any) -> Any:
    """The attention of one block, as a module of its own (a copy)."""
    return block_at(blocks, number).attention


def key_value_metric(attention: Any) -> Float[np.ndarray, "W W"]:
    """M: what an error e of a block's quantized vector costs, `|e Wk|^2 + |e Wv|^2 = e M e^T`; at site `kv` it is one
    of keys and values already.

    Args:
      attention: of one block.
    """
    if attention.site == "kv":
        return np.eye(2 * attention.J * attention.E)
    k, v = (np.asarray(layer.kernel[...], np.float64) for layer in (attention.k, attention.v))
    return k @ k.T + v @ v.T


def linear_predictor(astra: AstraConfig, x: Float[np.ndarray, "M W"], y: Float[np.ndarray, "M W"]) -> Predictor:
    """A predictor of y from x."""
    predictor = Predictor(astra, x.shape[1])
    _set(predictor, regress(x, y))
    return predictor


def _set(predictor: Predictor, values: dict[str, Float[np.ndarray, "..."]]) -> None:
    for name, value in values.items():
        getattr(predictor, name)[...] = jnp.asarray(np.asarray(value, np.float32))


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
    """Finds the codecs of `model`, block after block, in place: predictors from the estimates of the block before, and
    what the codec needs to quantize what they leave. Levels of nested codes after the first take a `LATER`-th of the
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
    levels = len(astra.level_widths) if astra.nested else 1
    drawn = jax.random.randint(jax.random.key(seed), (M // S, 1), 1, levels + 1)  # levels that a shard is sent with
    depth = np.repeat(np.asarray(drawn), S, axis=0)
    near = partial(_around, S, model.shards(1).causal)
    blocks = zip(astra.kinds(len(y)), jax.random.split(jax.random.key(seed), len(y)), strict=True)
    with progress("codewords", len(y)) as advance:
        for number, (kind, key) in enumerate(blocks):
            attention = attention_at(model.blocks, number)
            sent = np.asarray(attention.codec_input(jnp.asarray(y[number])), np.float32)
            found = _fit_block(attention, astra, kind, estimate, near, sent, depth, iterations, key)
            estimate = found.arrived
            errors.append(_errors(attention, found.best, sent))
            states.append(nnx.state(attention.codec))
            advance(error=errors[-1].key_value)
    nnx.update(model.codec, jax.tree.map(lambda *blocks: jnp.asarray(np.stack(blocks)), *states))
    return errors


def _fit_block(
    attention: Any,
    astra: AstraConfig,
    kind: Kind,
    before: Float[np.ndarray, "M W"] | None,
    around: Around,
    sent: Float[np.ndarray, "M W"],
    depth: Int[np.ndarray, "M 1"],
    iterations: int,
    key: Any,
) -> Calibrated:
    """Finds the codec of one block, in place.

    Args:
      before: the estimate of the block before; None in the first block, or without predictor.
      around: see `Predictor`.
      sent: what the codec is to quantize.
      depth: how many levels of a token's codes come.
    """
    if kind == "known":
        return Calibrated(sent, sent)
    metric, p = key_value_metric(attention), np.zeros(sent.shape[1], np.float32)
    if astra.predictor != "none":
        p = _fit_predictor(attention.codec, astra, before, around, sent, metric, key)
    if kind == "predicted":
        return Calibrated(p, p)
    settle = astra.predictor != "none"  # the next block goes on from what devices will have

    def codewords(quantizer: Any, y: Any, widths: tuple[int, ...], level: int, principal: bool) -> Any:
        steps, of_level = (-(-iterations // LATER), jax.random.fold_in(key, level)) if level else (iterations, key)
        if principal:
            of_level = jax.random.fold_in(key, level)
        return _fit_codewords(quantizer, y, widths, steps, of_level, settle, principal)

    found = attention.codec.calibrate(sent - p, metric, codewords, depth)
    return Calibrated(*(p + part for part in found))


def _fit_predictor(
    codec: Any,
    astra: AstraConfig,
    before: Float[np.ndarray, "M W"] | None,
    around: Around,
    sent: Float[np.ndarray, "M W"],
    metric: Float[np.ndarray, "W W"],
    key: Any,
) -> Float[np.ndarray, "*M W"]:
    """Finds the predictor of one block, in place, and returns what it expects; of the first block, the mean."""
    if before is None:
        codec.predictor.bias[...] = jnp.asarray(sent.mean(0))
        return np.asarray(codec.predictor.bias[...])
    codec.predictor = linear_predictor(astra, before, sent)
    if astra.predictor == "mlp":
        seen = np.concatenate([before, np.asarray(around(jnp.asarray(before)))], axis=1)
        _set(codec.predictor, train_mlp(astra.hidden_units, seen, sent, metric, key))
    return np.asarray(codec.expect(jnp.asarray(before), around))


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
    found = (np.asarray(a, np.float32) for a in (C, share, C * share[..., None]))  # or jax compiles a program for each
    codec.codebook[...], codec.count[...], codec.total[...] = map(jnp.asarray, found)
    rest = y - estimate
    codec.residual_mean[...], codec.residual_var[...] = padded(jnp.stack([rest.mean(0), rest.var(0)]), widths)
    return estimate


def _rounded(width: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is no less."""
    step = max(1, 1 << (width - 1).bit_length() >> 2)
    return -(-width // step) * step


def _errors(attention: Any, estimate: Float[np.ndarray, "M W"], sent: Float[np.ndarray, "M W"]) -> Errors:
    metric = key_value_metric(attention)

    def squares(x: Float[np.ndarray, "M W"]) -> Float[np.ndarray, "2"]:
        """Of vectors, and of what they add to keys and values."""
        moments = x.T @ x
        return np.array([np.trace(moments), (moments * metric).sum()])

    few = slice(None, None, max(1, len(sent) // ERROR_TOKENS))
    exact, found = sent[few], np.broadcast_to(estimate, sent.shape)[few]
    return Errors(*map(float, squares(exact - found) / squares(exact - exact.mean(0))))
