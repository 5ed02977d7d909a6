"""A tiny model, endless batches for it, and what training made of it."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import checkpoints
from astra_jax.cli.main import main
from astra_jax.codecs.config import VQConfig
from astra_jax.models.vit import ViT, ViTConfig
from tests.helpers.models import draw

CONFIG = ViTConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    image_size=16,
    patch_size=4,
    num_labels=4,
)


class Batches:
    """Endless batches of noisy constant pictures: the class is the brightness."""

    def __init__(self, batch_size: int):
        self.position, self.batch_size = 0, batch_size

    def __next__(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(self.position)
        self.position += 1
        label = rng.integers(0, 4, self.batch_size).astype(np.int32)
        image = label[:, None, None, None] / 2 + 0.1 * rng.normal(size=(self.batch_size, 16, 16, 3))
        return {"input": image.astype(np.float32), "label": label}

    def get_state(self) -> dict[str, int]:
        return {"position": self.position}

    def set_state(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def make_model(codebooks: bool = True) -> ViT:
    """A model of its own for every caller."""
    return nnx.clone(_drawn(codebooks))


@functools.cache
def _drawn(codebooks: bool) -> ViT:
    return draw(ViT, CONFIG, VQConfig(groups=4, codewords=16) if codebooks else None)


def leaves(model: ViT) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]


def logged(out: Path) -> list[dict]:
    """The rows of a run's log, without what a clock said."""
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert all(row.pop("seconds") > 0 for row in rows)
    return rows


def finetune(folder: Path, model: Any, tokenizer_files: Path, options: str) -> Any:
    """What the verb makes of a GPT-2 with codebooks, as it is stored, in two steps on eight texts each."""
    made = checkpoints.Checkpoint(
        *("gpt2", model.config, model.astra, None, None, {}, "float32", (), model), tokenizer_files=tokenizer_files
    )
    checkpoints.save(folder / "codes", made)
    words = np.random.default_rng(0).integers(0, 40, 600)
    (folder / "text.txt").write_text(" ".join(f"w{n}" for n in words))
    given = ["finetune", folder / "codes", folder / "tuned", "--data", folder / "text.txt", "--length", 32]
    assert main([*map(str, given), "--steps", "2", "--batch-size", "8", *options.split()]) == 0
    return checkpoints.load(folder / "tuned", param_dtype=None)
