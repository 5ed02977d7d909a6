"""What training makes small: the loss of the task, and how far a model is from its teacher."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from astra_jax.mesh.sharding import Shards
from astra_jax.strategies.base import Single
from astra_jax.strategies.coded import Astra
from eval.quality.perplexity import NextTokenLoss

# "input": images [B,h,w,c] or `Text`; "label": classes [B], where the task has any; "arrived": which codes arrive
# [B,L,N,slots], where packets are lost.
Batch = dict[str, Any]


def class_loss(
    logits: Float[Array, "B C"], labels: Int[Array, "B"], smoothing: float
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Cross-entropy with label smoothing, in nats, and accuracy."""
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    accuracy = jnp.mean(jnp.argmax(logits, -1) == labels)
    return optax.softmax_cross_entropy(logits, targets).mean(), {"accuracy": accuracy}


def token_loss(
    losses: Float[Array, "B slots"], lengths: Int[Array, "B"], strategy: Any
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The mean loss of a token that has a predecessor, in nats, and its exponential, the perplexity."""
    mean = mean_of(losses, has_successor(lengths, strategy))
    return mean, {"perplexity": jnp.exp(mean)}


def has_successor(lengths: Int[Array, "B"], strategy: Any) -> Bool[Array, "B slots"]:
    """Which slots hold a token whose successor is known: all but the last of a sequence."""
    tokens = strategy.tokens()
    return tokens.valid & (tokens.position + 1 < lengths[:, None])


def mean_of(values: Float[Array, "*rows"], counts: Bool[Array, "*rows"]) -> Float[Array, ""]:
    """The mean of the values that count."""
    return jnp.sum(jnp.where(counts, values, 0.0)) / jnp.maximum(jnp.sum(counts), 1)


class Final(NamedTuple):
    """What a model comes to: what its head reads, for every slot or pooled, and what the head makes of it."""

    features: Float[Array, "*rows D"]
    logits: Float[Array, "*rows _"]


class Watched(nnx.Module):
    """A model that reports, before what its strategy does, its `Final`. So a head is run once for all who ask."""

    def __init__(self, model: Any):
        self.model = model

    def to_tokens(self, inputs: Any) -> Any:
        return self.model.to_tokens(inputs)

    def __call__(self, tokens: Any, strategy: Any) -> tuple[Float[Array, "*rows _"], tuple[Final, Any]]:
        features, reports = self.model.features(tokens, strategy)
        logits = self.model.logits(features)
        return logits, (Final(features, logits), reports)


def run_task(
    model: Any, batch: Batch, strategy: Single | Astra, smoothing: float
) -> tuple[Float[Array, ""], dict[str, Array], Final, Any]:
    """The loss of a model, its measures, what it comes to, and the strategy's reports."""
    watched = NextTokenLoss(Watched(model)) if model.per_token else Watched(model)
    output, (final, reports) = watched(strategy.shards.scatter(watched.to_tokens(batch["input"])), strategy)
    if model.per_token:
        return *token_loss(output, batch["input"].lengths, strategy), final, reports.observed
    return *class_loss(output, batch["label"], smoothing), final, reports.observed


def teach(teacher: Any, inputs: Any, shards: Shards) -> Final:
    """What a teacher comes to on one device; of every token, where the head reads each, in the slots of `shards`."""
    single = Single.of(teacher, 1, inputs)
    features, _ = teacher.features(single.shards.scatter(teacher.to_tokens(inputs)), single)
    if teacher.per_token:
        features = shards.scatter(features)  # before the head: states are narrower than logits
    return Final(features, teacher.logits(features))


def distances(
    ours: Final, theirs: Final, counts: Bool[Array, "*rows"], valid: Bool[Array, "*rows"]
) -> dict[str, Float[Array, ""]]:
    """How far a model is from its teacher.

    Args:
      counts: the rows that the task's loss counts.
      valid: the rows that are there at all.

    Returns:
      `kl`: the mean over the rows that count of KL(teacher || ours) in nats. `hidden`: of all that are there, the mean
      square of the difference of features over that of the teacher's, as `train.calibrate.distance` has it.
    """
    kl = optax.losses.kl_divergence_with_log_targets(jax.nn.log_softmax(ours.logits), jax.nn.log_softmax(theirs.logits))

    a, b = ours.features.astype(jnp.float32), theirs.features.astype(jnp.float32)

    def squares(x: Float[Array, "*rows D"]) -> Float[Array, ""]:
        return jnp.sum(jnp.where(valid[..., None], x**2, 0.0))

    return {"kl": mean_of(kl, counts), "hidden": squares(a - b) / jnp.maximum(squares(b), 1e-12)}
