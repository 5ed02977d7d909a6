"""Where compiled programs are kept, by whom, and that keeping them never stands in the way."""

import errno
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import checkpoints
from astra_jax.cli import compilation_cache
from astra_jax.cli.compilation_cache import Programs
from astra_jax.codecs.config import VQConfig
from astra_jax.errors import AstraError

KEY = "jit_run-0123"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HOME": "/home/ada"}, "/home/ada/.cache/astra-jax"),
        ({"HOME": "/home/ada", "XDG_CACHE_HOME": "/scratch/ada"}, "/scratch/ada/astra-jax"),
        ({"HOME": "/home/ada", "XDG_CACHE_HOME": ""}, "/home/ada/.cache/astra-jax"),
        ({"HOME": "/home/ada", "XDG_CACHE_HOME": "cache"}, "/home/ada/.cache/astra-jax"),  # as the specification says
    ],
)
def test_the_folder_is_in_the_users_cache(monkeypatch, variables, expected):
    monkeypatch.setattr(os, "environ", variables)
    assert compilation_cache.folder() == Path(expected)


@pytest.mark.parametrize("callbacks", [(), ([],)], ids=["JAX 0.11", "JAX 0.10"])
def test_a_program_is_kept_as_jax_says_it(monkeypatch, callbacks):
    """From 0.11 on without the callbacks that it has."""
    kept = []
    monkeypatch.setattr(
        compilation_cache.compilation_cache, "put_executable_and_time", lambda *given: kept.append(given)
    )
    compilation_cache._write(KEY, 60.0, "jit_run", "backend", "executable", *callbacks)
    assert kept == [(KEY, "jit_run", "executable", "backend", 60)]


def test_a_user_without_a_home_keeps_nothing(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where the user is in no list, either
    assert compilation_cache.folder() is None


@pytest.fixture
def no_mask():
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("no_mask")
def test_the_folder_is_made_for_the_user_alone(tmp_path):
    folder = tmp_path / "cache" / "astra-jax"
    assert compilation_cache.make(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert compilation_cache.make(folder), "also when it is there"


def test_a_link_of_the_users_to_a_folder_of_the_users_is_followed(tmp_path):
    (tmp_path / "big").mkdir(mode=0o700)
    (tmp_path / "astra-jax").symlink_to(tmp_path / "big")
    assert compilation_cache.make(tmp_path / "astra-jax")


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_folder_that_others_can_write_to_is_refused(tmp_path, mode):
    tmp_path.chmod(mode)
    with pytest.raises(AstraError, match="could put programs into it"):
        compilation_cache.make(tmp_path)


def test_a_folder_of_somebody_else_is_refused(tmp_path, monkeypatch):
    tmp_path.chmod(0o755)
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(AstraError, match="belongs to or can be written by somebody else"):
        compilation_cache.make(tmp_path)


def test_a_link_of_somebody_else_is_refused(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / "astra-jax").symlink_to(tmp_path / "mine")
    found, real = (tmp_path / "astra-jax").lstat(), Path.lstat
    other = os.stat_result((*found[:4], found.st_uid + 1, *found[5:]))
    monkeypatch.setattr(Path, "lstat", lambda path: other if path.name == "astra-jax" else real(path))
    with pytest.raises(AstraError):
        compilation_cache.make(tmp_path / "astra-jax")


def test_nothing_is_made_in_the_home_of_somebody_else(tmp_path, monkeypatch):
    """As by `sudo`, where it leaves HOME as it was."""
    if tmp_path.stat().st_uid == 0:
        os.chown(tmp_path, 1000, 1000)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 0)
    assert not compilation_cache.make(tmp_path / ".cache" / "astra-jax")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_made_is_not_used(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path / "file", tmp_path / "file" / "astra-jax", tmp_path / "dangling", Path("/proc/astra-jax")):
        assert not compilation_cache.make(path), path
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # a disk that was mounted read-only
    assert not compilation_cache.make(tmp_path)


def test_programs_are_found_and_written_over(tmp_path):
    kept = Programs(tmp_path)
    assert kept.get(KEY) is None
    kept.put(KEY, b"cut sh")
    kept.put(KEY, b"whole")
    assert Programs(tmp_path).get(KEY) == b"whole"
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for place in (0, 31, 32, -1):
        damaged = bytearray(whole)
        damaged[place] ^= 16
        file.write_bytes(damaged)
        assert Programs(tmp_path).get(KEY) is None, "what has a flipped bit is not run"


def test_those_that_were_not_used_for_longest_go_first(tmp_path):
    kept = Programs(tmp_path)
    for age, name in enumerate("abcd"):
        kept.put(name, bytes(100))
        os.utime(tmp_path / f"{name}-cache", (1000 - age, 1000 - age))
    (tmp_path / ".tmpkilled").write_bytes(bytes(100))  # what a killed process left
    os.utime(tmp_path / ".tmpkilled", (990, 990))
    assert kept.get("d")  # which makes it the youngest
    kept = Programs(tmp_path, most=350)  # two of 132 bytes each
    kept.put("e", bytes(100))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-cache", "d-cache", "e-cache"]


def test_nothing_fails_where_nothing_can_be_read_or_written(tmp_path, monkeypatch):
    gone = Programs(tmp_path / "gone")
    gone.put(KEY, b"x")
    assert gone.get(KEY) is None

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    Programs(tmp_path).put(KEY, b"x")
    assert not list(tmp_path.iterdir()), "no half of a file stays"


def test_a_reader_sees_one_of_two_programs_that_are_written_at_once(tmp_path):
    values = [bytes([i]) * (1 << 20) for i in (1, 2)]
    Programs(tmp_path).put(KEY, values[0])

    def write(value):
        for _ in range(20):
            Programs(tmp_path).put(KEY, value)

    writers = [threading.Thread(target=write, args=(value,)) for value in values]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert Programs(tmp_path).get(KEY) in values
    assert len(list(tmp_path.iterdir())) == 1


# What JAX makes of it: programs of their own, as its settings hold for a whole process.

COMPILE = """
import jax, sys
from astra_jax.cli.main import guarded
sys.exit(guarded(lambda: print(jax.jit(lambda x: x * 3 + 1)(13))))
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The folder of a user's caches, for processes that keep programs as users' do and say what they found."""
    for name in [name for name in os.environ if "CACHE" in name]:
        monkeypatch.delenv(name)
    for name in ("JAX_EXPLAIN_CACHE_MISSES", "JAX_LOG_COMPILES"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(command: list[str], **variables: str) -> tuple[int, int, str]:
    """How many programs it compiled although it may keep some, how many it found, and what else it said."""
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)
    assert done.returncode == 0, done.stderr
    missed = len(re.findall("PERSISTENT COMPILATION CACHE MISS", done.stderr))
    return missed, len(re.findall("Persistent compilation cache hit", done.stderr)), done.stderr


def compile_one(**variables: str) -> tuple[int, int, str]:
    return run([sys.executable, "-c", COMPILE], **variables)


def test_a_program_is_compiled_once(home):
    assert compile_one()[:2] == (1, 0)
    (kept,) = (home / "astra-jax").iterdir()
    assert compile_one()[:2] == (0, 1)
    kept.write_bytes(kept.read_bytes()[:-9])
    missed, found, said = compile_one()
    assert (missed, found) == (1, 0) and "Error reading" not in said, "what is broken is compiled again"
    assert compile_one()[:2] == (0, 1), "and kept anew"


@pytest.mark.parametrize(
    "variables",
    [{"JAX_COMPILATION_CACHE_DIR": "own"}, {"JAX_ENABLE_COMPILATION_CACHE": "false"}],
    ids=lambda variables: next(iter(variables)),
)
def test_what_the_user_chose_for_jax_holds(home, tmp_path, variables):
    compile_one(**{name: str(tmp_path / value) if value == "own" else value for name, value in variables.items()})
    assert not home.exists()


def test_a_folder_that_others_can_write_to_is_told_of_and_not_used(home):
    (home / "astra-jax").mkdir(parents=True)
    (home / "astra-jax").chmod(0o777)
    said = compile_one()[2]
    (line,) = [line for line in said.splitlines() if line.startswith("astra: ")]
    assert line.startswith(f"astra: compiled programs are not kept: {home / 'astra-jax'} ")
    assert not list((home / "astra-jax").iterdir())


def test_a_folder_that_cannot_be_made_is_not_told_of(home):
    home.touch()
    said = compile_one(JAX_LOG_COMPILES="0", JAX_EXPLAIN_CACHE_MISSES="0")[2]
    assert said == ""


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_the_second_start_of_a_verb_compiles_nothing(home, tiny_vit, tmp_path, devices):
    model = tiny_vit(VQConfig(groups=4, codewords=16), num_channels=3, num_labels=2)
    size = {"size": {"height": 20, "width": 20}}
    checkpoint = checkpoints.Checkpoint("vit", model.config, model.astra, ("a", "b"), size, {}, "float32", (), model)
    checkpoints.save(tmp_path / "vit", checkpoint)
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(tmp_path / "x.png")
    command = [
        sys.executable,
        "-m",
        "astra_jax.cli.main",
        "run",
        str(tmp_path / "vit"),
        "--image",
        str(tmp_path / "x.png"),
    ]
    command += ["--devices", str(devices)]
    missed, found, _ = run(command)
    assert missed > 5 and found == 0
    assert run(command)[:2] == (0, missed)
