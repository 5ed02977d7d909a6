"""The training loop: what it trains, and that a stopped run goes on as if it had never stopped."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from astra_jax.codecs.config import VQConfig
from astra_jax.errors import AstraError
from astra_jax.models.vit import ViT
from astra_jax.strategies.base import Single
from tests.helpers.models import draw
from tests.helpers.training import CONFIG, Batches, leaves, logged, make_model
from train.loop import Training, draw_shards, learning_rate, make_step, start, train
from train.memory import ONE_DEVICE, Memory, training_mesh


def fit(model: ViT, training: Training, out: Path, data_devices: int = 1, save_every: int = 100) -> tuple[ViT, int]:
    batches, memory = Batches(training.batch_size), Memory(training_mesh(data_devices) if data_devices > 1 else None)
    return train(model, training, batches, out, memory=memory, source={}, save_every=save_every, label="test")


def same(a: ViT, b: ViT) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def test_a_plain_model_learns(tmp_path):
    model, done = fit(
        make_model(codebooks=False), Training(steps=60, batch_size=16, shards=(1,), learning_rate=3e-3), tmp_path
    )
    log = logged(tmp_path)
    assert done == 60 and [row["step"] for row in log] == list(range(1, 61))
    assert np.mean([row["accuracy"] for row in log[-5:]]) > 0.9
    batch = next(Batches(16))
    logits = nnx.jit(lambda model, x: model(model.to_tokens(x), Single(model.shards(1)))[0])(model, batch["input"])
    assert np.mean(np.argmax(np.asarray(logits), -1) == batch["label"]) > 0.9


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Twelve steps in one go, for shard counts drawn from a list."""
    out = tmp_path_factory.mktemp("whole")
    training = Training(steps=12, batch_size=8, shards=(1, 2), accumulate=2)
    model, _ = fit(make_model(), training, out, save_every=5)
    return training, out, model


def test_resuming_equals_never_stopping(whole_run, tmp_path):
    training, out, model = whole_run
    shutil.copytree(out, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "train" / "12")  # as if killed between steps 10 and 12
    with (tmp_path / "run" / "train.jsonl").open("a") as file:
        file.write('{"step": 12, "half a li')
    resumed, done = fit(make_model(), training, tmp_path / "run", save_every=5)
    assert done == 12 and same(resumed, model)
    assert logged(tmp_path / "run") == logged(out)


def test_a_finished_run_is_only_loaded(whole_run):
    training, out, model = whole_run
    before = (out / "train.jsonl").read_text()
    again, done = fit(make_model(), training, out)
    assert done == 12 and same(again, model) and (out / "train.jsonl").read_text() == before


def test_other_settings_are_refused(whole_run):
    _, out, _ = whole_run
    with pytest.raises(AstraError, match=r"noise was 1\.0, now 0\.5"):
        fit(make_model(), Training(steps=12, batch_size=8, shards=(1, 2), accumulate=2, noise=0.5), out)


def test_other_data_under_the_same_name_are_refused(whole_run, monkeypatch):
    training, out, _ = whole_run
    following = Batches.__next__
    monkeypatch.setattr(Batches, "__next__", lambda self: following(self) | {"label": np.zeros(8, np.int32)})
    with pytest.raises(AstraError, match="holds a run on other data under the same name"):
        fit(make_model(), training, out)


@pytest.mark.slow
def test_data_parallel_equals_one_device(whole_run, tmp_path):
    training, _, model = whole_run
    spread, _ = fit(make_model(), training, tmp_path, data_devices=4)
    ours, theirs = (jax.tree_util.tree_leaves_with_path(nnx.state(m)) for m in (spread, model))
    for (path, a), (_, b) in zip(ours, theirs, strict=True):
        # The softmax does not see a bias of all keys: its gradient is rounding, which AdamW scales up to a full step.
        if "['k']['bias']" not in jax.tree_util.keystr(path):
            np.testing.assert_allclose(a, b, atol=1e-5, err_msg=jax.tree_util.keystr(path))


CODEBOOKS = Training(steps=3, batch_size=8, shards=(2,), trains="codebooks")


def test_codebooks_only_leaves_the_model_alone(tmp_path):
    before = make_model()
    after, _ = fit(before, CODEBOOKS, tmp_path)
    kept, moved = nnx.state(before, nnx.Param), nnx.state(after, nnx.Param)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(moved), strict=True))
    assert not np.array_equal(np.asarray(before.codec.codebook[...]), np.asarray(after.codec.codebook[...]))


def test_weight_decay_spares_biases_and_norms():
    model = make_model(codebooks=False)
    training = Training(steps=2, batch_size=8, shards=(1,), learning_rate=0.1, warmup=0.0, weight_decay=1.0, clip=0.0)
    graphdef, frozen, state = start(model, training)
    batch = next(Batches(8))
    state, _ = make_step(graphdef, training, 1)(state, frozen, batch)
    before, after = nnx.state(model, nnx.Param), state.params
    # A clip of 0 removes the gradient, so that decay alone is left.
    assert not np.array_equal(before["blocks"]["mlp"]["up"]["kernel"][...], after["blocks"]["mlp"]["up"]["kernel"][...])
    for path in (("norm", "scale"), ("cls",), ("position",)):
        a, b = before, after
        for key in path:
            a, b = a[key], b[key]
        np.testing.assert_array_equal(np.asarray(a[...]), np.asarray(b[...]))


@pytest.mark.slow
def test_bfloat16_keeps_parameters_and_statistics_in_float32():
    losses = {}
    for dtype, trains in (("float32", "codebooks"), ("bfloat16", "all")):
        training = Training(steps=2, batch_size=8, shards=(2,), dtype=dtype, trains=trains)
        model = draw(ViT, CONFIG, VQConfig(groups=4, codewords=16), dtype=jnp.dtype(dtype))
        graphdef, frozen, state = start(model, training)
        batch = next(Batches(8))
        state, metrics = make_step(graphdef, training, 2)(state, frozen, batch)
        losses[dtype] = float(metrics["task"])
        assert {leaf.dtype.name for leaf in jax.tree.leaves((state.params, state.codecs))} == {"float32"}
    # bfloat16 has 8 bits of mantissa: the loss agrees to about 1 part in 100.
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=2e-2)


def test_a_loss_that_is_not_finite_is_found_before_it_is_saved(tmp_path):
    """Devices are some steps ahead of the log."""
    following, out = Batches.__next__, tmp_path / "run"

    class Broken(Batches):
        def __next__(self):
            batch = following(self)
            return batch | {"input": batch["input"] * (np.nan if self.position > 6 else 1)}

    training = Training(steps=12, batch_size=8, shards=(2,), trains="codebooks")
    with pytest.raises(AstraError, match="the loss is nan at step 7: try a lower --learning-rate"):
        train(make_model(), training, Broken(8), out, memory=ONE_DEVICE, source={}, save_every=9, label="test")
    assert [row["step"] for row in logged(out)] == [1, 2, 3, 4, 5, 6] and not list((out / "train").glob("[0-9]*"))


def test_a_trace_of_some_steps(tmp_path):
    training = Training(steps=8, batch_size=8, shards=(2,), trains="codebooks")
    options = dict(memory=ONE_DEVICE, source={}, save_every=9, label="test")
    train(make_model(), training, Batches(8), tmp_path / "run", **options, profile=tmp_path / "trace")
    assert [path.suffix for path in (tmp_path / "trace").rglob("*.pb")] == [".pb"]
    assert {row["tokens"] for row in logged(tmp_path / "run")} == {8 * 16}
    with pytest.raises(AstraError, match="--profile is of the third to the fifth step, and 0 are left"):
        train(make_model(), training, Batches(8), tmp_path / "run", **options, profile=tmp_path / "trace")


def test_shard_counts_are_drawn_by_step_and_seed():
    training = Training(shards=(2, 4, 8))
    drawn = [draw_shards(training, step) for step in range(60)]
    assert drawn == [draw_shards(training, step) for step in range(60)] and set(drawn) == {2, 4, 8}


def test_learning_rate_warms_up_and_falls_to_zero():
    rate = jax.jit(learning_rate(Training(steps=100, learning_rate=1.0, warmup=0.1)))
    assert float(rate(0)) < 0.2 and float(rate(10)) == pytest.approx(1.0) and float(rate(100)) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "--steps is 0; it must be at least 1"),
        ({"warmup": 1.5}, "--warmup is 1.5; it must be from 0 to 1"),
        ({"noise": -1.0}, "--noise is -1.0"),
        ({"weight_decay": -0.1}, "--weight-decay is -0.1; it must be at least 0"),
        ({"learning_rate": float("nan")}, "--learning-rate is nan; it must be at least 0"),
        ({"distillation": -1.0}, "--distillation is -1.0; it must be at least 0"),
        ({"packet_loss": 1.5}, "--packet-loss is 1.5; it must be from 0 to 1"),
        ({"hidden": 1.0, "trains": "codebooks"}, "--trains codebooks learns from no teacher"),
        ({"shards": ()}, "--shards"),
        ({"shards": (0,)}, "--shards"),
    ],
)
def test_settings_out_of_range(values, message):
    with pytest.raises(AstraError, match=message):
        Training(**values)


def test_batch_must_divide_over_the_devices(tmp_path):
    with pytest.raises(AstraError, match="multiple of the 4 devices"):
        fit(make_model(), Training(steps=1, batch_size=6, shards=(2,)), tmp_path, data_devices=4)


def test_a_model_without_codebooks_is_refused(tmp_path):
    with pytest.raises(AstraError, match="astra calibrate"):
        fit(make_model(codebooks=False), Training(steps=1, batch_size=8, shards=(2,)), tmp_path)


def test_a_full_disk_is_said_in_one_line(tmp_path, monkeypatch):
    def save(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", save)
    with pytest.raises(AstraError, match="disk is full"):
        fit(make_model(), CODEBOOKS, tmp_path, save_every=1)


PROGRAM = """
import sys, time
from pathlib import Path
sys.path[:0] = {path!r}
import test_loop
class Slow(test_loop.Batches):
    def __next__(self):
        time.sleep(0.05)
        return super().__next__()
test_loop.Batches = Slow
training = test_loop.Training(steps=40, batch_size=8, shards=(2,))
model, done = test_loop.fit(test_loop.make_model(), training, Path({out!r}), save_every=4)
print("done", done)
"""


def run_until(out: Path, steps: int, number: signal.Signals) -> str:
    """Runs forty slow steps in a process of its own and sends it a signal once it has logged `steps` of them."""
    program = PROGRAM.format(path=[str(Path(__file__).parent), *sys.path], out=str(out))
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    log = out / "train.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= steps):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    return process.communicate(timeout=120)[0]


@pytest.fixture(scope="module")
def forty_steps(tmp_path_factory):
    """What `PROGRAM` trains, in one go."""
    out = tmp_path_factory.mktemp("forty")
    training = Training(steps=40, batch_size=8, shards=(2,))
    return training, out, fit(make_model(), training, out, save_every=40)[0]


@pytest.mark.slow
@pytest.mark.parametrize("signals", [{6: signal.SIGKILL, 20: signal.SIGINT}, {20: signal.SIGTERM}], ids=str)
def test_kill_and_interrupt_then_resume(forty_steps, tmp_path, signals):
    training, out, whole = forty_steps
    for steps, number in signals.items():
        stopped = run_until(tmp_path / "run", steps, number)
    assert int(stopped.split("done")[1]) < 40  # it finished its step, saved, and said how far it came
    resumed, done = fit(make_model(), training, tmp_path / "run", save_every=4)
    assert done == 40 and same(resumed, whole)
    assert logged(tmp_path / "run") == logged(out)
