"""Hosts that mpirun, Slurm or Kubernetes started, of which no option says anything, as their variables say it."""

import json
import os
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import checkpoints
from astra_jax.codecs.config import VQConfig
from astra_jax.errors import AstraError
from astra_jax.hosts.options import Hosts, detect
from tests.helpers import ASTRA, ROOT
from tests.helpers.hosts import free_port

FIRST_PORT = 61440  # JAX adds the last 12 bits of a job's number


def mpirun(host: int, port: int) -> dict[str, str]:
    """What Open MPI 4 sets for one of two processes."""
    job = (port - FIRST_PORT) << 12
    return {"OMPI_MCA_orte_hnp_uri": f"{job}.0;tcp://127.0.0.1:51151;tcp6://[fd00::2]:47413"} | mpirun_5(host, port)


def mpirun_5(host: int, port: int) -> dict[str, str]:
    """What Open MPI 5 sets: nothing tells where it was started."""
    return {
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(host),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(host),
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    }


def srun(host: int, port: int) -> dict[str, str]:
    """What Slurm sets for one of two tasks."""
    return {
        "SLURM_JOB_ID": str(port - FIRST_PORT),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(host),
        "SLURM_LOCALID": str(host),
    }


@pytest.fixture
def detected(monkeypatch):
    """What is detected with these variables, and which accelerator is picked."""

    def find(variables: dict[str, str], *given) -> tuple[Hosts, str | None]:
        monkeypatch.setattr(os, "environ", dict(variables))
        return detect(Hosts(*given)), os.environ.get("JAX_LOCAL_DEVICE_IDS")

    return find


def test_variables_say_which_host_this_is(detected):
    assert detected(mpirun(1, 61440)) == (Hosts("127.0.0.1:61440", 2, 1), "1")
    assert detected(srun(1, 61442)) == (Hosts("localhost:61442", 2, 1), "1")
    assert detected(srun(0, 61442) | {"SLURM_STEP_NODELIST": "gpu[07-12],x"})[0] == Hosts("gpu07:61442", 2, 0)
    assert detected(mpirun(0, 61440) | srun(1, 61442)) == (Hosts("127.0.0.1:61440", 2, 0), "0")  # mpirun within Slurm
    assert detected({}) == (Hosts(), None)


def test_two_ports_are_there_for_every_job(detected):
    """Also for the last one, which gets those of the one before."""
    assert detected(srun(0, 65535))[0].coordinator == "localhost:65534"


def test_what_is_given_counts(detected):
    for given in (("10.0.0.1:7777", 3, 2), ("10.0.0.1:7777", 3)):
        assert detected(mpirun(1, 61440), *given) == (Hosts(*given), None)
    assert detected(mpirun_5(1, 61440), "10.0.0.1:7777") == (Hosts("10.0.0.1:7777", 2, 1), "1")


def test_one_process_is_one_host(detected):
    alone = {"OMPI_COMM_WORLD_SIZE": "1"}, {"SLURM_NTASKS": "1"}
    assert detected(mpirun(0, 61440) | alone[0]) == detected(mpirun_5(0, 61440) | alone[0]) == (Hosts(), None)
    assert detected(srun(0, 61440) | alone[1]) == (Hosts(), None)


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        (mpirun_5(0, 61440), "OMPI_COMM_WORLD_SIZE is set, .*'OMPI_MCA_orte_hnp_uri'.* add --coordinator"),
        (srun(0, 61440) | {"SLURM_STEP_NUM_NODES": "2"}, "localhost is 127.0.0.1 to itself, .* add --coordinator"),
        ({"JOB_COMPLETION_INDEX": "0"}, "JOB_COMPLETION_INDEX is set, .* add --coordinator .* --hosts and --host"),
    ],
    ids=["Open MPI 5", "loopback", "Kubernetes"],
)
def test_what_variables_do_not_say_is_asked_for(detected, variables, why):
    with pytest.raises(AstraError, match=why):
        detected(variables)


def free_job_port() -> int:
    """One of a job's ports that is free, as is the next."""
    for port in range(65534, FIRST_PORT, -2):
        try:
            for one in (port, port + 1):
                socket.create_server(("127.0.0.1", one)).close()
            return port
        except OSError:
            continue
    raise AssertionError("all ports are in use")


def run(command: list[str], path: Path, variables: dict[str, str] | None = None) -> subprocess.Popen:
    """Starts `astra run`, which writes its answer to a file."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    return subprocess.Popen([*command, "--json", str(path)], env=os.environ | (variables or {}), **pipes)


@pytest.mark.slow
@pytest.mark.parametrize("start", [mpirun, mpirun_5, srun])
def test_hosts_that_are_detected_answer_as_one_process_does(tiny_vit, tmp_path, start):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (20, 20, 3), np.uint8)).save(tmp_path / "cat.png")
    model = tiny_vit(astra := VQConfig(groups=4, codewords=16), num_channels=3)
    size = {"size": {"height": 20, "width": 20}}
    meta = checkpoints.Checkpoint("vit", model.config, astra, tuple("abcde"), size, {}, "float32", (), model)
    checkpoints.save(tmp_path / "vit", meta)
    command = [ASTRA, "run", str(tmp_path / "vit")]
    command += ["--image", str(tmp_path / "cat.png")]
    port = free_job_port()
    if start is mpirun_5:
        command += ["--coordinator", f"127.0.0.1:{free_port()}"]
    processes = [run(command, tmp_path / f"{host}.json", start(host, port)) for host in range(2)]
    processes.append(run([*command[:5], "--devices", "2"], tmp_path / "one.json"))
    try:
        outputs = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert outputs[1][0] == "host 1: done; the answer is on host 0\n"
    assert not (tmp_path / "1.json").exists()
    several, one = (json.loads((tmp_path / name).read_text()) for name in ("0.json", "one.json"))
    assert several["code_bytes_per_input"] == one["code_bytes_per_input"] > 0
    assert len(several["classes"]) == len(one["classes"]) == 5
    for a, b in zip(several["classes"], one["classes"], strict=True):
        assert a["class"] == b["class"] and abs(a["probability"] - b["probability"]) < 1e-5
