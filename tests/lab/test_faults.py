"""Hosts that die, differ or are cut off: who is left ends with one line that says so, or answers all the same."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import checkpoints
from astra_jax.cli.main import main
from astra_jax.codecs.config import VQConfig
from astra_jax.hosts.agreement import digest, versions
from eval.network.lab import Lab
from tests.helpers import ROOT

pytestmark = pytest.mark.slow

HOSTS = 3
KILLED = "is gone: its process ended or was killed"
NEW_TOKENS = 1000
PROMPT = " ".join(f"w{i}" for i in range(1, 10))
FEW, MANY = 2, 60  # pictures; at 1.5 Mbps a pass with many takes a second, as layers are exchanged as they are
ANOTHER_VERSION = """
import importlib.metadata

found = importlib.metadata.version
importlib.metadata.version = lambda name: "0.1" if name == "jaxlib" else found(name)
"""


@pytest.fixture(scope="module")
def place(tiny_vit, tiny_gpt2, word_tokenizer, tmp_path_factory):
    """Checkpoints `vit` and `gpt2`, and a picture."""
    place, astra = tmp_path_factory.mktemp("faults"), VQConfig(groups=4, codewords=16)
    vit, size = tiny_vit(astra, num_channels=3), {"height": 20, "width": 20}
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
def question(place):
    """Arguments of `astra run`: so many pictures, or a text to go on with."""

    def words(what):
        if what == "text":
            return ["--prompt", PROMPT, "--max-new-tokens", str(NEW_TOKENS)]
        return ["--image", *[str(place / "cat.png")] * what, "--top", "1"]

    return words


def setup(place, what):
    """Arguments that say what is loaded, and how it is split."""
    return [str(place / "gpt2")] if what == "text" else [str(place / "vit"), "--strategy", "sp"]


@pytest.fixture(scope="module")
def undisturbed(place, question, tmp_path_factory):
    """What so many devices of one process answer, as JSON."""
    found = {}

    def answer(what, devices):
        if (what, devices) not in found:
            out = tmp_path_factory.mktemp("undisturbed") / "out.json"
            argv = ["run", *setup(place, what), *question(what), "--devices", str(devices), "--json", str(out)]
            assert main(argv) == 0
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
    """Three hosts; at the end no process of them may be left."""
    with Lab(HOSTS, 50e6) as lab:
        yield lab
        for host in range(HOSTS):
            listing = lab.start(host, ["ls", "/proc"], stdout=subprocess.PIPE, text=True)
            processes = [name for name in listing.communicate(timeout=10)[0].split() if name.isdigit()]
            assert len(processes) == 2, "the first process of a host, and `ls`"


def eventually(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Program:
    """A verb on one host, whose output goes to files that can be read while it runs."""

    def __init__(self, lab, host, argv, folder, **environment):
        self._paths = {name: folder / f"{host}-{time.monotonic_ns()}.{name}" for name in ("out", "err")}
        environment = {**os.environ, "JAX_LOG_COMPILES": "1", "XDG_RUNTIME_DIR": str(folder), **environment}
        with self._paths["out"].open("w") as out, self._paths["err"].open("w") as err:
            command = [sys.executable, "-m", "astra_jax.cli.main", *argv]
            self.process = lab.start(host, command, cwd=ROOT, env=environment, stdout=out, stderr=err)

    def said(self, name="out"):
        return self._paths[name].read_text()

    def wait_for(self, text, name="err", seconds=60):
        """Until it has said this."""
        eventually(lambda: text in self.said(name) or self.process.poll() is not None, seconds)
        assert text in self.said(name), self.said("err")[-3000:]

    def ends(self, deadline):
        """Exit code, and the last line on stderr. Raises TimeoutExpired where it does not end until then."""
        code = self.process.wait(max(deadline - time.monotonic(), 0.01))
        return code, (self.said("err").splitlines() or [""])[-1]

    def is_done(self, host):
        """It ends in order, and leaves the answer to host 0."""
        ended = self.ends(time.monotonic() + 10)
        assert ended[0] == 0, ended
        assert self.said() == f"host {host}: done; the answer is on host 0\n"


class Hosts:
    """The same verb on every host of a lab."""

    def __init__(self, lab, argv, folder, hosts=range(HOSTS), replaced=None, environment=None, **options):
        """`replaced` is another checkpoint of a host; `environment` is that of one host, or of None for all."""
        self.lab, self.json, self.programs = lab, folder / "out.json", {}
        several = {"coordinator": "{coordinator}", "hosts": "{hosts}", "host": "{host}"}
        words = [w for name, value in (several | options).items() for w in (f"--{name.replace('_', '-')}", str(value))]
        for host in hosts:
            verb, checkpoint, *rest = argv
            checkpoint = (replaced or {}).get(host, checkpoint)
            added = (environment or {}).get(host) or (environment or {}).get(None, {})
            self.programs[host] = Program(lab, host, [verb, checkpoint, *rest, *words], folder, **added)

    def __getitem__(self, host):
        return self.programs[host]

    def wait_for(self, phase):
        """Until they are in this phase: the preflight, before, during or after (in a pass) compilation."""
        if phase == "preflight":
            eventually(lambda: self.lab.counters(0)[1] > 50_000, 60)  # the rate of links is measured
        elif phase == "before":
            self[0].wait_for("1 - 2")  # the table of the preflight
        elif phase == "during":
            self[0].wait_for("Compiling jit(run)")
        else:
            self[0].wait_for("Finished XLA compilation of jit(run)")
            before = self.lab.counters(0)[1]
            eventually(lambda: self.lab.counters(0)[1] > before + 20_000, 30)

    def kill(self, host):
        """Kills a host. Returns the time."""
        self.lab.kill(host)
        killed = time.monotonic()
        assert self.programs.pop(host).process.wait(5) == -signal.SIGKILL
        assert all(program.process.poll() in (None, 2) for program in self.programs.values())
        return killed

    def all_end(self, line, deadline):
        """All that are left say this at the end, as an error, and none has an answer."""
        for host, program in self.programs.items():
            assert program.ends(deadline) == (2, f"astra: error: {line}"), f"host {host}"
            assert program.said() == "", f"host {host}"
        assert not self.json.exists()

    def answer(self, seconds):
        """What host 0 answers, as JSON, once it has ended."""
        assert self[0].ends(time.monotonic() + seconds)[0] == 0, self[0].said("err")[-3000:]
        return json.loads(self.json.read_text())


@pytest.fixture
def run(lab, place, question, tmp_path):
    """Starts `astra run` on the hosts."""

    def start(what, **options):
        argv = ["run", *setup(place, what), *question(what), "--json", str(tmp_path / "out.json")]
        return Hosts(lab, argv, tmp_path, **options)

    return start


def set_rates(lab, rate):
    for host in range(HOSTS):
        lab.set_rate(host, rate)


LEFT = {"single": 1, "shrink": 2}  # hosts
COMPILING = {None: {"JAX_ENABLE_COMPILATION_CACHE": "false"}}  # which takes long enough to be disturbed


# A host that does not come


@pytest.mark.parametrize("policy", ["fail", "shrink"])
def test_a_host_that_never_starts(run, undisturbed, policy):
    start = time.monotonic()
    hosts = run(FEW, hosts=[0, 1], start_seconds=4, on_failure=policy)
    why = (
        "host 2 did not come (--start-seconds is 4): start the same command there with --host 2, and let TCP to port "
        "7777 of host 0 through"
    )
    if policy == "fail":
        hosts.all_end(why, start + 20)
        return
    found = hosts.answer(60)
    coordinator = {"coordinator": "10.77.0.1:7777"}
    assert found["began_anew"] == {**coordinator, "hosts": LEFT[policy], "host": 0, "were": 3, "why": why}
    same(found, undisturbed(FEW, LEFT[policy]))
    if policy == "shrink":
        hosts[1].is_done(1)
    else:
        assert hosts[1].ends(time.monotonic()) == (2, f"astra: error: {why}; host 0 goes on alone")
        assert hosts[1].said() == ""


# A host that is killed


@pytest.mark.parametrize(("phase", "victim"), [("preflight", 1), ("during", 2)])
def test_a_host_that_is_killed_ends_the_others(lab, run, phase, victim):
    set_rates(lab, 1.5e6)
    hosts = run(MANY, environment=COMPILING if phase == "during" else None)
    hosts.wait_for(phase)
    killed = hosts.kill(victim)
    hosts.all_end(f"host {victim} {KILLED}", killed + 2)


@pytest.mark.parametrize(
    ("phase", "victim", "policy"),
    [("during", 2, "single"), ("after", 1, "shrink")],
)
def test_those_that_are_left_answer(lab, run, undisturbed, phase, victim, policy):
    set_rates(lab, 1.5e6)
    hosts = run(MANY, on_failure=policy, environment=COMPILING if phase == "during" else None)
    hosts.wait_for(phase)
    killed, other = hosts.kill(victim), 3 - victim
    if policy == "single":
        line = f"astra: error: host {victim} {KILLED}; host 0 goes on alone"
        assert hosts[other].ends(killed + 2) == (2, line) and hosts[other].said() == ""
    else:
        for host in (0, other):
            hosts[host].wait_for(f"astra: host {victim} {KILLED}: 2 hosts go on", seconds=2)
    found = hosts.answer(60)
    assert found["began_anew"]["hosts"] == LEFT[policy] and found["began_anew"]["why"] == f"host {victim} {KILLED}"
    same(found, undisturbed(MANY, LEFT[policy]))
    if policy == "shrink":
        hosts[other].is_done(1)


def test_a_host_that_is_killed_while_a_text_grows(run, undisturbed):
    """Only host 0 is needed then."""
    hosts = run("text", on_failure="shrink")
    hosts[0].wait_for(f"{PROMPT} w", "out")
    hosts.kill(1)
    assert hosts[0].process.poll() is None
    found = hosts.answer(60)
    assert "began_anew" not in found
    same(found, undisturbed("text", HOSTS))
    assert hosts[0].said().startswith(f"{PROMPT}{found['texts'][0]}\n")
    hosts[2].is_done(2)


# A link that is cut, or slow


def test_a_link_that_is_cut_for_good(run, undisturbed):
    hosts = run(FEW, patience=3, on_failure="shrink")
    hosts.wait_for("before")
    hosts.lab.cut(1)
    cut, silent = time.monotonic(), "has given no sign of life for 3.01 s: is its link cut?"
    lonely = hosts.programs.pop(1)
    same(hosts.answer(60), undisturbed(FEW, 2))
    hosts[2].is_done(1)
    assert lonely.ends(cut + 6) == (2, f"astra: error: host 0 {silent}") and lonely.said() == ""


def test_a_link_that_is_cut_in_the_preflight(run):
    hosts = run(FEW)
    hosts.wait_for("preflight")
    hosts.lab.cut(1)
    cut = time.monotonic()
    code, line = hosts.programs.pop(1).ends(cut + 30)
    assert code == 2 and line.startswith("astra: error: host 1: host 0 at 10.77.0.1:7777 is lost (")
    hosts.all_end("host 1 gives no sign of life: is its link cut?", cut + 30)


def test_a_link_that_is_cut_for_a_while(lab, run, undisturbed):
    set_rates(lab, 1.5e6)
    hosts = run(MANY)
    hosts.wait_for("after")
    lab.cut(1)
    time.sleep(10)
    lab.mend(1)
    same(hosts.answer(40), undisturbed(MANY, HOSTS))


def test_a_slow_link_is_no_dead_host(lab, run, undisturbed):
    """Not even for who has little patience."""
    set_rates(lab, 1e5)
    found = run(25, patience=5).answer(100)
    same(found, undisturbed(25, HOSTS))
    assert "began_anew" not in found and found["hosts"][0]["total ms"] > 5_000


# What is not the same on all hosts, or in use


def test_another_version(run, tmp_path):
    """Said before anything is made of a checkpoint."""
    (tmp_path / "sitecustomize.py").write_text(ANOTHER_VERSION)
    start, hosts = time.monotonic(), run(FEW, environment={1: {"PYTHONPATH": str(tmp_path)}})
    hosts.all_end(f"jaxlib is {versions()['jaxlib']} on hosts 0, 2 and 0.1 on host 1: install the same", start + 30)


def test_another_checkpoint(run, place, tmp_path):
    shutil.copytree(place / "vit", tmp_path / "other")
    with (tmp_path / "other" / "astra.json").open("a") as file:
        file.write(" ")
    start, hashes = time.monotonic(), [digest([folder])[:12] for folder in (place / "vit", tmp_path / "other")]
    run(FEW, replaced={2: str(tmp_path / "other")}).all_end(
        f"the checkpoint's hash is {hashes[0]} on hosts 0, 1 and {hashes[1]} on host 2: copy the folder of host 0 to "
        "the others",
        start + 30,
    )


def test_a_port_that_is_in_use(lab, run):
    """By something that says nothing."""
    listen = "import socket; server = socket.create_server(('', 7777)); print('ready', flush=True); input()"
    listener = lab.start(0, [sys.executable, "-c", listen], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert listener.stdout.readline() == "ready\n"
    start, hosts = time.monotonic(), run(FEW, start_seconds=3)
    code, line = hosts.programs.pop(0).ends(start + 20)
    assert code == 2
    assert line.startswith(
        "astra: error: --coordinator: host 0 needs 10.77.0.1:7777, and the port is in use: end what uses it, or try "
        "--coordinator 10.77.0.1:"
    )
    for host, program in hosts.programs.items():
        line = f"astra: error: host {host}: host 0 at 10.77.0.1:7777 is lost (timed out): see what it says there"
        assert program.ends(start + 20) == (2, line) and program.said() == ""
    listener.communicate("\n", timeout=10)
