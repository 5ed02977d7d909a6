"""Several hosts, as processes that know each other by addresses of the loopback interface, compute what one does."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

import checkpoints
from astra_jax.codecs.config import VQConfig
from astra_jax.mesh.sharding import make_mesh
from tests.helpers import ASTRA
from tests.helpers.hosts import free_port, together
from tests.multihost.one_host import answer


@pytest.mark.slow
def test_hosts_compute_what_devices_of_one_process_do(saved, tmp_path):
    """Logits on every host; the tokens that a text goes on with, on host 0 alone."""
    path, coordinator, hosts = saved("llama", "kv"), f"127.0.0.1:{free_port()}", 3
    program = [sys.executable, "-m", "tests.multihost.one_host", coordinator, str(hosts)]
    commands = [[*program, str(host), str(path), str(tmp_path / f"{host}.npz")] for host in range(hosts)]
    for ended in together(commands):
        assert ended.returncode == 0, ended.stderr
    expected = answer(path, make_mesh(hosts))
    for host in range(hosts):
        found = np.load(tmp_path / f"{host}.npz")
        np.testing.assert_allclose(found["logits"], expected["logits"], rtol=1e-5, atol=1e-5)
        tokens = expected["tokens"] if host == 0 else expected["tokens"][:0].reshape(-1)
        np.testing.assert_array_equal(found["tokens"], tokens)


@pytest.mark.slow
def test_the_verb_prints_on_host_0_and_one_line_on_the_others(saved, tmp_path):
    path, coordinator = saved("vit", "hidden"), f"127.0.0.1:{free_port()}"
    options = (
        f"--strategies single,astra,sp --groups 4 --rates 100mbit --repeats 2 --coordinator {coordinator} --hosts 2"
    )
    commands = [
        [ASTRA, "bench", str(path), *options.split(), "--host", str(host), "--json", str(tmp_path / f"{host}.json")]
        for host in range(2)
    ]
    first, second = together(commands)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    found = json.loads((tmp_path / "0.json").read_text())
    single, *others = found["measured"]
    assert [row["strategy"] for row in found["measured"]] == ["single", "astra G=4", "sp"]
    assert single["predicted ms"] == pytest.approx(single["compute ms"]), "nothing is sent"
    for row, cell in zip(others, found["cells"][1:], strict=True):  # 3 exchanges, among two as much each as once
        link = 3 * found["exchange_ms"] + cell["kbit in total"] / 100
        assert row["predicted ms"] == pytest.approx(row["compute ms"] + link)
        assert 0 < row["least ms"] <= row["measured ms"] <= row["most ms"]
    assert "times faster" in first.stdout
    assert second.stdout == "host 1: done; the answer is on host 0\n"
    assert not (tmp_path / "1.json").exists()


@pytest.mark.slow
def test_eval_gives_what_one_process_gives(tiny_vit, tmp_path):
    """Of the original, which every host runs by itself, and of a checkpoint that they run together."""
    rng = np.random.default_rng(0)
    for label in "ab":
        folder = tmp_path / "data" / "test" / label
        folder.mkdir(parents=True)
        for number in range(3):
            Image.fromarray(rng.integers(0, 255, (20, 20, 3), np.uint8)).save(folder / f"{number}.png")
    size = {"height": 20, "width": 20}
    for name, astra in (("original", None), ("coded", VQConfig(groups=4, codewords=16))):
        model = tiny_vit(astra, num_channels=3, num_labels=2)
        meta = checkpoints.Checkpoint("vit", model.config, astra, ("a", "b"), {"size": size}, {}, "float32", (), model)
        checkpoints.save(tmp_path / name, meta)
    command = [ASTRA, "eval", str(tmp_path / "original"), str(tmp_path / "coded")]
    command += ["--data", str(tmp_path / "data"), "--batch-size", "4", "--rates", "10mbit"]
    hosts = ["--coordinator", f"127.0.0.1:{free_port()}", "--hosts", "2"]
    commands = [[*command, *hosts, "--host", str(host), "--json", str(tmp_path / "hosts.json")] for host in range(2)]
    for ended in together([*commands, [*command, "--devices", "2", "--json", str(tmp_path / "one.json")]]):
        assert ended.returncode == 0, ended.stderr
    several, one = (json.loads((tmp_path / name).read_text())["rows"] for name in ("hosts.json", "one.json"))
    for a, b in zip(several, one, strict=True):
        assert [a[key] for key in ("N", "accuracy %", "bytes")] == [b[key] for key in ("N", "accuracy %", "bytes")]
