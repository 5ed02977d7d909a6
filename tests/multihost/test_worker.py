"""Workers that stay up on several hosts, which are processes of this machine, and those who ask them."""

import json
import os
import subprocess

import numpy as np
import pytest

from tests.helpers import ASTRA, ROOT
from tests.helpers.hosts import workers

HOSTS = 3


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
            "from astra_jax.serving.batch import Batch",
            "def enter(*arguments):",
            "    raise RuntimeError('a bug')",
            "Batch.enter = enter",
        ],
    )
    with workers(place / "llama", hosts=2, PYTHONPATH=path) as (coordinator, processes):
        message = run(place, place / "llama", "--prompt", "w1", "--workers", coordinator, code=2)
        assert message == "astra: error: host 1 ended with an error: Torn: RuntimeError: a bug"
        assert [process.wait(20) for process in processes] == [2, 2]
