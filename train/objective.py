"""What training makes small: the loss of the task, and how far a model is from its teacher."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from astra_jax.mesh.sharding import Shards
from astra_jax.strategies.base import Single
from astra_jax.strategies.coded import Astra
from eval.quality.perplexity import by_parts, next_token_loss

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
    losses: Float[Array, "B slots"], counts: Bool[Array, "B slots"]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The mean loss of a token that has a predecessor, in nats, and its exponential, the perplexity."""
    mean = mean_of(losses, counts)
    return mean, {"perplexity": jnp.exp(mean)}


def has_successor(lengths: Int[Array, "B"], strategy: Any) -> Bool[Array, "B slots"]:
    """Which slots hold a token whose successor is known: all but the last of a sequence."""
    tokens = strategy.tokens()
    return tokens.valid & (tokens.position + 1 < lengths[:, None])


def mean_of(values: Float[Array, "*rows"], counts: Bool[Array, "*rows"]) -> Float[Array, ""]:
    """The mean of the values that count."""
    return jnp.sum(jnp.where(counts, values, 0.0)) / jnp.maximum(jnp.sum(counts), 1)


def run_task(
    model: Any, batch: Batch, strategy: Single | Astra, smoothing: float, teacher: Any = None
) -> tuple[Float[Array, ""], dict[str, Array], Any]:
    """The loss of a model, its measures, and what its codecs observed.

    Args:
      teacher: a model; with it the measures have `kl`, the mean over what the loss counts of KL(teacher || model) in
        nats, and `hidden` (`hidden_distance`), of what the heads read.
    """
    inputs, shards = batch["input"], strategy.shards
    tokens = model.to_tokens(inputs)
    features, reports = model.features(shards.scatter(tokens), strategy)
    theirs = None if teacher is None else teach(teacher, inputs, shards)

    def kl(logits: Array, theirs: Array) -> Array:
        return divergence(logits, jax.lax.stop_gradient(teacher.logits(theirs)))

    if model.per_token:
        counts, valid = has_successor(inputs.lengths, strategy), jnp.asarray(strategy.tokens().valid)

        def read(features: Array, following: Array, *theirs: Array) -> tuple[Array, ...]:
            logits = model.logits(features)
            return next_token_loss(logits, following), *(kl(logits, theirs) for theirs in theirs)

        following = shards.scatter(jnp.roll(tokens, -1, axis=1))
        losses, *far = by_parts(
            read, model.config.vocab_size, features, following, *([] if theirs is None else [theirs])
        )
        loss, measures = token_loss(losses, counts)
    else:
        logits = model.logits(features)
        loss, measures = class_loss(logits, batch["label"], smoothing)
        counts = valid = jnp.ones(len(logits), bool)
        far = [] if theirs is None else [kl(logits, theirs)]
    if theirs is not None:
        measures = {**measures, "kl": mean_of(far[0], counts), "hidden": hidden_distance(features, theirs, valid)}
    return loss, measures, reports.observed


def teach(teacher: Any, inputs: Any, shards: Shards) -> Float[Array, "*rows D"]:
    """What a teacher's head reads on one device; of every token, where it reads each, in the slots of `shards`."""
    single = Single.of(teacher, 1, inputs)
    features, _ = teacher.features(single.shards.scatter(teacher.to_tokens(inputs)), single)
    return shards.scatter(features) if teacher.per_token else features


def divergence(ours: Float[Array, "*rows _"], theirs: Float[Array, "*rows _"]) -> Float[Array, "*rows"]:
    """KL(theirs || ours) in nats of every row, from logits."""
    return optax.losses.kl_divergence_with_log_targets(jax.nn.log_softmax(ours), jax.nn.log_softmax(theirs))


def hidden_distance(
    ours: Float[Array, "*rows D"], theirs: Float[Array, "*rows D"], valid: Bool[Array, "*rows"]
) -> Float[Array, ""]:
    """Of the rows that are there, the mean square of the difference over that of theirs, as `train.calibrate.distance`
    has it."""
    a, b = ours.astype(jnp.float32), theirs.astype(jnp.float32)

    def squares(x: Float[Array, "*rows D"]) -> Float[Array, ""]:
        return jnp.sum(jnp.where(valid[..., None], x**2, 0.0))

    return squares(a - b) / jnp.maximum(squares(b), 1e-12)
