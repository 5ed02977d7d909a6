"""Workers that stay up on several hosts, which are processes of this machine, and those who ask them."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import checkpoints
from astra_jax.codecs.config import AstraConfig
from tests.multihost.test_hosts import ROOT, free_port

ASTRA = str(Path(sys.executable).parent / "astra")
HOSTS = 3


@pytest.fixture
def place(tiny_vit, tiny_llama, word_tokenizer, tmp_path, monkeypatch):
    """Checkpoints `vit` and `llama`, and two pictures: one larger than what the model reads, one smaller."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    astra = AstraConfig(groups=4, codewords=16)
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


@contextlib.contextmanager
def workers(checkpoint, *options, hosts=HOSTS, **environment):
    """Workers that are ready, and the address of their host 0."""
    coordinator = f"127.0.0.1:{free_port()}"
    command = [ASTRA, "worker", str(checkpoint), "--coordinator", coordinator, "--hosts", str(hosts), *options]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | environment)
    processes = [subprocess.Popen([*command, "--host", str(host)], **pipes) for host in range(hosts)]
    try:
        for host, process in enumerate(processes):
            said = process.stdout.readline()
            assert said == (
                f"host {host}: ready\n"
                if host
                else f"ready: astra run {checkpoint} --workers {coordinator} (on this host)\n"
            )
        yield coordinator, processes
    finally:
        for process in processes:
            process.kill()
            process.communicate(timeout=10)


def run(place, *argv, code=0):
    """What `astra run` says, as JSON, or its error."""
    out = place / "out.json"
    command = [ASTRA, "run", *map(str, argv), "--json", str(out)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=90)
    assert ended.returncode == code, ended.stderr
    return json.loads(out.read_text()) if code == 0 else ended.stderr.splitlines()[-1]


def same(found, expected):
    """The same classes of the same pictures, as likely."""
    assert [row["class"] for row in found["classes"]] == [row["class"] for row in expected["classes"]]
    likely = [[row["probability"] for row in rows["classes"]] for rows in (found, expected)]
    np.testing.assert_allclose(*likely, rtol=1e-5)


@pytest.mark.slow
def test_workers_answer_pictures_again_and_again_and_without_a_lost_host(place):
    vit, pictures = place / "vit", ["--image", place / "large.png", place / "small.png"]
    expected = run(place, vit, *pictures, "--devices", HOSTS)
    with workers(vit, "--on-failure", "shrink") as (coordinator, processes):
        first = run(place, vit, *pictures, "--workers", coordinator)
        assert first["first_seconds"] > 0
        again = run(place, vit, *pictures, "--workers", coordinator)
        assert again["first_seconds"] == 0, "nothing is compiled anew"
        for found in (first, again):
            same(found, expected)
            assert [row["host"] for row in found["hosts"]] == [0, 1, 2]
            assert all(row["compute ms"] > 0 and row["communication ms"] > 0 for row in found["hosts"])

        (place / "none.png").write_bytes(b"none")
        for argv, message in [
            ([vit, "--image", place / "none.png"], "not an image of a known format"),
            ([vit, "--prompt", "w1"], "takes pictures: give --image, not --prompt"),
            ([place / "llama", "--prompt", "w1"], f"the workers have loaded {vit.resolve()}: ask for it"),
            ([vit, *pictures, "--dtype", "bfloat16"], "was said to the workers: leave it out"),
        ]:
            assert message in run(place, *argv, "--workers", coordinator, code=2)

        processes[1].kill()
        found = run(place, vit, *pictures, "--workers", coordinator)
        same(found, run(place, vit, *pictures, "--devices", HOSTS - 1))
        assert found["began_anew"]["hosts"] == HOSTS - 1 and "host 1 is gone" in found["began_anew"]["why"]
        processes[0].kill()
        _, said = processes[2].communicate(timeout=20)
        assert said.splitlines()[-1] == "astra: error: host 0 is gone: its process ended or was killed"


@pytest.mark.slow
def test_workers_go_on_with_texts(place):
    llama, prompt = place / "llama", ["--prompt", "w1 w2 w3 w4 w5 w6 w7", "--max-new-tokens", "6"]
    expected = run(place, llama, *prompt, "--devices", HOSTS)
    with workers(llama) as (coordinator, processes):
        for _ in range(2):
            found = run(place, llama, *prompt, "--workers", coordinator)
            assert found["texts"] == expected["texts"] and len(found["hosts"]) == HOSTS
        message = run(place, llama, "--prompt", "w1", "--max-new-tokens", "999", "--workers", coordinator, code=2)
        assert "999 new tokens are more than the model takes" in message
        processes[2].kill()
        _, said = processes[0].communicate(timeout=20)
        assert said.splitlines()[-1] == "astra: error: host 2 is gone: its process ended or was killed"


def failing(place, lines):
    """A PYTHONPATH with which host 1 does this when it starts."""
    (place / "site").mkdir()
    lines = ["import sys", "if sys.orig_argv[-2:] == ['--host', '1']:", *(f"    {line}" for line in lines)]
    (place / "site" / "sitecustomize.py").write_text("\n".join(lines))
    return f"{place / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"


@pytest.mark.slow
def test_an_error_of_one_host_alone_is_the_answer_and_no_end(place):
    """Host 1 has no room for three prompts: host 0 must not go on to a collective that host 1 does not come to."""
    path = failing(
        place,
        [
            "from astra_jax.inputs import token_batches",
            "def pad(sequences, *rest, pad=token_batches.pad):",
            "    if len(sequences) == 3:",
            "        raise MemoryError('no room on this host')",
            "    return pad(sequences, *rest)",
            "token_batches.pad = pad",
        ],
    )
    few = ["--max-new-tokens", 2]
    with workers(place / "llama", hosts=2, PYTHONPATH=path) as (coordinator, processes):
        for _ in range(2):
            message = run(place, place / "llama", "--prompt", *"abc", *few, "--workers", coordinator, code=2)
            assert message == "astra: error: host 1: MemoryError: no room on this host"
            found = run(place, place / "llama", "--prompt", *"ab", *few, "--workers", coordinator)
            assert len(found["texts"]) == len(found["hosts"]) == 2
        assert [process.poll() for process in processes] == [None] * 2


@pytest.mark.slow
def test_a_host_that_leaves_others_in_a_collective_says_so(place):
    """Nothing reaches these there: all end, who asked is told why, and nobody waits without end."""
    path = failing(
        place,
        [
            "from astra_jax.serving.generate import Generator",
            "def tokens(*arguments):",
            "    raise RuntimeError('a bug')",
            "Generator.tokens = tokens",
        ],
    )
    with workers(place / "llama", hosts=2, PYTHONPATH=path) as (coordinator, processes):
        message = run(place, place / "llama", "--prompt", "w1", "--workers", coordinator, code=2)
        assert message == "astra: error: host 1 ended with an error: Torn: RuntimeError: a bug"
        assert [process.wait(20) for process in processes] == [2, 2]
