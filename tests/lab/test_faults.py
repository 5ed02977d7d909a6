"""Hosts that die, differ, or are cut off: whoever is left ends with one line that says so, or answers all the same."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import checkpoints
from astra_jax.cli import main
from astra_jax.config import AstraConfig
from astra_jax.meeting import versions
from eval.lab import Lab

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
HOSTS = 3
KILLED = "is gone: its process ended or was killed"
NEW_TOKENS = 3000
PROMPT = " ".join(f"w{i}" for i in range(1, 10))
FEW, MANY = 2, 100  # pictures: with these many a pass takes 2 s at 1 Mbps, where layers are exchanged as they are


@pytest.fixture(scope="module")
def place(tiny_vit, tiny_gpt2, word_tokenizer, tmp_path_factory):
    """Checkpoints `vit` and `gpt2`, and a picture."""
    place = tmp_path_factory.mktemp("faults")
    astra = AstraConfig(groups=4, codewords=16)
    vit = tiny_vit(astra, num_channels=3)
    size = {"height": 20, "width": 20}
    meta = checkpoints.Checkpoint("vit", vit.config, astra, tuple("abcde"), {"size": size}, {}, "float32", (), vit)
    checkpoints.save(place / "vit", meta)
    gpt2 = tiny_gpt2(astra, n_positions=NEW_TOKENS + 9)
    files = word_tokenizer(gpt2.config.vocab_size - 4)
    meta = checkpoints.Checkpoint(
        "gpt2", gpt2.config, astra, None, None, {}, "float32", (), gpt2, tokenizer_files=files
    )
    checkpoints.save(place / "gpt2", meta)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20, 3), np.uint8)).save(place / "cat.png")
    return place


@pytest.fixture(scope="module")
def request_for(place):
    """Arguments of `astra run` for a kind of request: pictures, or a text to go on with."""

    def argv(what):
        if what == "text":
            return [place / "gpt2", "--prompt", PROMPT, "--max-new-tokens", NEW_TOKENS]
        return [place / "vit", "--image", *[place / "cat.png"] * what, "--top", 1, "--strategy", "sp"]

    return lambda what: [str(word) for word in argv(what)]


@pytest.fixture(scope="module")
def undisturbed(request_for, tmp_path_factory):
    """What so many devices of one process answer, as JSON."""
    found = {}

    def answer(what, devices):
        if (what, devices) not in found:
            out = tmp_path_factory.mktemp("undisturbed") / "out.json"
            assert main(["run", *request_for(what), "--devices", str(devices), "--json", str(out)]) == 0
            found[what, devices] = json.loads(out.read_text())
        return found[what, devices]

    return answer


def same(found, expected):
    """The same classes, as likely; or the same text."""
    assert found.get("texts") == expected.get("texts")
    rows, others = found.get("classes", []), expected.get("classes", [])
    assert [row["class"] for row in rows] == [row["class"] for row in others]
    likely = [[row["probability"] for row in some] for some in (rows, others)]
    np.testing.assert_allclose(*likely, rtol=1e-4)


@pytest.fixture
def lab():
    with Lab(HOSTS, 50e6) as lab:
        yield lab


class Program:
    """A command on one host, whose output goes to files that can be read while it runs."""

    def __init__(self, lab, host, argv, place, **environment):
        self.host, self._paths = host, {name: place / f"{host}-{time.monotonic_ns()}.{name}" for name in ("out", "err")}
        with self._paths["out"].open("w") as out, self._paths["err"].open("w") as err:
            # Without a cache a program takes so long to compile that it can be disturbed.
            added = {"JAX_LOG_COMPILES": "1", "JAX_ENABLE_COMPILATION_CACHE": "false", "XDG_RUNTIME_DIR": str(place)}
            self.process = lab.start(
                host, argv, cwd=ROOT, env={**os.environ, **added, **environment}, stdout=out, stderr=err
            )

    def said(self, name="out"):
        return self._paths[name].read_text()

    def wait_for(self, text, name="err", seconds=60):
        """Until it has said this, on stderr."""
        deadline = time.monotonic() + seconds
        while text not in self.said(name):
            assert time.monotonic() < deadline and self.process.poll() is None, self.said("err")[-3000:]
            time.sleep(0.01)

    def ends(self, deadline):
        """Exit code, and the last line on stderr. Raises TimeoutExpired where it does not end until then."""
        code = self.process.wait(max(deadline - time.monotonic(), 0.01))
        return code, (self.said("err").splitlines() or [""])[-1]


class Hosts:
    """The same `astra run` on every host of a lab."""

    def __init__(self, lab, place, argv, hosts=range(HOSTS), environments=None, **options):
        self.lab, self.json = lab, place / "out.json"
        options = {"coordinator": "{coordinator}", "hosts": "{hosts}", "host": "{host}", "json": self.json, **options}
        words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        command = [sys.executable, "-m", "astra_jax.cli", "run", *argv, *words]
        self.programs = {
            host: Program(lab, host, command, place, **(environments or {}).get(host, {})) for host in hosts
        }

    def __getitem__(self, host):
        return self.programs[host]

    def kill(self, host):
        """Kills a host; returns the time."""
        self.lab.kill(host)
        assert self.programs.pop(host).process.wait(5) == -signal.SIGKILL
        return time.monotonic()

    def wait_for_exchange(self, bytes_received=30_000):
        """Until hosts are in the middle of what they exchange in a pass, with a program that is compiled."""
        self[0].wait_for("Finished XLA compilation of jit(run)")
        before, deadline = self.lab.counters(0)[1], time.monotonic() + 30
        while self.lab.counters(0)[1] < before + bytes_received:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def all_end(self, line, deadline):
        """Every host that is left says this at the end, as an error, and has printed no answer."""
        for host, program in self.programs.items():
            assert program.ends(deadline) == (2, f"astra: error: {line}"), f"host {host}"
            assert program.said() == "", f"host {host}"
        assert not self.json.exists()

    def answer(self, seconds):
        """What host 0 answers, as JSON, once it has ended."""
        assert self[0].ends(time.monotonic() + seconds)[0] == 0, self[0].said("err")[-3000:]
        return json.loads(self.json.read_text())


@pytest.fixture
def hosts(lab, request_for, tmp_path):
    """Starts hosts, and sees that no process of them is left at the end."""
    yield lambda what, **options: Hosts(lab, tmp_path, request_for(what), **options)
    for host in range(HOSTS):
        seen = lab.start(host, ["ls", "/proc"], stdout=subprocess.PIPE, text=True).communicate(timeout=10)[0]
        processes = [name for name in seen.split() if name.isdigit()]
        assert len(processes) == 2, "the first process of a host, and `ls`"


# A host that does not come


@pytest.mark.parametrize("policy", ["fail", "single", "shrink"])
def test_a_host_that_never_starts(hosts, undisturbed, policy):
    start = time.monotonic()
    run = hosts(FEW, hosts=[0, 1], start_seconds=8, on_failure=policy)
    why = (
        "host 2 did not come (--start-seconds is 8): start the same command there with --host 2, and let TCP to port "
        "7777 of host 0 through"
    )
    if policy == "fail":
        run.all_end(why, start + 20)
        return
    found = run.answer(60)
    left = {"single": 1, "shrink": 2}[policy]
    assert found["began_anew"] | {"coordinator": ""} == {
        "coordinator": "", "hosts": left, "host": 0, "were": 3, "why": why,
    }  # fmt: skip
    same(found, undisturbed(FEW, left))
    other = run[1].ends(time.monotonic() + 5)
    if policy == "single":
        assert other == (2, f"astra: error: {why}; host 0 goes on alone") and run[1].said() == ""
    else:
        assert other[0] == 0 and run[1].said() == "host 1: done; the answer is on host 0\n"


def test_host_0_never_starts(hosts):
    start = time.monotonic()
    run = hosts(FEW, hosts=[1, 2], start_seconds=5)
    run.all_end(
        "nothing answers at --coordinator 10.77.0.1:7777 within 5 s (Connection refused): start the same command there "
        "with --host 0, and let TCP to port 7777 through its firewall",
        start + 20,
    )


# A host that is killed

PHASES = ["preflight", "before", "during", "after"]  # compilation


def wait_for(run, phase):
    """Until hosts are in this phase; they have MANY pictures to classify over slow links."""
    if phase == "preflight":
        deadline = time.monotonic() + 60
        while run.lab.counters(0)[1] < 50_000:  # the rate of links is measured
            assert time.monotonic() < deadline
            time.sleep(0.01)
    elif phase == "before":
        run[0].wait_for("0 - 2")  # the table of the preflight
    elif phase == "during":
        run[0].wait_for("Compiling jit(run)")
    else:
        run.wait_for_exchange()


@pytest.fixture
def slow_lab(lab):
    for host in range(HOSTS):
        lab.set_rate(host, 1e6)


@pytest.mark.usefixtures("slow_lab")
@pytest.mark.parametrize(
    ("phase", "victim"), [("preflight", 1), ("before", 1), ("during", 2), ("after", 1), ("after", 0), ("during", 0)]
)
def test_a_host_that_is_killed_ends_the_others(hosts, phase, victim):
    run = hosts(MANY)
    wait_for(run, phase)
    killed = run.kill(victim)
    run.all_end(f"host {victim} {KILLED}", killed + 2)


@pytest.mark.usefixtures("slow_lab")
@pytest.mark.parametrize(
    ("phase", "victim", "policy"), [("before", 2, "single"), ("during", 1, "shrink"), ("after", 2, "single"), ("after", 1, "shrink")]
)
def test_those_that_are_left_answer(hosts, undisturbed, phase, victim, policy):
    run = hosts(MANY, on_failure=policy)
    wait_for(run, phase)
    killed, other = run.kill(victim), 3 - victim
    if policy == "single":
        line = f"astra: error: host {victim} {KILLED}; host 0 goes on alone"
        assert run[other].ends(killed + 2) == (2, line) and run[other].said() == ""
    else:
        for host in (0, other):
            run[host].wait_for(f"astra: host {victim} {KILLED}: 2 hosts go on", seconds=2)
    found, left = run.answer(40), {"single": 1, "shrink": 2}[policy]
    assert found["began_anew"]["hosts"] == left and found["began_anew"]["why"] == f"host {victim} {KILLED}"
    same(found, undisturbed(MANY, left))
    if policy == "shrink":
        assert run[other].ends(time.monotonic() + 5)[0] == 0
        assert run[other].said() == "host 1: done; the answer is on host 0\n"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_host_that_is_killed_while_a_text_grows(hosts, undisturbed, victim):
    """Only host 0 is needed then."""
    run = hosts("text", on_failure="shrink")
    run[0].wait_for(f"{PROMPT} w", "out")
    killed = run.kill(victim)
    if victim == 0:
        run.all_end(f"host 0 {KILLED}", killed + 2)
        return
    found = run.answer(60)
    assert "began_anew" not in found
    same(found, undisturbed("text", HOSTS))
    assert run[0].said().startswith(PROMPT + found["texts"][0])
    assert run[2].ends(time.monotonic() + 5)[0] == 0 and run[2].said() == "host 2: done; the answer is on host 0\n"
