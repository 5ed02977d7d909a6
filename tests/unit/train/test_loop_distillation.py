"""Finetuning that generalises: a teacher's words and states, cuts at random places, and packets that are lost."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from astra_jax.codecs.config import VQConfig
from astra_jax.inputs.token_batches import Text
from astra_jax.mesh.sharding import Shards
from astra_jax.strategies.base import Single
from tests.helpers.training import logged
from train.loop import Training, draw_packet_loss, make_step, move_cuts, start, step_key, strategy_of, train, with_room
from train.memory import Memory, training_mesh
from train.objective import Batch, divergence, hidden_distance, mean_of, run_task

CODES = VQConfig(groups=1, codewords=64)


def exactly(model: Any, inputs: Any) -> Any:
    """The model with codewords that are the very vectors which its codecs are to quantize of these inputs."""

    @nnx.jit
    def captured(model: Any, inputs: Any) -> jax.Array:
        strategy = Single(model.shards(1, inputs), capture=True)
        return model(strategy.shards.scatter(model.to_tokens(inputs)), strategy)[1].captured  # [L,B,S,D]

    y = np.asarray(captured(model, inputs))
    vectors = y.reshape(len(y), 1, -1, y.shape[-1])
    assert vectors.shape[2] <= CODES.codewords
    model.codec.codebook[...] = jnp.asarray(vectors[:, :, np.arange(CODES.codewords) % vectors.shape[2]])
    return model


@pytest.fixture
def family(request, tiny_vit, tiny_gpt2, tiny_llama, tiny_bert, random_text, rank_coded) -> tuple[Any, Batch]:
    """A tiny model with codebooks, and a batch that it could be trained on; texts are of unequal lengths."""
    text, label = random_text(24, 13, T=24), np.asarray([1, 0], np.int32)
    classes = {"task": "classification", "num_labels": 3}
    found = {
        "vit": lambda: (tiny_vit(CODES), {"input": rank_coded(2), "label": label}),
        "gpt2": lambda: (tiny_gpt2(CODES), {"input": text}),
        "llama": lambda: (tiny_llama(CODES), {"input": text}),
        "llama classifier": lambda: (tiny_llama(CODES, **classes), {"input": text, "label": label}),
        "bert classifier": lambda: (tiny_bert(CODES, **classes, pooling="class"), {"input": text, "label": label}),
    }
    return found[request.param]()


def stepper(model: Any, training: Training, N: int) -> Callable[..., tuple[Any, dict[str, float]]]:
    """A function from a model and a batch to the state after one step, and its metrics. `model` is the teacher."""
    step = make_step(start(model, training)[0], training, N)
    teacher = nnx.state(model, nnx.Param) if training.has_teacher else None

    def run(model: Any, batch: Batch) -> tuple[Any, dict[str, float]]:
        _, frozen, state = start(model, training)
        state, metrics = step(state, frozen, batch, teacher)
        return state, {name: float(value) for name, value in metrics.items()}

    return run


# --- the teacher --------------------------------------------------------------------------------------------------


def test_distances_by_hand():
    rng = np.random.default_rng(0)
    ours, theirs = (rng.normal(size=(2, 5, 7)) for _ in range(2))
    a, b = (rng.normal(size=(2, 5, 3)) for _ in range(2))
    valid = np.arange(5) < np.asarray([[5], [3]])
    counts = np.arange(5) < np.asarray([[4], [2]])
    rows = divergence(jnp.float32(ours), jnp.float32(theirs))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (theirs, ours))
    kl = (p * np.log(p / q)).sum(-1)
    assert float(mean_of(rows, jnp.asarray(counts))) == pytest.approx(kl[counts].mean(), rel=1e-5)
    found = hidden_distance(jnp.float32(a), jnp.float32(b), jnp.asarray(valid))
    assert float(found) == pytest.approx(((a - b)[valid] ** 2).mean() / (b[valid] ** 2).mean(), rel=1e-5)


@pytest.mark.parametrize(
    "family",
    [
        "vit",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("gpt2", "llama", "bert classifier", "llama classifier")
        ),
    ],
    indirect=True,
)
def test_with_exact_codes_nothing_is_far_from_the_teacher(family):
    """Wherever the cuts are: each token's states and logits meet the teacher's of the same token."""
    model, batch = family
    run = stepper(model, Training(distillation=1.0, hidden=1.0, cuts="random", noise=0.0, learning_rate=1e-2), 3)
    _, far = run(model, batch)  # codewords drawn at random
    assert far["kl"] > 1e-3 and far["hidden"] > 1e-2
    state, near = run(exactly(model, batch["input"]), batch)
    assert near["kl"] == pytest.approx(0, abs=1e-5) and near["hidden"] == pytest.approx(0, abs=1e-8)
    parameters = nnx.state(model, nnx.Param)
    assert not all(map(np.array_equal, jax.tree.leaves(state.params), jax.tree.leaves(parameters)))


@pytest.mark.slow
def test_a_student_comes_closer(tiny_gpt2, random_text):
    """It begins with other parameters than the teacher's, which stay what they are."""
    weights = {"distillation": 30.0, "hidden": 30.0}
    training = Training(**weights, noise=0.0, learning_rate=1e-2, warmup=0.0, ema_decay=1.0, revive_below=0.0)
    model, batch = exactly(tiny_gpt2(CODES), random_text(24, 13, T=24)), {"input": random_text(24, 13, T=24)}
    teacher = nnx.state(model, nnx.Param)
    graphdef, frozen, state = start(model, training)
    state = state._replace(params=jax.jit(lambda params: jax.tree.map(lambda a: 0.8 * a, params))(state.params))
    step, log = make_step(graphdef, training, 3), []
    for _ in range(24):
        state, metrics = step(state, frozen, batch, teacher)
        log.append(metrics)
    assert log[-1]["kl"] < 0.5 * log[0]["kl"] and log[-1]["hidden"] < 0.5 * log[0]["hidden"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2"], indirect=True)
def test_the_loss_has_the_distances_with_their_weights(family):
    model, batch = family
    plain = stepper(model, Training(), 2)(model, batch)[1]
    assert not {"kl", "hidden"} & set(plain)
    assert plain["loss"] == pytest.approx(plain["task"] + 5e-4 * plain["commitment"])
    taught = stepper(model, Training(distillation=2.0, hidden=3.0), 2)(model, batch)[1]
    assert taught["task"] == pytest.approx(plain["task"])
    assert taught["loss"] == pytest.approx(plain["loss"] + 2 * taught["kl"] + 3 * taught["hidden"])


# --- the cuts -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(
    lengths=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    N=st.sampled_from([1, 2, 5]),
    class_token=st.sampled_from([None, "distributed"]),
    seed=st.integers(0, 99),
)
def test_every_token_is_in_one_shard_of_a_bounded_length(lengths, N, class_token, seed):
    even = Shards.ragged(jnp.asarray(lengths), 40, N, class_token, causal=class_token is None)
    drawn = move_cuts(even, jax.random.key(seed), 2)
    assert (drawn.class_token, drawn.causal, drawn.S) == (class_token, even.causal, with_room(even).S)
    tokens, index = drawn.tokens(), np.asarray(drawn.index())
    valid = np.asarray(tokens.valid)[..., drawn.class_slots :]
    for row, length in enumerate(lengths):
        assert index[row][valid[row]].tolist() == list(range(length))
        parts, least = np.asarray(drawn.lengths)[row], length // N
        assert parts.sum() == length and parts.max() <= max(2 * least, least + 1)
        assert parts.min() >= min(1, least)  # of a text with fewer tokens than shards, the first have none
    x = jnp.arange(80).reshape(2, 40)
    back = drawn.gather(drawn.scatter(x), 40)
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(back[row, :length], x[row, :length])


def test_cuts_fill_their_range_and_are_even_on_average():
    drawn = jax.jit(lambda key: move_cuts(Shards.split(32, 4), key, 4000).lengths)
    lengths = np.asarray(drawn(jax.random.key(0)))
    # Even shards have 8; an inner one has two ends, which move by up to 3 each, and the first has one.
    assert (lengths[:, 1].min(), lengths[:, 1].max()) == (2, 14)
    assert (lengths[:, 0].min(), lengths[:, 0].max()) == (5, 11)
    np.testing.assert_allclose(lengths.mean(axis=0), 8, atol=0.2)
    assert len(np.unique(lengths, axis=0)) == 7**3


# --- packets that are lost ----------------------------------------------------------------------------------------


def test_what_is_lost_is_drawn_by_seed_and_step(tiny_vit, rank_coded):
    model, images = tiny_vit(VQConfig(groups=4, codewords=16)), rank_coded(3)
    training = Training(packet_loss=0.4, cuts="random")
    drawn = [draw_packet_loss(model, training, 4, images, step) for step in range(60)]
    again = draw_packet_loss(model, training, 4, images, 7)
    assert again[0] == drawn[7][0] and np.array_equal(again[1], drawn[7][1])
    shares = np.asarray([share for share, _ in drawn])
    assert 0 <= shares.min() < 0.05 and 0.35 < shares.max() <= 0.4
    slots = 4 * (1 + with_room(model.shards(4)).S)
    assert drawn[0][1].shape == (3, 2, 4, slots)
    senders = np.arange(slots) // (slots // 4)
    remote = np.arange(4)[:, None] != senders
    assert all(there[:, :, ~remote].all() for _, there in drawn)
    lost = np.asarray([1 - there[:, :, remote].mean() for _, there in drawn])
    assert np.corrcoef(lost, shares)[0, 1] > 0.8


def test_packets_hold_the_groups_that_are_used(tiny_gpt2, random_text):
    """32 codes of 16 bits are 64 bytes, so that 32 tokens take two packets; of one code each they take one."""
    model, text = tiny_gpt2(VQConfig(groups=32, codewords=65536, site="kv")), random_text(64, 64, T=64)

    def together(training: Training) -> bool:
        """Whether all codes of a message share their fate."""
        there = draw_packet_loss(model, training, 2, text, 0)[1]
        parts = there.reshape(*there.shape[:-1], 2, -1)
        return bool((parts == parts[..., :1]).all())

    assert not together(Training(packet_loss=1.0)) and together(Training(packet_loss=1.0, groups=(1,)))


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_lost_codes_are_not_attended_to(family):
    model, batch = family
    there = draw_packet_loss(model, Training(packet_loss=1.0), 2, batch["input"], 0)[1]
    own = np.arange(2)[:, None] == np.arange(24) // 12

    @partial(nnx.jit, static_argnums=0)
    def task(training: Training, model: Any, given: Batch) -> jax.Array:
        return run_task(model, given, strategy_of(model, training, 2, given, step_key(training, 0)), 0.0)[0]

    def loss(training: Training, **more: Any) -> float:
        masks = {name: np.broadcast_to(mask, there.shape) for name, mask in more.items()}
        return float(task(training, model, jax.tree.map(jnp.asarray, {**batch, **masks})))

    lossy = Training(packet_loss=1.0)
    assert loss(lossy, arrived=np.True_) == pytest.approx(loss(Training()), rel=1e-6)
    assert len({round(loss(lossy, arrived=mask), 4) for mask in (np.True_, there, own)}) == 3


# --- all of it ----------------------------------------------------------------------------------------------------


class Texts:
    """Endless batches of texts of unequal lengths, whose tokens count upwards."""

    def __init__(self, batch_size: int):
        self.position, self.batch_size = 0, batch_size

    def __next__(self) -> Batch:
        rng = np.random.default_rng(self.position)
        self.position += 1
        first = rng.integers(0, 50, (self.batch_size, 1))
        lengths = rng.integers(9, 17, self.batch_size).astype(np.int32)
        return {"input": Text(((first + np.arange(16)) % 50).astype(np.int32), lengths)}

    def get_state(self) -> dict[str, int]:
        return {"position": self.position}

    def set_state(self, state: dict[str, int]) -> None:
        self.position = state["position"]


ALL = Training(
    steps=8,
    batch_size=8,
    shards=(1, 3),
    distillation=1.0,
    hidden=1.0,
    cuts="random",
    packet_loss=0.3,
    learning_rate=3e-3,
)


def fit(model: Any, training: Training, out: Path, data_devices: int = 1) -> tuple[Any, list[dict]]:
    memory, texts = Memory(training_mesh(data_devices) if data_devices > 1 else None), Texts(training.batch_size)
    model, _ = train(model, training, texts, out, memory=memory, source={}, save_every=5, label="test")
    return model, logged(out)


@pytest.fixture(scope="module")
def whole_run(tiny_gpt2, tmp_path_factory) -> tuple[Path, Any, list[dict]]:
    out = tmp_path_factory.mktemp("whole")
    return out, *fit(tiny_gpt2(CODES), ALL, out)


@pytest.mark.slow
def test_resuming_equals_never_stopping(whole_run, tiny_gpt2, tmp_path):
    """The teacher is the model from before the first step, also where the student has gone further."""
    out, model, log = whole_run
    shutil.copytree(out, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "train" / "8")  # as if killed after step 5
    resumed, again = fit(tiny_gpt2(CODES), ALL, tmp_path / "run")
    assert again == log and {row["shards"] for row in log[5:]} == {1, 3}
    ours, theirs = (jax.tree.leaves(nnx.state(m)) for m in (resumed, model))
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.slow
def test_the_log_has_distances_and_what_was_lost(whole_run):
    _, _, log = whole_run
    assert all({"kl", "hidden"} <= set(row) for row in log)
    assert all(("lost" in row) == (row["shards"] > 1) for row in log)
    assert all(0 <= row.get("lost", 0) <= 0.3 for row in log)


@pytest.mark.slow
def test_data_parallel_equals_one_device(whole_run, tiny_gpt2, tmp_path):
    _, _, log = whole_run
    _, spread = fit(tiny_gpt2(CODES), ALL, tmp_path, data_devices=2)
    for ours, theirs in zip(spread[:2], log[:2], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
