"""Several programs save into one folder, or read it, at a time."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import checkpoints
from astra_jax.errors import AstraError
from checkpoints import lock, store
from checkpoints.streaming import cut
from tests.helpers import ROOT
from tests.helpers.folders import is_whole, names


def test_a_save_waits_for_the_one_before_and_neither_harms_the_other(
    make: Callable[[int], checkpoints.Checkpoint], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, first, second = tmp_path / "out", make(5), make(9)
    other = threading.Thread(target=lambda: checkpoints.save(path, second))

    def fails() -> Iterator[Any]:
        yield next(iter(cut(first.model)))
        other.start()
        other.join(0.5)
        assert other.is_alive()  # it waits
        raise AstraError("no")

    with pytest.raises(AstraError, match="^no$"):
        checkpoints.save(path, first, fails())
    other.join(60)
    assert is_whole(path, second) and names(path) == ["astra.json", "tokenizer-0001", "weights-0001"]


def test_who_is_there_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, waiting, order = tmp_path / "lock", lock.waiting(tmp_path), []

    def later() -> None:
        with lock.alone(path, waiting):
            order.append("second")

    thread = threading.Thread(target=later)
    with lock.alone(path, pytest.fail) as locked:
        assert locked
        thread.start()
        thread.join(0.5)
        order.append("first")
    thread.join(10)
    said = capsys.readouterr().err.splitlines()
    assert order == ["first", "second"] and not path.exists()
    assert len(said) == 1 and f"process {os.getpid()} on host " in said[0] and "is saving there" in said[0]


HOLDER = """
import importlib.util, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("lock", {file!r})
lock = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lock)
with lock.alone(Path(sys.argv[1]), print):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_the_lock_of_a_killed_process_is_none(tmp_path: Path) -> None:
    path, program = tmp_path / "lock", HOLDER.format(file=str(ROOT / "checkpoints" / "lock.py"))
    with subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout and holder.stdout.readline() == "locked\n"
        said: list[str] = []

        def busy(who: str) -> None:
            said.append(who)
            if len(said) == 3:
                holder.send_signal(signal.SIGKILL)
                holder.wait()

        with lock.alone(path, busy):
            assert path.read_text().startswith(f"process {os.getpid()} on host")
    assert said == [said[0]] * 3 and said[0].startswith(f"process {holder.pid} on host ") and not path.exists()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    with lock.alone(tmp_path / "lock", pytest.fail) as locked:
        assert not locked


SAVER = """
import sys, time
import checkpoints
from checkpoints import store
one, out, number = sys.argv[1:]
checkpoint = checkpoints.load(one)
print("loaded", flush=True)
sys.stdin.readline()
for _ in range(int(number)):
    checkpoints.save(out, checkpoint)
"""


@pytest.mark.slow
def test_two_processes_save_into_one_folder_and_are_killed(
    make: Callable[[int], checkpoints.Checkpoint], tmp_path: Path
) -> None:
    ones = [make(5), make(9)]
    for number, one in enumerate(ones):
        checkpoints.save(tmp_path / f"{number}", one)
    out = tmp_path / "out"
    checkpoints.save(out, ones[0])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    rng = np.random.default_rng(0)
    for _ in range(2):
        savers = [
            subprocess.Popen(
                [sys.executable, "-c", SAVER, str(tmp_path / f"{number}"), str(out), "1000"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
            )
            for number in range(2)
        ]  # fmt: skip
        for saver in savers:
            assert saver.stdout and saver.stdout.readline() == "loaded\n"
        for saver in savers:
            assert saver.stdin
            saver.stdin.write("\n")
            saver.stdin.flush()
        for saver in savers:
            time.sleep(rng.uniform(1, 4))
            saver.kill()
            saver.wait()
        assert any(is_whole(out, one) for one in ones)
    checkpoints.save(out, ones[1])
    assert is_whole(out, ones[1]) and len(names(out)) == 3


def test_what_is_saved_over_while_it_is_read_is_said(
    make: Callable[[int], checkpoints.Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.save(tmp_path, make(5))
    read = store.read_parts

    def late(*args: Any) -> Any:
        checkpoints.save(tmp_path, make(9))
        return read(*args)

    monkeypatch.setattr(store, "read_parts", late)
    with pytest.raises(AstraError, match="was saved over while it was read: repeat the command"):
        checkpoints.load(tmp_path)
