"""Packet loss with a predictor: what every shard expects of tokens whose codes it did not get."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from astra_jax.codecs.config import NestedPQConfig, VQConfig
from astra_jax.mesh.sharding import Shards
from astra_jax.models.blocks import block_at
from astra_jax.models.gpt2 import GPT2
from astra_jax.models.interface import TokenIds
from astra_jax.models.mask import Block
from astra_jax.strategies.coded import Astra
from train.navq import NoiseAugmented

LINEAR = VQConfig(groups=4, codewords=16, predictor="linear")
IDS = dataclasses.replace(LINEAR, schedule=("known", "coded", "coded"))
MLP = dataclasses.replace(LINEAR, predictor="mlp", hidden_units=5)
NESTED = NestedPQConfig.of(LINEAR, widths=(1, 2, 3, 4), levels=(4,))

# --- block by block -----------------------------------------------------------------------------------------------

L, B, N, W = 3, 2, 3, 16


@pytest.fixture(scope="module")
def codecs(tiny_gpt2):
    """Makes the codecs of L blocks, all of whose variables are random; predictors are small, lest estimates grow."""

    def make(astra):
        model = tiny_gpt2(astra, n_layer=L)
        predictor = nnx.state(model.codec.predictor)
        nnx.update(model.codec.predictor, jax.tree.map(lambda weights: 0.3 * weights, predictor))
        return [block_at(model.blocks, block).attention.codec for block in range(L)]

    return make


def split_of(name):
    """A split, and which shard has each of its slots. Of the second text a shard has nothing."""
    if name == "class token":
        shards = Shards((3, 1, 2), "distributed")
    else:
        shards = Shards(jnp.asarray([[3, 1, 2], [0, 1, 1]]), slots=3, causal=True)
    return shards, np.repeat(np.arange(N), shards.class_slots + shards.S)


def draw(split, seed=0):
    """What the codecs see [L,B,slots,W], and which codes arrived [L,B,N,slots]; of own ones that says nothing."""
    rng, (_, own) = np.random.default_rng(seed), split_of(split)
    return rng.normal(size=(L, B, len(own), W)).astype(np.float32), rng.random((L, B, N, len(own))) < 0.5


def exchange(codecs, y, there, split, exact=False, lost="predicted", noise=None):
    """What every exchange gives on virtual shards: `Exchanged`.

    Args:
      there: which codes arrived; None for all.
      exact: whether all shards know what the first block's codec sees.
      noise: its strength, if any.
    """
    graphdef = nnx.graphdef(codecs[0])
    there = None if there is None else jnp.asarray(there)
    return _exchange(graphdef, [nnx.state(codec) for codec in codecs], y, there, split, exact, lost, noise)


@partial(jax.jit, static_argnames=("graphdef", "split", "exact", "lost", "noise"))
def _exchange(graphdef, states, y, there, split, exact, lost, noise):
    shards = split_of(split)[0]
    if noise is None:
        strategy = Astra.virtual(shards, there, lost=lost)
    else:
        strategy = NoiseAugmented.virtual(shards, there, lost=lost, key=jax.random.key(0), strength=noise)
    vectors = strategy.sent(y[0]).reshape(-1, *strategy.sent(y[0]).shape[2:])
    known = TokenIds(jnp.zeros(y.shape[1:3], jnp.int32), 1, lambda *_: vectors)
    estimate, found = strategy.start(nnx.merge(graphdef, states[0]), y[0], known if exact else None), []
    for number, state in enumerate(states):
        block = Block(number, "known" if exact and number == 0 else "coded")
        found.append(strategy.exchange(nnx.merge(graphdef, state), y[number], estimate, block))
        estimate = found[-1].estimate
    return found


def by_slot(estimates, shards):
    """[receiver,N,B,S,W] -> [B,receiver,N*S,W]."""
    return np.moveaxis(np.asarray(estimates), 2, 0).reshape(B, N, -1, W)


def sent_places(shards):
    """Places, among all slots, of those that are sent."""
    slots = np.arange(N * (shards.class_slots + shards.S)).reshape(N, -1)
    return slots[:, shards.home_slots :].reshape(-1)


def around_by_hand(x, shards):
    """What is around every slot of x [B,slots,W] in its shard, one by one."""
    valid, sent = (np.broadcast_to(a, (B, N, a.shape[-1])).reshape(B, -1) for a in shards.tokens()[2:])
    x, found, S = np.asarray(x), np.zeros_like(x), shards.class_slots + shards.S
    for b, s in np.ndindex(x.shape[:2]):
        here = [t for t in range(s // S * S, (s // S + 1) * S) if valid[b, t] and sent[b, t]]
        if shards.causal:
            found[b, s] = sum((0.2 * 0.8 ** (s - t) * x[b, t] for t in here if t <= s), np.zeros(x.shape[-1]))
        elif here:
            found[b, s] = np.mean([x[b, t] for t in here], axis=0)
    return found


@nnx.jit
def expect(codec, x, around):
    return codec.predictor(x, lambda _: around)


@nnx.jit
def say(codec, y):
    return codec.decode(codec.encode(y))


def by_hand(codecs, y, there, split, exact):
    """The estimates [L,B,N,slots,W] that every shard holds, one by one."""
    shards, own = split_of(split)
    y, held = np.asarray(y), np.zeros((L, B, N, len(own), W), np.float32)

    for block, codec in enumerate(codecs):
        if block == 0 and exact:
            expected = np.broadcast_to(y[0], (N, B, len(own), W))
        else:
            before = held[block - 1] if block else np.zeros_like(held[0])
            expected = [expect(codec, x, around_by_hand(x, shards)) for x in (before[:, r] for r in range(N))]
            expected = np.stack(expected)
        # The token's own shard knows nothing of what others have lost.
        mine = np.stack([expected[r, :, m] for m, r in enumerate(own)], axis=1)
        said = np.asarray(say(codec, y[block] - mine))
        for b, r, m in np.ndindex(B, N, len(own)):
            heard = (there[block, b, r, m] or r == own[m]) and not (block == 0 and exact)
            held[block, b, r, m] = expected[r, b, m] + heard * said[b, m]
    return held


@pytest.mark.parametrize(
    ("astra", "split", "exact", "lost"),
    [
        *((LINEAR, "class token", False, "predicted"), (IDS, "text", True, "predicted")),
        *((LINEAR, "class token", False, "masked"), (IDS, "text", True, "masked")),
        *((NESTED, "text", False, "predicted"), (MLP, "class token", False, "predicted")),
        (MLP, "text", True, "predicted"),
    ],
    ids=[
        *("class token", "token ids", "class token, masked", "token ids, masked"),
        *("nested", "around, class token", "around, text"),
    ],
)
def test_a_query_meets_what_its_shard_holds(codecs, astra, split, exact, lost):
    """It sees every token at most once, as its shard has it, at its place in the sequence."""
    parts, (y, there), (shards, own) = codecs(astra), draw(split), split_of(split)
    held = by_hand(parts, y, there, split, exact)
    tokens = [np.broadcast_to(np.reshape(a, (-1, len(own))), (B, len(own))) for a in shards.tokens()]
    _, position, valid, sent = tokens
    slots = sent_places(shards)
    for block, (remote, _, _) in enumerate(jax.device_get(exchange(parts, y, there, split, exact, lost))):
        seen = np.broadcast_to(remote.mask, (B, len(own), N * len(slots)))
        places = np.broadcast_to(remote.position, (B, N * len(slots)))
        for b, q in np.ndindex(B, len(own)):
            r, columns = own[q], np.flatnonzero(seen[b, q])
            visible = valid[b] & sent[b] & (own < r if shards.causal else own != r)
            if lost == "masked" and not (block == 0 and exact):
                visible = visible & there[block, b, r]
            np.testing.assert_array_equal(slots[columns % len(slots)], np.flatnonzero(visible))
            np.testing.assert_array_equal(places[b, columns], position[b, visible])
            np.testing.assert_allclose(remote.content.y[b, columns], held[block, b, r, visible], rtol=1e-4, atol=1e-4)


@given(
    where=st.tuples(st.integers(0, L - 1), st.integers(0, B - 1), st.integers(0, N - 1), st.integers(0, 8)),
    seed=st.integers(0, 5),
)
def test_a_lost_code_is_missed_by_its_receiver_alone_from_then_on(codecs, where, seed):
    parts, (y, there), (shards, own) = codecs(LINEAR), draw("text", seed), split_of("text")
    (block, b, r, m), held = where, []
    for came in (True, False):
        there[where] = came
        held.append(np.stack([by_slot(one.estimate, shards) for one in exchange(parts, y, there, "text")]))
    expected = np.zeros(there.shape, bool)
    expected[block:, b, r, m] = r != own[m]  # a shard cannot lose its own
    np.testing.assert_array_equal((held[0] != held[1]).any(-1), expected)


@pytest.mark.parametrize("exact", [False, True])
def test_gradients_pass_through_what_arrived(codecs, exact):
    """One for every shard that has the code, none through a prediction; a first block that all know reaches all."""
    parts, (y, there), (shards, own) = codecs(LINEAR)[:2], draw("class token"), split_of("class token")
    y, there = y[:2], there[:2]

    def total(y):
        return sum(one.remote.content.y.sum() for one in exchange(parts, y, there, "class token", exact, noise=1.0))

    receivers = (there | (np.arange(N)[:, None] == own)).sum(2)  # [L,B,slots]
    if exact:
        receivers[0] = N
    receivers[..., np.setdiff1d(np.arange(len(own)), sent_places(shards))] = 0
    np.testing.assert_allclose(jax.jit(jax.grad(total))(y), np.broadcast_to(receivers[..., None], y.shape), atol=1e-5)


def test_quiet_noise_is_what_evaluation_sees(codecs):
    """And what training observes of codes does not depend on who got them."""
    parts, (y, there) = codecs(NESTED)[:2], draw("text")
    y, there = y[:2], there[:2]
    noisy, plain = (exchange(parts, y, there, "text", noise=noise) for noise in (0.0, None))
    unlost = exchange(parts, y, None, "text", noise=0.0)
    for (quiet, _, seen), (remote, _, _), (_, _, expected) in zip(noisy, plain, unlost, strict=True):
        np.testing.assert_allclose(quiet.content.y, remote.content.y, rtol=1e-5, atol=1e-5)
        compare = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
        jax.tree.map(compare, seen.observed, expected.observed)


# --- whole models -------------------------------------------------------------------------------------------------


@nnx.jit(static_argnames=("devices", "lost", "seed"))
def run(model, inputs, devices, arrived=None, lost="predicted", seed=None):
    """Outputs of all slots, and reports; `arrived` is None, or says of all codes that they did or did not."""
    shards = model.shards(devices, inputs)
    tokens = shards.scatter(model.to_tokens(inputs))
    if arrived is not None:
        slots = devices * (shards.class_slots + shards.S)
        arrived = jnp.broadcast_to(arrived, (model.config.num_hidden_layers, len(tokens), devices, slots))
    if seed is None:
        return model(tokens, Astra.virtual(shards, arrived, lost=lost))
    return model(tokens, NoiseAugmented.virtual(shards, arrived, lost=lost, key=jax.random.key(seed)))


NOTHING, ALL = np.array(False), np.array(True)


@pytest.mark.parametrize(
    ("family", "astra", "lost", "seed"),
    [
        pytest.param("tiny_vit", LINEAR, "predicted", None, marks=pytest.mark.slow),
        ("tiny_gpt2", dataclasses.replace(IDS, schedule=IDS.schedule[:2]), "masked", None),
        pytest.param("tiny_llama", dataclasses.replace(NESTED, site="kv"), "predicted", 0, marks=pytest.mark.slow),
    ],
    ids=["ViT", "GPT-2", "Llama, training"],
)
def test_without_losses_nothing_changes(request, rank_coded, random_text, family, astra, lost, seed):
    """Neither outputs nor what training observes, but for 1e-6 of the largest: sums have more terms."""
    model = request.getfixturevalue(family)(astra)
    inputs = rank_coded(2) if family == "tiny_vit" else random_text(23, 1, 7)
    plain, lossless = run(model, inputs, 3, seed=seed), run(model, inputs, 3, ALL, lost, seed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(b).max()), lossless, plain)


@pytest.mark.parametrize("astra", [LINEAR, IDS], ids=["linear", "token ids"])
def test_where_all_is_lost_no_code_is_heard(tiny_gpt2, random_text, astra):
    """Other codebooks change nothing. Predictions from token ids tell texts apart, those from a mean do not."""
    model, text = tiny_gpt2(astra, n_layer=3), random_text(24, 20)
    ids = text.ids.copy()
    ids[:, :3] += 1  # of the first of four shards; the second one's tokens begin at 6, and in the shorter text at 5
    lost, plain = run(model, text, 4, NOTHING)[0], run(model, text, 4)[0]
    others = run(model, text._replace(ids=ids), 4, NOTHING)[0]
    assert np.abs(lost - plain).max() > 1e-3
    assert (np.abs(lost - others)[:, 6:].max() > 1e-4) == (astra is IDS)
    model.codec.codebook[...] += 1
    np.testing.assert_array_equal(run(model, text, 4, NOTHING)[0], lost)
    assert np.abs(run(model, text, 4)[0] - plain).max() > 1e-3


def test_where_all_is_masked_every_shard_is_alone(tiny_gpt2, random_text):
    """The second shard of a text sees as much of it as if the first were another text."""
    model, text = tiny_gpt2(LINEAR), random_text(24)
    ids = text.ids.copy()
    ids[:, :12] += 1
    one, other = (run(model, text._replace(ids=i), 2, NOTHING, "masked")[0] for i in (text.ids, ids))
    np.testing.assert_array_equal(one[:, 12:], other[:, 12:])
    assert np.abs(one - run(model, text, 2, NOTHING)[0])[:, 12:].max() > 1e-3  # predicted ones are not nothing


def test_what_all_know_in_half_precision_goes_on_in_full(random_module, tiny_gpt2, random_text):
    """Estimates are float32 from the first block on, whatever the model computes in."""
    model = random_module(GPT2, tiny_gpt2(n_layer=3).config, IDS, dtype=jnp.bfloat16)
    assert np.isfinite(run(model, random_text(24, 20), 3)[0]).all()
