"""Hosts as processes of this machine, and workers."""

import contextlib
import os
import random
import socket
import subprocess
import threading

from tests.helpers import ASTRA, ROOT


def free_port() -> int:
    """A port that is free, and the next one too, which JAX takes. No connection gets one of these by itself, as it does
    from 32768 on: so they stay free."""
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as one, socket.socket() as next_one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            next_one.bind(("127.0.0.1", port + 1))
            return port


def together(commands: list[list[str]], seconds: float = 240) -> list[subprocess.CompletedProcess]:
    """Runs one command per host at once; kills all of them where one does not end in time."""
    processes = [
        subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) for c in commands
    ]
    try:
        ended = []
        for process in processes:
            out, err = process.communicate(timeout=seconds)
            ended.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
        return ended
    finally:
        for process in processes:
            process.kill()


class Workers:
    """Workers of a checkpoint on this host, as processes; the first answers who has its `invitation`."""

    def __init__(self, checkpoint, *options, **environment):
        self.checkpoint = str(checkpoint)
        self._pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        self._pipes["env"] = os.environ | environment
        self.processes, self.said = [], []
        listen = f"127.0.0.1:{free_port()}"
        first = self._start(self.checkpoint, "--listen", listen, *options)
        while not (line := first.stdout.readline()).startswith("ready: astra run"):
            assert line, first.stderr.read()
        self.invitation = line.split()[-1]
        threading.Thread(target=self._listen, args=(first,), daemon=True).start()

    def _start(self, *options):
        process = subprocess.Popen([ASTRA, "worker", *options], **self._pipes)
        self.processes.append(process)
        return process

    def _listen(self, process):
        self.said += iter(process.stdout.readline, "")

    def add(self, copies=False):
        """One more, once it is ready; it has the checkpoint, or copies it."""
        process = self._start(*[] if copies else [self.checkpoint], "--join", self.invitation)
        if copies:
            assert process.stdout.readline().startswith("copying the checkpoint of host 0")
        line = process.stdout.readline()
        assert "ready; UDP port" in line, line + process.stderr.read()
        return process

    def close(self):
        for process in self.processes:
            process.kill()
            process.communicate(timeout=10)


@contextlib.contextmanager
def workers(checkpoint, *options, hosts=3, **environment):
    """So many workers that are ready."""
    with contextlib.closing(Workers(checkpoint, *options, **environment)) as found:
        for _ in range(hosts - 1):
            found.add()
        yield found
