"""Checkpoints that several hosts read."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import checkpoints
from astra_jax.codecs.config import VQConfig


@pytest.fixture
def saved(request, tmp_path):
    """Saves a tiny model with codebooks; returns the folder."""

    def save(family: str, site: str) -> Path:
        astra = VQConfig(groups=4, codewords=16, site=site)
        model = request.getfixturevalue(f"tiny_{family}")(astra)
        meta = checkpoints.Checkpoint(family, model.config, astra, None, None, {}, "float32", (), model)
        checkpoints.save(tmp_path / family, meta)
        return tmp_path / family

    return save


@pytest.fixture
def place(tiny_vit, tiny_llama, word_tokenizer, tmp_path, monkeypatch):
    """Checkpoints `vit` and `llama`, and two pictures: one larger than what the model reads, one smaller."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    astra = VQConfig(groups=4, codewords=16)
    vit = tiny_vit(astra, num_channels=3, num_labels=2)
    size = {"height": 20, "width": 20}
    meta = checkpoints.Checkpoint("vit", vit.config, astra, ("a", "b"), {"size": size}, {}, "float32", (), vit)
    checkpoints.save(tmp_path / "vit", meta)
    llama = tiny_llama(astra)
    files = word_tokenizer(llama.config.vocab_size - 4)
    meta = checkpoints.Checkpoint(
        "llama", llama.config, astra, None, None, {}, "float32", (), llama, tokenizer_files=files
    )
    checkpoints.save(tmp_path / "llama", meta)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (60, 50, 3), np.uint8)).save(tmp_path / "large.png")
    Image.fromarray(rng.integers(0, 255, (6, 5), np.uint8)).save(tmp_path / "small.png")
    return tmp_path
