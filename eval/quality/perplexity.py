"""What a language model pays for text: the loss of every token, and perplexity over sliding windows."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from astra_jax.codecs.base import Quantizer
from astra_jax.errors import AstraError
from astra_jax.inputs.token_batches import Text
from astra_jax.mesh.sharding import Shards
from eval.datasets.windows import run_batches, windows

LOGITS = 2**28  # that are held at once: those of a long batch and a large vocabulary would be most of the memory


def by_parts(read: Callable[..., Any], vocabulary: int, *rows: Shaped[Array, "B S ..."]) -> Any:
    """`read(*rows)`, which makes logits [B,S,V] on its way to arrays [B,S], part by part of the slots S.

    No more than `LOGITS` logits are there at a time: a backward pass makes those of a part again.
    """
    B, S = rows[0].shape[:2]
    parts = -(-B * S * vocabulary // LOGITS)
    if parts <= 1:
        return read(*rows)
    size = -(-S // parts)

    def cut(a: Array) -> Array:
        padded = jnp.pad(a, ((0, 0), (0, parts * size - S), *((0, 0),) * (a.ndim - 2)))
        return jnp.moveaxis(padded.reshape(B, parts, size, *a.shape[2:]), 1, 0)

    found = jax.lax.map(jax.checkpoint(lambda part: read(*part)), tuple(map(cut, rows)))
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(B, -1)[:, :S], found)


def next_token_loss(logits: Float[Array, "B S V"], following: Int[Array, "B S"]) -> Float[Array, "B S"]:
    """What is paid for the tokens that follow, in nats."""
    chosen = jnp.take_along_axis(logits, following[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


class NextTokenLoss(nnx.Module):
    """A causal language model whose output is what it pays for the next token, at every token: [B,S] in nats.

    It is run as the model itself is, by any strategy, and keeps the logits on their device.
    """

    per_token = True

    def __init__(self, model: Any):
        self.model = model

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def dtype(self) -> Any:
        return self.model.dtype

    @property
    def blocks(self) -> Any:
        return self.model.blocks

    @property
    def codec(self) -> Quantizer | None:
        return self.model.codec

    def shards(self, N: int, text: Text | None = None) -> Shards:
        return self.model.shards(N, text)

    def to_tokens(self, text: Text) -> Int[Array, "B T 2"]:
        """Every token and the one that follows it; what follows the last one of a sequence does not count."""
        ids = self.model.to_tokens(text)
        return jnp.stack([ids, jnp.roll(ids, -1, axis=1)], axis=-1)

    def __call__(self, tokens: Int[Array, "B S 2"], strategy: Any) -> tuple[Float[Array, "B S"], Any]:
        features, reports = self.model.features(tokens[..., 0], strategy)

        def loss(features: Array, following: Array) -> Array:
            return next_token_loss(self.model.logits(features), following)

        return by_parts(loss, self.config.vocab_size, features, tokens[..., 1]), reports


class Perplexity(NamedTuple):
    """What text costs a language model.

    Attributes:
      nll: mean negative log-likelihood of a token in nats.
      perplexity: its exponential.
      tokens: how many predictions that is.
    """

    nll: float
    perplexity: float
    tokens: int


def perplexity(
    run: Callable[[Text], Any],
    documents: Sequence[Sequence[int]],
    length: int,
    stride: int,
    batch_size: int,
    label: str = "windows",
) -> Perplexity:
    """Perplexity of documents over sliding windows; see `eval.datasets.windows.windows` for which predictions count.

    Args:
      run: a batch -> the loss of every next token [B,T]: `NextTokenLoss` on one device or several.
      documents: token ids of every document. The first token of each is not predicted.
      length, stride: of the windows, in tokens.
      batch_size: windows per batch; it does not change the result.
      label: of the progress bar.

    Raises:
      AstraError: no document has a token to predict.
    """
    parts = [window for ids in documents for window in windows(ids, length, stride)]
    if not parts:
        raise AstraError("no document has two tokens, so there is nothing to predict: choose other data")
    total, tokens = 0.0, 0
    for place, losses in run_batches(run, [window.ids for window in parts], length, batch_size, label):
        counted = losses[parts[place].counted : len(parts[place].ids) - 1]
        total += float(counted.sum(dtype=np.float64))
        tokens += counted.size
    return Perplexity(total / tokens, float(np.exp(total / tokens)), tokens)
