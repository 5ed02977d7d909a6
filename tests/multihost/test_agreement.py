"""Hosts of one mesh whose inputs or options differ end with one line; those of a cluster are found."""

import json
import shutil
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
        assert ended.stderr.splitlines()[-1] == (
            "astra: error: on host 1, --dtype is bfloat16 there and float32 here; prompt 1 is 'w1 w2' there and 'w1' "
            "here: the hosts need the same"
        )


@pytest.mark.slow
def test_other_bytes_under_one_name_end_an_evaluation(place):
    """Of the last picture alone, so that a batch that is the same comes first."""
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(place / "data-1" / "test" / "b" / "2.png")
    evaluate = ["eval", place / "coded", "--batch-size", "4", "--data"]
    for ended in on_two_hosts(*([*evaluate, place / f"data-{host}"] for host in range(2))):
        assert ended.returncode == 2
        said = ended.stderr.splitlines()[-1]
        assert said.startswith("astra: error: on host 1, data is batch 2 of the data (hash ")
        assert "there and batch 2 of the data (hash " in said and said.endswith(" here: the hosts need the same")


@pytest.mark.slow
def test_more_pictures_on_one_host_end_an_evaluation(place):
    for number in range(2):
        shutil.copy(place / "data-1" / "test" / "b" / "2.png", place / "data-1" / "test" / "b" / f"{3 + number}.png")
    evaluate = ["eval", place / "coded", "--batch-size", "6", "--data"]
    for ended in on_two_hosts(*([*evaluate, place / f"data-{host}"] for host in range(2))):
        assert ended.returncode == 2
        said = ended.stderr.splitlines()[-1]
        assert "data is batch 2 of the data" in said and "there and all data (hash " in said


@pytest.mark.slow
def test_a_host_that_cannot_read_its_inputs_is_named_on_all(place):
    run = ["run", place / "coded", "--image"]
    (picture,) = pictures(place, 1)[1:]
    for ended in on_two_hosts([*run, picture], [*run, "missing.png"]):
        assert ended.returncode == 2
        assert ended.stderr.splitlines()[-1].startswith("astra: error: host 1: missing.png: cannot be read")


@pytest.mark.slow
def test_rows_of_a_mesh_answer_as_one_row_does(place):
    """Nothing of gloo's is on stdout."""
    run = ["run", place / "coded", "--image"]
    files = pictures(place, 3)[1:]
    one = on_two_hosts([*run, files[0]], place=place)
    rows = on_two_hosts([*run, *files, "--devices", "2x2"], place=place)  # of three pictures, filled up to four
    likely = [[row["probability"] for row in found["classes"][:2]] for found in (rows, one)]
    assert likely[0] == pytest.approx(likely[1], abs=1e-5)


@pytest.mark.slow
def test_what_a_cluster_says_is_found_out(place):
    """As under mpirun, whose variables JAX reads."""
    job = (free_port() - 61440) % 4096 << 12
    variables = {"OMPI_MCA_orte_hnp_uri": f"{job}.0;tcp://127.0.0.1:51151", "OMPI_COMM_WORLD_SIZE": "2"}
    command = [ASTRA, "run", str(place / "coded"), *pictures(place, 1), "--coordinator", "auto"]
    of_host = lambda host: {"OMPI_COMM_WORLD_RANK": host, "OMPI_COMM_WORLD_LOCAL_RANK": host}  # noqa: E731
    commands = [
        ["env", *(f"{name}={value}" for name, value in (variables | of_host(host)).items()), *command] for host in "01"
    ]
    first, second = together(commands)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "on 2 device(s)" in first.stdout and second.stdout == "host 1: done; the answer is on host 0\n"
