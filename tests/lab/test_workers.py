"""Workers on hosts of the lab: on links that lose packets the answer is the same, and nothing on them can be read."""

import json
import subprocess
import sys

import pytest

import checkpoints
from astra_jax.codecs.config import VQConfig
from eval.network.lab import Lab
from tests.helpers import ASTRA

pytestmark = pytest.mark.slow

PROMPT = "w11 w12 w13 w14 w15 w16 w17 w18 w19 w20 w21 w22"
SNIFF = """
import socket, sys
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as wire, open(sys.argv[1], "wb") as file:
    print("ready", flush=True)
    while True:
        file.write(wire.recv(1 << 16))
        file.flush()
"""


@pytest.fixture
def llama(tiny_llama, word_tokenizer, tmp_path):
    """A checkpoint of a language model."""
    model = tiny_llama(VQConfig(groups=4, codewords=16))
    files = word_tokenizer(model.config.vocab_size - 4)
    meta = checkpoints.Checkpoint(
        "llama", model.config, model.astra, None, None, {}, "float32", (), model, tokenizer_files=files
    )
    checkpoints.save(tmp_path / "llama", meta)
    return str(tmp_path / "llama")


def lines(process):
    return iter(process.stdout.readline, "")


def test_workers_answer_over_links_that_lose_packets(llama, tmp_path):
    seen = tmp_path / "seen"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    asked = ["--prompt", PROMPT, "--max-new-tokens", "6", "--json"]
    with Lab(3, 10e6, packet_loss=0.2) as lab:
        wire = lab.start(1, [sys.executable, "-c", SNIFF, str(seen)], **pipes)
        assert wire.stdout.readline() == "ready\n"
        first = lab.start(0, [ASTRA, "worker", llama, "--listen", lab.address(0)], **pipes)
        invitation = next(line.split()[-1] for line in lines(first) if line.startswith("ready: "))
        for host in (1, 2):
            worker = lab.start(host, [ASTRA, "worker", llama, "--join", invitation], **pipes)
            assert "ready; UDP port" in next(lines(worker))
        answers = []
        for number in range(2):
            out = tmp_path / f"{number}.json"
            user = lab.start(0, [ASTRA, "run", llama, *asked, str(out), "--join", invitation], **pipes)
            assert user.wait(120) == 0
            answers.append(json.loads(out.read_text()))
        links = tmp_path / "links.json"
        check = lab.start(0, [ASTRA, "net", "check", "--join", invitation, "--json", str(links)], **pipes)
        assert check.wait(60) == 0
    measured = json.loads(links.read_text())
    assert 2 < measured["slowest_mbps"] < 11 and 0 < measured["round_trip_ms"] < 200
    assert len(measured["ways"]) == 3 and all(5 < row["lost %"] < 60 for row in measured["ways"])
    alone = tmp_path / "alone.json"
    subprocess.run([ASTRA, "run", llama, *asked, str(alone), "--devices", "3"], check=True, capture_output=True)
    for found in answers:
        assert found["texts"] == json.loads(alone.read_text())["texts"]
        assert [row["host"] for row in found["hosts"]] == [0, 1, 2] and "without" not in found
    packets = seen.read_bytes()
    assert len(packets) > 10_000
    secret = invitation.rpartition("/")[2]
    for readable in (PROMPT[:12], "w11", "prompts", "llama", "read", "order", secret, secret[:8]):
        assert readable.encode() not in packets
