"""One small checkpoint, its Hugging Face folder, and the same with codebooks."""

import shutil
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import checkpoints
from checkpoints import huggingface
from checkpoints.tensor_maps import build, flat_state, with_state
from tests.helpers.folders import ASTRA, NUMBERED, VIT, described, drawn


@pytest.fixture
def checkpoint() -> checkpoints.Checkpoint:
    return described(
        "vit",
        VIT,
        labels=("cat", "dog", "emu"),
        preprocessing={"size": {"height": 8, "width": 8}},
        history=({"verb": "convert", "source": "somewhere"},),
        model=drawn("vit", VIT),
    )


@pytest.fixture
def folder(checkpoint: checkpoints.Checkpoint, tmp_path: Path) -> Path:
    """A Hugging Face folder that can be read."""
    huggingface.write_folder(checkpoint, tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def calibrated(checkpoint: checkpoints.Checkpoint) -> checkpoints.Checkpoint:
    """With codebooks that are not zero."""
    with_codebooks = checkpoints.with_codebooks(checkpoint, ASTRA)
    codec, rng = with_codebooks.model.codec, np.random.default_rng(1)
    codec.codebook[...] = jnp.asarray(rng.normal(size=codec.codebook[...].shape), jnp.float32)
    codec.count[...] = jnp.asarray(rng.uniform(size=codec.count[...].shape), jnp.float32)
    return with_codebooks


@pytest.fixture
def saved(calibrated: checkpoints.Checkpoint, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the calibrated checkpoint, which is written once and copied for every test."""
    once = tmp_path_factory.getbasetemp() / "calibrated"
    if not once.exists():
        checkpoints.save(once, calibrated)
    shutil.copytree(once, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def make(word_tokenizer: Callable[..., Path]) -> Callable[[int], checkpoints.Checkpoint]:
    """Makes different models with different tokenizers."""

    def one(number: int) -> checkpoints.Checkpoint:
        model, rng = build("gpt2", NUMBERED), np.random.default_rng(number)
        flat = {p: jnp.asarray(rng.normal(size=a.shape).astype(np.float32)) for p, a in flat_state(model).items()}
        return described(
            "gpt2",
            NUMBERED,
            history=({"verb": "make", "number": number},),
            model=with_state(model, flat),
            tokenizer_files=word_tokenizer(number),
        )

    return one
