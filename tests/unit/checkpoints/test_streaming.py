"""Weights go from one folder to another in parts, one of which is in memory at a time."""

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import checkpoints
from astra_jax.errors import AstraError
from astra_jax.models.llama import LlamaConfig
from checkpoints import configs, huggingface
from checkpoints.streaming import digest
from checkpoints.tensor_maps import FAMILIES, build, model_tensors
from tests.helpers import ROOT
from tests.helpers.folders import described, edit, write


def test_one_part_of_the_weights_is_there_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "hf", "gpt2, untied")
    folder = huggingface.open_folder(str(tmp_path / "hf"))
    checkpoints.save(tmp_path / "out", folder.checkpoint, folder.parts())
    names = sorted(part.name for part in (tmp_path / "out" / "weights-0001").iterdir())
    assert names == ["block-0000", "block-0001", "embed", "head", "norm", "position"]
    alive: list[weakref.ref] = []

    def watched(parts: Any) -> Any:
        for name, arrays in parts:
            assert not any(ref() is not None for ref in alive), name
            alive[:] = [weakref.ref(a) for a in arrays.values()]
            yield name, arrays
            del arrays

    checkpoints.save(tmp_path / "again", folder.checkpoint, watched(folder.parts()))
    assert len(alive) > 0


def test_not_a_number_is_found_while_converting_and_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path / "hf", "gpt2")
    names = ["transformer.h.1.attn.c_attn.bias", "transformer.wpe.weight"]
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    edit(tmp_path / "hf", **{name: np.full_like(tensors[name], np.nan) for name in names})
    folder = huggingface.open_folder(str(tmp_path / "hf"))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(AstraError, match="2 NaN or infinite: transformer.h.1.attn.c_attn.bias, transformer.wpe.weight"):
        checkpoints.save(tmp_path / "new" / "out", folder.checkpoint, folder.parts())
    assert sorted(tmp_path.iterdir()) == before


def test_a_part_is_known_by_its_names_shapes_and_kinds_of_numbers() -> None:
    a = np.arange(6, dtype=np.float32)
    others = [{"b": a}, {"a": a.reshape(2, 3)}, {"a": a.view(np.int32)}, {"a": a + 1}, {"a": a, "b": a}, {}]
    assert len({digest(one) for one in ({"a": a}, *others)}) == 7
    assert digest({"a": a.reshape(2, 3).T}) == digest({"a": np.ascontiguousarray(a.reshape(2, 3).T)})
    bfloat16 = np.asarray(jnp.arange(3, dtype=jnp.bfloat16))
    assert digest({"a": bfloat16, "b": np.float32(1)}) != digest({"a": bfloat16, "b": np.float32(2)})
    assert digest({"b": a, "a": bfloat16}) == digest({"a": jax.device_get(bfloat16), "b": a})


# Memory

MEASURE = """
import json, os, sys, threading, time
import jax
import orbax.checkpoint
from flax import nnx
import checkpoints
from checkpoints import huggingface

def anonymous():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))

def peak(work):
    # Sampled every millisecond: the kernel keeps no high-water mark of memory that is not file-backed.
    start, most, done = anonymous(), [0], threading.Event()
    def watch():
        while not done.wait(0.001):
            most[0] = max(most[0], anonymous())
    watcher = threading.Thread(target=watch)
    watcher.start()
    result = work()
    done.set()
    watcher.join()
    return most[0] - start, result

source, out = sys.argv[1:]
jax.devices()
def convert():
    folder = huggingface.open_folder(source)
    checkpoints.save(out, folder.checkpoint, folder.parts())
def load():
    return jax.block_until_ready(nnx.state(checkpoints.load(out).model))
converting, _ = peak(convert)
loading, state = peak(load)
print(json.dumps([converting, loading, sum(a.nbytes for a in jax.tree.leaves(state))]))
"""


@pytest.mark.slow
def test_converting_needs_memory_for_one_shard_file_and_loading_for_one_model(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=7,
        num_attention_heads=16,
        num_key_value_heads=8,
    )
    tensors, sizes = model_tensors("llama", build("llama", config)), FAMILIES["llama"].sizes(config)
    shards: list[dict[str, np.ndarray]] = [{}]
    rng = np.random.default_rng(0)
    for name, (key, _) in tensors.items():
        tensor = rng.standard_normal(key.shape(sizes), np.float32)
        if sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > 90e6:
            shards.append({})
        shards[-1][name] = tensor
    assert len(shards) >= 4
    source = tmp_path / "hf"
    source.mkdir()
    for number, shard in enumerate(shards):
        save_file(shard, source / f"{number}.safetensors")
    largest = max(file.stat().st_size for file in source.iterdir())
    index = {name: f"{number}.safetensors" for number, shard in enumerate(shards) for name in shard}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    content = configs.config_to_hf(described("llama", config), "float32")
    (source / "config.json").write_text(json.dumps(content))
    del shards
    # What is freed goes back at once, so that what is measured is what is held.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    converting, loading, model = json.loads(done.stdout.splitlines()[-1])
    assert 0 < converting < 1.3 * largest
    assert model < loading < 1.5 * model
