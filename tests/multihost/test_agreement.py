"""Hosts whose inputs or options differ end with one line, those behind a proxy meet, and rows of a mesh are counted."""

import json
import shutil
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import checkpoints
from astra_jax.codecs.config import VQConfig
from tests.helpers import ASTRA
from tests.helpers.hosts import free_port, together


@pytest.fixture
def place(tiny_vit, tiny_llama, word_tokenizer, tmp_path):
    """Checkpoints `coded`, `plain` and `llama`, and the same pictures in `data-0` and `data-1`."""
    rng = np.random.default_rng(0)
    for label in "ab":
        folder = tmp_path / "data-0" / "test" / label
        folder.mkdir(parents=True)
        for number in range(3):
            Image.fromarray(rng.integers(0, 255, (20, 20, 3), np.uint8)).save(folder / f"{number}.png")
    shutil.copytree(tmp_path / "data-0", tmp_path / "data-1")
    size, astra = {"size": {"height": 20, "width": 20}}, VQConfig(groups=4, codewords=16)
    for name, codes in (("coded", astra), ("plain", None)):
        model = tiny_vit(codes, num_channels=3, num_labels=2)
        meta = checkpoints.Checkpoint("vit", model.config, codes, ("a", "b"), size, {}, "float32", (), model)
        checkpoints.save(tmp_path / name, meta)
    llama = tiny_llama(astra)
    files = word_tokenizer(llama.config.vocab_size - 4)
    meta = checkpoints.Checkpoint(
        "llama", llama.config, astra, None, None, {}, "float32", (), llama, tokenizer_files=files
    )
    checkpoints.save(tmp_path / "llama", meta)
    return tmp_path


def on_two_hosts(*commands: list[str], place: Path | None = None, variables: tuple[str, ...] = ()):
    """How the same command, or one for each, ended on two hosts; with a place, what host 0 wrote."""
    coordinator = f"127.0.0.1:{free_port()}"
    both = commands if len(commands) == 2 else commands * 2
    written = ["--json", str(place / "found.json")] if place else []
    options = ["--coordinator", coordinator, "--hosts", "2", *written, "--host"]
    ended = together([["env", *variables, ASTRA, *map(str, both[host]), *options, str(host)] for host in range(2)])
    if place is None:
        return ended
    assert [host.returncode for host in ended] == [0, 0], ended
    return json.loads((place / "found.json").read_text())


def pictures(place: Path, count: int) -> list[str]:
    """So many pictures as options."""
    return ["--image", *(str(path) for path in sorted((place / "data-0").rglob("*.png"))[:count])]


@pytest.mark.slow
def test_prompts_of_other_lengths_and_another_type_end_both(place):
    run = ["run", str(place / "llama"), "--prompt"]
    for ended in on_two_hosts([*run, "w1"], [*run, "w1 w2", "--dtype", "bfloat16"]):
        assert ended.returncode == 2 and ended.stdout == ""
        assert ended.stderr == (
            "astra: error: --dtype is float32 on host 0 and bfloat16 on host 1: give the same on every host; "
            "prompt 1 is 'w1' on host 0 and 'w1 w2' on host 1: give the same on every host\n"
        )


@pytest.mark.slow
def test_other_bytes_under_one_name_end_an_evaluation(place):
    """Of the last picture alone, so that a batch that is the same comes first."""
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(place / "data-1" / "test" / "b" / "2.png")
    evaluate = ["eval", place / "coded", "--batch-size", "4", "--data"]
    for ended in on_two_hosts(*([*evaluate, place / f"data-{host}"] for host in range(2))):
        assert ended.returncode == 2
        said = ended.stderr.splitlines()[-1]
        assert said.startswith("astra: error: host 0 has read batch 2 of the data (hash ")
        assert "and host 1 batch 2 of the data (hash " in said and said.endswith(": give the same on every host")


@pytest.mark.slow
def test_more_pictures_on_one_host_end_an_evaluation(place):
    for number in range(2):
        shutil.copy(place / "data-1" / "test" / "b" / "2.png", place / "data-1" / "test" / "b" / f"{3 + number}.png")
    evaluate = ["eval", place / "coded", "--batch-size", "6", "--data"]
    for ended in on_two_hosts(*([*evaluate, place / f"data-{host}"] for host in range(2))):
        assert ended.returncode == 2
        said = ended.stderr.splitlines()[-1]
        assert "host 0 has read all data" in said and "host 1 batch 2 of the data" in said


@pytest.mark.slow
def test_proxies_are_no_way_between_hosts(place):
    """One that answers nothing; preflight passes it by, and so does JAX."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        proxy = f"http://127.0.0.1:{silent.getsockname()[1]}"
        variables = [f"{name}={proxy}" for name in ("http_proxy", "https_proxy", "grpc_proxy")]
        start = time.monotonic()
        command = ["run", place / "coded", *pictures(place, 1)]
        first, second = on_two_hosts(command, variables=(*variables, "no_proxy=example.org"))
        assert time.monotonic() - start < 120
    assert first.returncode == second.returncode == 0
    assert "proxy" not in first.stderr + second.stderr


@pytest.mark.slow
def test_a_batch_for_every_host_without_codes(place):
    """--devices 2x1: nothing is exchanged; and one host alone would take twice as long as host 0, for two pictures."""
    run = ["run", place / "plain", *pictures(place, 2)]
    found = on_two_hosts([*run, "--devices", "2x1"], place=place)
    assert [row["predicted"] for row in found["hosts"]] == [0, 0]
    assert found["single_ms"] == pytest.approx(2 * found["hosts"][0]["compute ms"])


@pytest.mark.slow
def test_bytes_of_a_mesh_with_rows_are_those_of_its_rows(place):
    """Two devices of each host send what one does for a row of the batch. Nothing of gloo's is on stdout."""
    run = ["run", place / "coded", "--image"]
    files = pictures(place, 3)[1:]
    one = on_two_hosts([*run, files[0]], place=place)
    rows = on_two_hosts([*run, *files, "--devices", "2x2"], place=place)  # of three pictures, filled up to four
    assert [row["predicted"] for row in rows["hosts"]] == [4 * row["predicted"] for row in one["hosts"]]
    assert all(row["compute ms"] > 0 for row in rows["hosts"])
    likely = [[row["probability"] for row in found["classes"][:2]] for found in (rows, one)]
    assert likely[0] == pytest.approx(likely[1], abs=1e-5)
