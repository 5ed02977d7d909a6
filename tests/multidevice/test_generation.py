"""Generation on a mesh: decoding from the last shard's cache equals computing everything anew at every step."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from astra_jax.codecs.config import AstraConfig
from astra_jax.inputs.token_batches import Text
from astra_jax.mesh.sharding import Shards, make_mesh
from astra_jax.serving.generate import Generator, Sampling
from astra_jax.strategies.base import Single, Virtual

STEPS = 6


@nnx.jit(static_argnums=3)
def recompute(model, text, new, N):
    """Logits [B,STEPS,V] at the end of the prompts and behind every new token [B,STEPS] but the last.

    The prompts are split as ever, and every new token is one more of the last shard. A token sees none that follows,
    so that one run over the whole sequences is a run at every step.
    """
    T, places = text.ids.shape[1], text.lengths[:, None] + jnp.arange(STEPS)
    rows = jnp.arange(len(text.lengths))[:, None]
    ids = jnp.pad(text.ids, [(0, 0), (0, STEPS)]).at[rows, places].set(new)
    lengths = Shards.ragged(text.lengths, T, N).lengths.at[:, -1].add(STEPS)
    shards = Shards(lengths, slots=-(-T // N) + STEPS, causal=True)
    out = model(shards.scatter(ids), Virtual(shards) if N > 1 else Single(shards))[0]
    return shards.gather(out, T + STEPS)[rows, places - 1]


def decode(generator, text, new):
    """Logits [B,STEPS,V] of the cache's way, given the tokens."""
    logits, cache = generator.prefill(text, STEPS)
    found = [logits]
    for ids in new.T[:-1]:
        cache, logits, _ = generator.decode(cache, jnp.asarray(ids), jax.random.key(0), Sampling())
        found.append(logits)
    return np.stack(found, axis=1)


def tokens(generator, text, sampling):
    return np.stack(list(generator.tokens(text, STEPS, sampling)), axis=1)


EVERY = [*itertools.product(("tiny_gpt2", "tiny_llama"), ((1, 1), (2, 1), (4, 1), (2, 2)), ("hidden", "kv"))]
FAST = [
    ("tiny_gpt2", (4, 1), "kv"),
    ("tiny_llama", (2, 2), "hidden"),
]


@pytest.mark.parametrize(
    ("family", "mesh", "site"),
    [
        pytest.param(*case, id="-".join(map(str, case)), marks=[] if case in FAST else pytest.mark.slow)
        for case in EVERY
    ],
)
def test_decoding_equals_recomputing_every_step(request, random_text, family, mesh, site):
    """For prompts of one token, of fewer than devices, and of different lengths in one batch."""
    astra = AstraConfig(groups=4, codewords=16, site=site)
    model, text = request.getfixturevalue(family)(astra), random_text(23, 1, 2, 7)
    generator = Generator(model, make_mesh(*mesh))
    new = tokens(generator, text, Sampling(temperature=3.0))
    assert len(np.unique(new)) > STEPS  # it does not say the same all the time
    np.testing.assert_allclose(decode(generator, text, new), recompute(model, text, new, mesh[0]), rtol=1e-5, atol=1e-5)
    greedy = tokens(generator, text, Sampling())
    np.testing.assert_array_equal(greedy, recompute(model, text, greedy, mesh[0]).argmax(-1))


def test_a_batch_that_the_data_axis_does_not_divide(tiny_llama, random_text):
    generator = Generator(tiny_llama(AstraConfig(groups=4, codewords=16)), make_mesh(2, 2))
    text = random_text(23, 1, 2, 7)
    four = tokens(generator, text, Sampling())
    three = tokens(generator, Text(text.ids[:3], text.lengths[:3]), Sampling())
    np.testing.assert_array_equal(three, four[:3])


def test_the_cache_keeps_remote_tokens_as_codes(tiny_llama, random_text):
    model, text = tiny_llama(AstraConfig(groups=4, codewords=16)), random_text(23, 1)
    generator = Generator(model, make_mesh(4))
    next(generator.tokens(text, 2, Sampling()))
    L, B, R, G, J, E = 2, 2, 3 * 6, 4, 2, 4  # 24 slots on 4 devices are 6 each, of which 3 devices are remote
    assert generator.cache_memory.kept == L * B * R * G * 2
    assert generator.cache_memory.full == 2 * L * B * R * J * E * 4

    alone = Generator(model, make_mesh(1))
    next(alone.tokens(text, 2, Sampling()))
    assert tuple(alone.cache_memory) == (0, 0)
