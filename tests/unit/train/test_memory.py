"""What a training step saves memory with: split arrays, blocks that are computed again, and logits in parts."""

import contextlib
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from astra_jax.codecs.config import VQConfig
from astra_jax.errors import AstraError
from eval.cost.hlo import collectives_in
from tests.helpers.training import Batches, finetune, logged, make_model
from train.loop import Training, make_step, start, train
from train.memory import FSDP, ONE_DEVICE, Memory, split, training_mesh

CODES = VQConfig(groups=4, codewords=16)
TRAINING = Training(steps=4, batch_size=8, shards=(4,), learning_rate=1e-3, warmup=0.0, cuts="random")


@pytest.fixture
def all_split(monkeypatch):
    """Also the arrays of a tiny model."""
    monkeypatch.setattr("train.memory.LEAST_SPLIT", 1)


@pytest.fixture(scope="module")
def batch(random_text):
    return {"input": random_text(*np.random.default_rng(0).integers(4, 24, 8).tolist())}


@pytest.fixture(scope="module")
def alone(tiny_gpt2, batch):
    """What one device does in a training, of which each is run once."""
    return functools.cache(lambda training: run(tiny_gpt2(CODES), training, batch, ONE_DEVICE))


def run(model, training, batch, memory):
    """The state after some steps, and their losses."""
    graphdef, frozen, state = start(model, training, memory)
    step, losses = make_step(graphdef, training, 4, memory), []
    teacher = memory.spread(nnx.state(model, nnx.Param)) if training.has_teacher else None
    for _ in range(training.steps):
        state, metrics = step(state, frozen, memory.batch(batch), teacher)
        losses.append(float(metrics["loss"]))
    return state, losses


def compiled(model, training, batch, memory):
    graphdef, frozen, state = start(model, training, memory)
    return make_step(graphdef, training, 4, memory).lower(state, frozen, memory.batch(batch)).compile()


def test_the_longest_axis_that_can_be_is_split_but_never_the_blocks():
    mesh, f32 = training_mesh(4, 2), jnp.float32
    shapes = {
        "embed": jax.ShapeDtypeStruct((50257, 1024), f32),  # no multiple of 4, so the other axis
        "blocks": {
            "up": jax.ShapeDtypeStruct((8000, 256, 1024), f32),
            "down": jax.ShapeDtypeStruct((4, 1024, 1023), jnp.bfloat16),
            "norm": jax.ShapeDtypeStruct((4, 1024), f32),
            "odd": jax.ShapeDtypeStruct((4, 1025, 1023), f32),
        },
    }
    found = jax.tree.map(lambda where: where.spec, split(shapes, mesh))
    assert found == {
        "embed": P(None, FSDP),
        "blocks": {
            "up": P(None, None, FSDP),
            "down": P(None, FSDP, None),
            "norm": P(None, None),
            "odd": P(*[None] * 3),
        },
    }


@pytest.mark.parametrize(
    ("memory", "options"),
    [
        (lambda: Memory(training_mesh(4, 2), "none"), {}),
        (lambda: Memory(training_mesh(8), "block"), {"distillation": 1.0, "hidden": 1.0}),
        (lambda: Memory(None, "block"), {}),
        (lambda: Memory(training_mesh(2), "none"), {"trains": "codebooks"}),
    ],
    ids=["none, 2x4", "block, 8, a teacher", "block, one device", "codebooks, 2"],
)
def test_it_computes_what_one_device_does(tiny_gpt2, batch, alone, all_split, monkeypatch, memory, options):
    memory, training = memory(), dataclasses.replace(TRAINING, **options)
    expected, losses = alone(training)
    monkeypatch.setattr("eval.quality.perplexity.LOGITS", 8 * 5 * 50)
    found, ours = run(tiny_gpt2(CODES), training, batch, memory)
    np.testing.assert_allclose(ours, losses, rtol=1e-5)
    # Gradients and moments, not parameters: AdamW scales what is rounding alone up to a full step.
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        if not jax.tree_util.keystr(path).startswith(".params"):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=jax.tree_util.keystr(path))
    if memory.mesh is not None:
        where = split(found, memory.mesh)
        assert jax.tree.map(lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), found, where)
        kernels = [a for a in jax.tree.leaves((found.params, found.codecs)) if a.ndim > 2]
        assert kernels and all(a.sharding.shard_shape(a.shape) != a.shape for a in kernels)


@pytest.mark.parametrize("remat", [pytest.param("none", marks=pytest.mark.slow), "block"])
def test_weights_are_gathered_block_by_block(tiny_gpt2, batch, all_split, remat):
    """Never those of several blocks together, in the forward pass and again in the backward pass; and what devices have
    of the batch stays where it is."""
    program = compiled(tiny_gpt2(CODES, n_layer=3), TRAINING, batch, Memory(training_mesh(8), remat))
    collectives = list(collectives_in(program.as_text()))
    gathers = [c for c in collectives if c.kind == "all-gather"]
    q_k_v_o = [c for c in gathers if c.shape[-2:] == (16, 16)]
    assert len(q_k_v_o) == 8 and all(c.in_loop for c in q_k_v_o)
    tokens = 8 * 4 * 11  # of all devices together
    assert max(c.bytes for c in collectives if c.in_loop) <= 4 * 16 * tokens
    assert not [c for c in collectives if c.bytes >= 3 * 4 * 16 * 16 and c.shape[0] == 3]
    assert not [c for c in collectives if 50 in c.shape and math.prod(c.shape) >= tokens * 50], "logits stay"


def test_blocks_that_are_computed_again_leave_less_behind(tiny_gpt2, batch):
    """Of eight blocks, what all but their inputs take."""
    model = tiny_gpt2(CODES, n_layer=8, n_embd=64, n_head=4)
    taken = [
        compiled(model, TRAINING, batch, Memory(None, remat)).memory_analysis().temp_size_in_bytes
        for remat in ("none", "block")
    ]
    assert taken[1] < 0.5 * taken[0]


def test_logits_in_parts(tiny_gpt2, batch, monkeypatch):
    """Of a large vocabulary they are most of what a step takes."""
    model = tiny_gpt2(CODES, vocab_size=4000)
    before = compiled(model, TRAINING, batch, ONE_DEVICE).memory_analysis().temp_size_in_bytes
    monkeypatch.setattr("eval.quality.perplexity.LOGITS", 8 * 4 * 4000)
    after = compiled(model, TRAINING, batch, ONE_DEVICE).memory_analysis().temp_size_in_bytes
    assert after < 0.6 * before


def test_a_run_goes_on_with_another_number_of_devices(tmp_path, all_split):
    """As if it had had one device all along."""
    logs = {}
    for name, parts in {"one": {1: 6}, "several": {8: 3, 2: 6}}.items():
        for devices, steps in parts.items():
            memory = Memory(training_mesh(devices)) if devices > 1 else ONE_DEVICE
            training = Training(steps=6, batch_size=8, shards=(2,), learning_rate=1e-3)
            data = Stopping(8, steps)
            with contextlib.suppress(KeyboardInterrupt):
                train(make_model(), training, data, tmp_path / name, memory=memory, source={}, save_every=3, label="")
        logs[name] = logged(tmp_path / name)
    assert [row["step"] for row in logs["several"]] == [1, 2, 3, 4, 5, 6]
    for ours, theirs in zip(logs["several"], logs["one"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


class Stopping(Batches):
    """Batches up to a step."""

    def __init__(self, batch_size, last):
        super().__init__(batch_size)
        self.last = last

    def __next__(self):
        if self.position == self.last:
            raise KeyboardInterrupt
        return super().__next__()


def test_a_batch_that_devices_cannot_share():
    with pytest.raises(AstraError, match=r"--batch-size is 12; it must be a multiple of the 8 devices"):
        Memory(training_mesh(4, 2)).check(12)


def test_frozen_weights_are_saved_as_they_were(tmp_path, tiny_gpt2, word_tokenizer):
    """The verb computes with them in bfloat16, split over devices."""
    model = tiny_gpt2(CODES)
    options = "--trains codebooks --dtype bfloat16 --devices 2x4 --remat block"
    tuned = finetune(tmp_path, model, word_tokenizer(40), options).model
    for kept in (nnx.Param, nnx.Not(nnx.Param)):
        before, after = (jax.tree.leaves(nnx.state(m, kept)) for m in (model, tuned))
        same = [a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
        assert all(same) == (kept is nnx.Param)
