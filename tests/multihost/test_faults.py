"""A host that is killed, or ends with an error, ends the others at once, with one line that names it."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.helpers.hosts import free_port


@pytest.fixture
def hosts(request, saved):
    """Three hosts that run a model without end, as processes. The parameter names those where nobody catches errors."""
    bare = getattr(request, "param", ())
    program = [sys.executable, "-m", "tests.multihost.forever", f"127.0.0.1:{free_port()}", "3"]
    path = str(saved("vit", "hidden"))
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    processes = [
        subprocess.Popen([*program, str(host), path, *["bare"] * (host in bare)], **pipes) for host in range(3)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def last_words(process):
    """Seconds until a process ended, its exit code, and the last line of what it complained of."""
    start = time.monotonic()
    _, err = process.communicate(timeout=60)
    return time.monotonic() - start, process.returncode, err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 2])
def test_a_host_that_is_killed_while_all_run(hosts, victim):
    for process in hosts:
        assert process.stdout.readline() == "running\n", process.communicate(timeout=10)
    hosts[victim].kill()
    for host, process in enumerate(hosts):
        if host != victim:
            seconds, code, line = last_words(process)
            assert (code, line) == (2, f"astra: error: host {victim} is gone: its process ended or was killed")
            assert seconds < 2


@pytest.mark.slow
def test_a_host_that_is_killed_while_it_starts(hosts):
    time.sleep(3)
    hosts[1].kill()
    for host in (0, 2):
        _, code, line = last_words(hosts[host])
        assert code == 2 and ("host 1 is gone" in line or "host 1 did not come" in line)


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [(2,)], indirect=True)
def test_a_program_that_ends_with_an_error(hosts):
    """Where no verb is there to catch it, what the interpreter does at its end does not wait for the others."""
    for process in hosts:
        assert process.stdout.readline() == "running\n", process.communicate(timeout=10)
    Path(hosts[0].args[-1], "fail-2").touch()
    for host in (0, 1):
        _, code, line = last_words(hosts[host])
        assert (code, line) == (2, "astra: error: host 2 ended with an error: RuntimeError: told to fail")
    _, code, line = last_words(hosts[2])
    assert (code, line) == (2, "astra: error: RuntimeError: told to fail")


@pytest.mark.slow
def test_a_host_that_stops_answering(hosts):
    """As behind a cut link: its process is stopped, not ended."""
    for process in hosts:
        assert process.stdout.readline() == "running\n", process.communicate(timeout=10)
    hosts[1].send_signal(signal.SIGSTOP)
    start = time.monotonic()
    for host in (0, 2):
        _, code, line = last_words(hosts[host])
        assert (code, line) == (2, "astra: error: host 1 has given no sign of life for 5 s: is its link cut?")
        assert 3 < time.monotonic() - start < 15
