"""Every host keeps what it compiled, in a home of its own or in one that all share, and compiles nothing twice."""

import json
import os
import re

import numpy as np
import pytest
from PIL import Image

import checkpoints
from astra_jax.codecs.config import VQConfig
from tests.helpers import ASTRA
from tests.helpers.hosts import free_port, together

HOSTS = 3


@pytest.mark.slow
def test_the_second_start_of_hosts_compiles_nothing(tiny_vit, tmp_path, monkeypatch):
    for name in [name for name in os.environ if "CACHE" in name]:
        monkeypatch.delenv(name)
    for name in ("JAX_EXPLAIN_CACHE_MISSES", "JAX_LOG_COMPILES"):
        monkeypatch.setenv(name, "1")
    model = tiny_vit(VQConfig(groups=4, codewords=16), num_channels=3, num_labels=2)
    size = {"size": {"height": 20, "width": 20}}
    checkpoint = checkpoints.Checkpoint("vit", model.config, model.astra, ("a", "b"), size, {}, "float32", (), model)
    checkpoints.save(tmp_path / "vit", checkpoint)
    pixels = np.random.default_rng(0).integers(0, 255, (20, 20, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")

    def start() -> tuple[list[int], list[int], list[float]]:
        """Of every host, how many programs were compiled and found; the probabilities of all classes."""
        astra = [ASTRA, "run", str(tmp_path / "vit")]
        options = ["--image", str(tmp_path / "x.png"), "--json", str(tmp_path / "answer.json")]
        several = ["--coordinator", f"127.0.0.1:{free_port()}", "--hosts", str(HOSTS), "--host"]
        homes = [f"XDG_CACHE_HOME={tmp_path / f'home-{host}'}" for host in range(HOSTS)]
        ended = together([["env", home, *astra, *options, *several, str(host)] for host, home in enumerate(homes)])
        for host in ended:
            assert host.returncode == 0, host.stderr
        missed = [len(re.findall("PERSISTENT COMPILATION CACHE MISS", host.stderr)) for host in ended]
        found = [len(re.findall("Persistent compilation cache hit", host.stderr)) for host in ended]
        rows = json.loads((tmp_path / "answer.json").read_text())["classes"]
        return missed, found, [row["probability"] for row in rows]

    missed, found, before = start()
    assert min(missed) > 2 and found == [0] * HOSTS
    again, found, after = start()
    assert again == [0] * HOSTS and found == missed
    assert after == before
