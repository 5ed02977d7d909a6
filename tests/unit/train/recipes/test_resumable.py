"""A checkpoint is known by its bytes, not by its path: where training goes on, where recipes keep results, by workers;
and two trainings into one folder."""

import dataclasses
import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import checkpoints
from astra_jax.codecs.config import VQConfig
from astra_jax.errors import AstraError
from checkpoints import lock
from eval.datasets.sources import reading
from eval.service.requests import Request
from eval.service.service import Service
from eval.verbs import evaluate
from tests.helpers.training import Batches, leaves, make_model
from train import calibrate, finetune, loop, state
from train.loop import Training
from train.memory import ONE_DEVICE
from train.recipes import resumable


def fit(out: Path, **source):
    training = Training(steps=4, batch_size=8, shards=(2,), trains="codebooks")
    batches = Batches(8)
    return loop.train(
        make_model(), training, batches, out, memory=ONE_DEVICE, source=source, save_every=2, label="test"
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    fit(out, checkpoint="here", checkpoint_sha256="a1")
    return out


def test_training_goes_on_from_the_same_bytes_wherever_they_are(trained):
    assert fit(trained, checkpoint="moved/there", checkpoint_sha256="a1")[1] == 4
    with pytest.raises(AstraError, match=r"other settings \(checkpoint_sha256 was a1, now b2\)"):
        fit(trained, checkpoint="here", checkpoint_sha256="b2")


def test_a_damaged_state_is_named_and_the_one_before_is_as_good(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    expected, _ = fit(tmp_path / "run", checkpoint="here", checkpoint_sha256="a1")
    restored = state._digest
    with pytest.MonkeyPatch.context() as patch:
        flipped = lambda state: restored({k: np.asarray(v).copy() * 2 for k, v in state.items()})  # noqa: E731
        patch.setattr(state, "_digest", flipped)
        with pytest.raises(AstraError, match=r"train/4: is not as it was written .*: remove that folder to go on"):
            fit(tmp_path / "run", checkpoint="here", checkpoint_sha256="a1")
    shutil.rmtree(tmp_path / "run" / "train" / "4")
    again, _ = fit(tmp_path / "run", checkpoint="here", checkpoint_sha256="a1")
    assert all(np.array_equal(a, b) for a, b in zip(leaves(expected), leaves(again), strict=True))


def test_two_trainings_into_one_folder(trained):
    with (
        lock.alone(trained / state.LOCK, pytest.fail),
        pytest.raises(AstraError, match=rf"{trained}: process \d+ on host .* is training into it: wait for it, or"),
    ):
        fit(trained, checkpoint="here", checkpoint_sha256="a1")
    (trained / state.LOCK).write_text("process 1 on host gone")  # as a killed process leaves it
    fit(trained, checkpoint="here", checkpoint_sha256="a1")
    assert not (trained / state.LOCK).exists()


def test_finetuning_into_the_checkpoint_itself_is_refused(tmp_path):
    with pytest.raises(AstraError, match="is the checkpoint that training starts from: choose another"):
        finetune.main(finetune.Args(checkpoint=tmp_path / "one", out=tmp_path / "." / "one", data="none"))


@pytest.fixture
def place(gpt2s):
    """A checkpoint, and one that was calibrated from it."""
    place = gpt2s(original=None, other=VQConfig(groups=2, codewords=8))
    original = checkpoints.load(place / "original")
    made = {"verb": "calibrate", "checkpoint_sha256": original.digest}
    checkpoints.save(place / "calibrated", dataclasses.replace(original, history=(made,)))
    return place


def change(path: Path) -> None:
    """Puts another checkpoint there."""
    checkpoints.save(path, dataclasses.replace(checkpoints.load(path), history=({"verb": "changed"},)))


def test_recipes_keep_what_was_made_of_the_same_checkpoint(place, monkeypatch):
    monkeypatch.setattr(calibrate, "main", pytest.fail)
    options = calibrate.Args(checkpoint=place / "original", out=place / "calibrated", data="none")
    assert resumable.calibrated(options) == options.out
    change(place / "original")
    with pytest.raises(AstraError, match="calibrated: was made of another checkpoint than .*original is now"):
        resumable.calibrated(options)


def test_finetuned_checkpoints_are_known_by_what_they_were_made_of(place, monkeypatch):
    options = finetune.Args(checkpoint=place / "original", out=place / "calibrated", data="none")
    made = {name: getattr(options, name) for name in ("augment", "flip", "length")}
    made |= {**options.source(), **dataclasses.asdict(options.training)}
    now = checkpoints.read_meta(place / "original").digest
    step = {**made, "checkpoint": "elsewhere", "checkpoint_sha256": now}
    checkpoints.save(options.out, dataclasses.replace(checkpoints.load(options.out), history=(step,)))
    assert resumable._is_trained(options)
    change(place / "original")
    assert not resumable._is_trained(options)


def test_results_are_kept_for_the_same_bytes_and_options(place, monkeypatch):
    runs = []

    def main(options):
        runs.append(options)
        options.json.write_text(json.dumps({"rows": [{"perplexity": len(runs)}]}))

    monkeypatch.setattr(evaluate, "main", main)
    options = evaluate.Args(checkpoints=(place / "original",), data="text.txt", rates=())
    result = place / "result.json"
    assert [resumable.evaluated(result, options)[0]["perplexity"] for _ in range(2)] == [1, 1]
    shutil.copytree(place / "original", place / "copy")
    moved = dataclasses.replace(options, checkpoints=(place / "copy",))
    assert resumable.evaluated(result, moved) == [{"perplexity": 1}]
    assert resumable.evaluated(result, dataclasses.replace(options, data="other.txt")) == [{"perplexity": 2}]
    assert resumable.evaluated(result, options) == [{"perplexity": 3}]
    change(place / "original")
    assert resumable.evaluated(result, options) == [{"perplexity": 4}]
    result.write_text('{"rows": [{"perplexity": 0}]}')  # of an earlier version
    assert resumable.evaluated(result, options) == [{"perplexity": 5}]


def test_workers_say_that_the_checkpoint_is_another_one_now(place):
    path = place / "original"
    engine = SimpleNamespace(name=str(path), checkpoint=checkpoints.load(path))
    assert Service.smaller(engine, Request(prompts=("w1",))) == Request(prompts=("w1",))
    change(path)
    with pytest.raises(AstraError, match="original is another checkpoint now than was loaded: start the workers again"):
        Service.smaller(engine, Request(prompts=("w1",)))
    shutil.rmtree(path)
    with pytest.raises(AstraError, match="there is no such checkpoint"):
        Service.smaller(engine, Request(prompts=("w1",)))


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), OSError("Not enough disk space. Needed: 9 GB")]
)
def test_a_full_disk_is_no_fault_of_the_data(error):
    expected = "cannot be read .*: free some space in .*, where data are unpacked$"
    with pytest.raises(AstraError, match=expected), reading("text.csv, split test", "check the files and --split"):
        raise error
