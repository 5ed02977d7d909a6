"""A model on a mesh beside the same one on virtual shards, and its generation beside computing all anew."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from astra_jax.inputs.token_batches import bucket
from astra_jax.mesh.sharding import DATA, Shards, make_mesh
from astra_jax.serving import batch
from astra_jax.serving.compile import parallelize
from astra_jax.serving.sampling import Draws, Sampling
from astra_jax.strategies.base import Single
from astra_jax.strategies.coded import Astra

KV = dict(site="kv")


LAYERS = {"tiny_gpt2": "n_layer"}


CLASS = ("tiny_bert", "class")


# Name -> fixture, and values of the configuration. All have other numbers of class tokens than ViT, or other heads.
PICTURE_MODELS = {
    "deit": ("tiny_deit", {"with_teacher": True}),
    "dinov2 classifier": ("tiny_dinov2", {"task": "classification"}),
    "dinov2 interpolated": ("tiny_dinov2", {"image_size": 32, "picture_size": 20, "use_swiglu_ffn": True}),
    "clip": ("tiny_clip", {}),
    "siglip": ("tiny_siglip", {}),
}
# As well, with what becomes of class tokens in between.
TEXT_MODELS = {
    "gpt2": ("tiny_gpt2", "distributed", {}),
    "gpt2 classifier": ("tiny_gpt2", "distributed", {"task": "classification", "num_labels": 3}),
    "llama": ("tiny_llama", "distributed", {}),
    "llama classifier": ("tiny_llama", "distributed", {"task": "classification", "num_labels": 3}),
    "bert mean": ("tiny_bert", "distributed", {"pooling": "mean", "normalize": True}),
    "bert distributed": ("tiny_bert", "distributed", {"pooling": "class", "task": "classification", "num_labels": 3}),
    "bert single": ("tiny_bert", "single", {"pooling": "class"}),
    "distilbert": ("tiny_distilbert", "single", {"pooling": "class", "task": "classification", "num_labels": 3}),
    "mpnet distributed": ("tiny_mpnet", "distributed", {"pooling": "class"}),
    "mpnet single": ("tiny_mpnet", "single", {"pooling": "class", "task": "classification", "num_labels": 3}),
    "roberta": ("tiny_roberta", "distributed", {"pooling": "class", "task": "classification", "num_labels": 3}),
}


def three_blocks(request, family, astra):
    """A model in which estimates build on each other; `family` is a fixture, or one and how states are pooled.

    Predictors are small, lest estimates grow from block to block, and rounding with them.
    """
    fixture, *pooling = (family,) if isinstance(family, str) else family
    options = {LAYERS.get(fixture, "num_hidden_layers"): 3, **({"pooling": pooling[0]} if pooling else {})}
    model = request.getfixturevalue(fixture)(astra, **options)
    nnx.update(model.codec.predictor, jax.tree.map(lambda weights: 0.3 * weights, nnx.state(model.codec.predictor)))
    return model


@nnx.jit(static_argnums=(2, 4))
def run_virtual(model, inputs, N, arrived=None, speeds=None):
    """The outputs; `arrived` is None, or says of every block [L] whether its codes arrive."""
    shards, tokens = model.shards(N, inputs), model.to_tokens(inputs)
    shards = shards.in_proportion(speeds) if speeds else shards
    slots = shards.scatter(tokens)
    if arrived is not None:
        of_slots = (len(arrived), len(slots), N, slots.shape[1] + N * shards.class_slots)
        arrived = jnp.broadcast_to(arrived[:, None, None, None], of_slots)
    out = model(slots, Astra.virtual(shards, arrived) if N > 1 else Single(shards))[0]
    return shards.gather(out, tokens.shape[1]) if model.per_token else out


def real(model, text, out):
    """The outputs of real tokens, where there is one per token."""
    return out[np.arange(out.shape[1]) < text.lengths[:, None]] if model.per_token else out


def as_pairs(model, text):
    """Sequences of which the last two thirds are second texts, where the model tells these apart by types of tokens."""
    if getattr(model.config, "type_vocab_size", 0) < 2:
        return text
    second = np.arange(text.ids.shape[1], dtype=np.int32) > text.lengths[:, None] / 3
    return text._replace(ids=text.ids + np.int32(model.config.vocab_size) * second)


def check(model, inputs, N, data=1):
    expected = run_virtual(model, inputs, N)
    on_mesh = parallelize(model, make_mesh(N, data))(inputs)
    assert on_mesh.shape == expected.shape
    np.testing.assert_allclose(real(model, inputs, on_mesh), real(model, inputs, expected), rtol=1e-5, atol=1e-5)


def cases(every, fast):
    assert set(fast) <= set(every)
    return [pytest.param(*case, marks=[] if case in fast else pytest.mark.slow) for case in every]


STEPS = 6


@nnx.jit(static_argnums=3)
def recompute(model, text, new, N, arrived=None):
    """Logits [B,STEPS,V] at the end of the prompts and behind every new token [B,STEPS] but the last.

    `arrived` says of every block which receiver has the codes of which sender [L,N,N]; None for all.

    The prompts are split as ever, and every new token is one more of the last shard. A token sees none that follows,
    so that one run over the whole sequences is a run at every step.
    """
    T, places = text.ids.shape[1], text.lengths[:, None] + jnp.arange(STEPS)
    rows = jnp.arange(len(text.lengths))[:, None]
    ids = jnp.pad(text.ids, [(0, 0), (0, STEPS)]).at[rows, places].set(new)
    lengths = Shards.ragged(text.lengths, T, N).lengths.at[:, -1].add(STEPS)
    shards = Shards(lengths, slots=-(-T // N) + STEPS, causal=True)
    if arrived is not None:
        arrived = jnp.broadcast_to(arrived[:, None, :, :, None], (len(arrived), len(ids), N, N, shards.S))
        arrived = arrived.reshape(*arrived.shape[:3], -1)
    out = model(shards.scatter(ids), Astra.virtual(shards, arrived) if N > 1 else Single(shards))[0]
    return shards.gather(out, T + STEPS)[rows, places - 1]


def decode(generator, text, new):
    """Logits [B,STEPS,V] of the cache's way, given the tokens; by the programs that `tokens` compiled."""
    logits, cache = generator.prefill(text)
    B, (M, R) = len(text.lengths), cache.room
    M, by_row = M + bucket(STEPS, batch.NO_LIMIT), NamedSharding(generator.ends, P(DATA))
    slots = np.arange(B, dtype=np.int32) % (B // generator.ends.size)
    greedy = Draws.of([Sampling()] * B)
    rows = generator.enter(None, (logits, cache), greedy, slots, work=0, count=B, room=(M, R))
    found = [logits]
    for ids in new.T[:-1]:
        rows, logits = generator.decode(rows._replace(ids=jax.device_put(ids, by_row)), 0)
        found.append(logits)
    return np.stack(found, axis=1)


def tokens(generator, text, sampling):
    return np.stack(list(batch.tokens(generator, text, STEPS, sampling)), axis=1)
