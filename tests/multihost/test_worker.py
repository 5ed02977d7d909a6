"""Workers that stay up on several hosts, which are processes of this machine, and those who ask them."""

import functools
import json
import os
import re
import signal
import subprocess
import threading
import time

import numpy as np
import pytest

from astra_jax.hosts.invitation import Invitation
from eval.service import client, messages
from eval.service.requests import Request
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
def test_workers_answer_pictures_again_and_again_and_come_and_go(place):
    vit, pictures = place / "vit", ["--image", place / "large.png", place / "small.png"]
    with workers(vit, hosts=HOSTS) as company:
        ask = functools.partial(run, place, vit, "--join", company.invitation)
        expected = run(place, vit, *pictures, "--devices", HOSTS)
        first = ask(*pictures)
        assert first["first_seconds"] > 0
        again = ask(*pictures)
        assert again["first_seconds"] == 0, "nothing is compiled anew"
        for found in (first, again):
            same(found, expected)
            assert [row["host"] for row in found["hosts"]] == [0, 1, 2]
            assert all(row["total ms"] > row["waited ms"] and row["sent bytes"] > 0 for row in found["hosts"])

        (place / "none.png").write_bytes(b"none")
        for argv, message in [
            (["--image", place / "none.png"], "not an image of a known format"),
            (["--prompt", "w1"], "takes pictures: give --image, not --prompt"),
            ([*pictures, "--dtype", "bfloat16"], "was said to the workers: leave it out"),
        ]:
            assert message in ask(*argv, code=2)
        other = run(place, place / "llama", "--prompt", "w1", "--join", company.invitation, code=2)
        assert f"the workers have loaded {vit}, another checkpoint: ask for it" in other

        company.processes[1].kill()
        two = run(place, vit, *pictures, "--devices", HOSTS - 1)
        found = ask(*pictures)
        same(found, two)
        assert [row["host"] for row in found["hosts"]] == [0, 2]
        company.add()
        found = ask(*pictures)
        same(found, expected)
        assert [row["host"] for row in found["hosts"]] == [0, 2, 3]
        company.processes[0].kill()
        for process in company.processes[2:]:
            _, said = process.communicate(timeout=20)
            assert re.match(r"astra: error: host 0 at 127.0.0.1:\d+ is gone; nobody listens at", said.splitlines()[-1])


@pytest.mark.slow
def test_workers_go_on_with_texts(place):
    """One of them has copied the checkpoint, and has no room for three prompts: that is then the answer, and no end."""
    llama, prompt = place / "llama", ["--prompt", "w1 w2 w3 w4 w5 w6 w7", "--max-new-tokens", "6"]
    path = f"{fails_at_three_prompts(place)}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    with workers(llama, hosts=HOSTS - 1, XDG_CACHE_HOME=str(place / "cache"), PYTHONPATH=path) as company:
        company.add(copies=True)
        ask = functools.partial(run, place, llama, "--join", company.invitation)
        expected = run(place, llama, *prompt, "--devices", HOSTS)
        message = ask("--prompt", "w1", "--max-new-tokens", "999", code=2)
        assert "999 new tokens are more than the model takes" in message
        message = ask("--prompt", *"abc", "--max-new-tokens", "6", code=2)
        assert re.fullmatch("astra: error: host [12]: MemoryError: no room on this host", message)
        for _ in range(2):
            found = ask(*prompt)
            assert found["texts"] == expected["texts"] and len(found["hosts"]) == HOSTS
        assert [process.poll() for process in company.processes] == [None] * HOSTS


def fails_at_three_prompts(place):
    """A folder for PYTHONPATH, where what joins others cannot read three prompts."""
    lines = [
        "from astra_jax.inputs import token_batches",
        "def pad(sequences, *rest, pad=token_batches.pad):",
        "    if len(sequences) == 3:",
        "        raise MemoryError('no room on this host')",
        "    return pad(sequences, *rest)",
        "token_batches.pad = pad",
    ]
    (place / "site").mkdir()
    lines = ["import sys", "if '--join' in sys.orig_argv:", *(f"    {line}" for line in lines)]
    (place / "site" / "sitecustomize.py").write_text("\n".join(lines))
    return place / "site"


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_host_that_is_gone_in_the_middle_is_done_without(place, how):
    """Every answer comes, in time; those of a pass in which a host went say so, or the host was gone before."""
    vit, pictures = place / "vit", [place / "large.png"]
    request = Request(("large.png",), (pictures[0].read_bytes(),))
    with workers(vit, hosts=3) as company:
        invitation = Invitation.read(company.invitation)

        def ask():
            begun = time.monotonic()
            found = list(client.ask(invitation, vit, request))
            return time.monotonic() - begun, found

        ask(), ask()
        undisturbed = ask()[0]
        timer = threading.Timer(
            undisturbed + np.random.default_rng().uniform(0, undisturbed), company.processes[1].send_signal, [how]
        )
        timer.start()
        answers = [ask() for _ in range(12)]
        for seconds, found in answers:
            (passed,) = [message for message in found if isinstance(message, messages.PassTime)]
            assert seconds - passed.first_seconds < undisturbed + 2.5

        def hosts(found):
            (times,) = [message for message in found if isinstance(message, messages.HostTimes)]
            return [row["host"] for row in times.rows]

        assert hosts(answers[-1][1]) == [0, 2]
        if how == signal.SIGSTOP:  # it takes part again, where it goes on
            company.processes[1].send_signal(signal.SIGCONT)
            deadline = time.monotonic() + 30
            while hosts(ask()[1]) != [0, 2, 3]:
                assert time.monotonic() < deadline
                time.sleep(0.2)
