"""What is left of a checkpoint by kills, by several processes at a time, and by damage on the disk."""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import checkpoints
from astra_jax.errors import AstraError
from astra_jax.models.gpt2 import GPT2Config
from checkpoints import huggingface, lock, store
from checkpoints.streaming import cut, digest
from checkpoints.tensor_maps import build, flat_state, with_state

CONFIG = GPT2Config(vocab_size=14, n_positions=6, n_embd=8, n_layer=1, n_head=2)
ROOT = Path(__file__).parents[4]


@pytest.fixture
def make(word_tokenizer: Callable[..., Path]) -> Callable[[int], checkpoints.Checkpoint]:
    """Makes different models with different tokenizers."""

    def one(number: int) -> checkpoints.Checkpoint:
        model, rng = build("gpt2", CONFIG), np.random.default_rng(number)
        flat = {p: jnp.asarray(rng.normal(size=a.shape).astype(np.float32)) for p, a in flat_state(model).items()}
        files, history = word_tokenizer(number), ({"verb": "make", "number": number},)
        model = with_state(model, flat)
        return checkpoints.Checkpoint("gpt2", CONFIG, None, None, None, {}, "float32", history, model, None, files)

    return one


def is_whole(path: Path, expected: checkpoints.Checkpoint) -> bool:
    """Whether a checkpoint is all as expected; fails where it is in part."""
    found = checkpoints.load(path)
    ours, theirs = flat_state(found.model), flat_state(expected.model)
    assert found.tokenizer_files and expected.tokenizer_files
    tokenizers = [
        (files / "tokenizer.json").read_bytes() for files in (found.tokenizer_files, expected.tokenizer_files)
    ]
    same = {
        "weights": all(bool(jnp.array_equal(ours[name], theirs[name])) for name in theirs),
        "tokenizer": tokenizers[0] == tokenizers[1],
        "history": found.history == expected.history,
    }
    assert len(set(same.values())) == 1, same
    return same["weights"]


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


# Kills


class Killed(BaseException):
    """Stands in for the end of the process."""


OPERATIONS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.link", "os.symlink"}


class Killer:
    """From the chosen operation on, of those that change files in a folder, none has an effect: as in a killed process.
    TensorStore's own threads write on, into a folder that nothing names yet."""

    def __init__(self) -> None:
        self.folder, self.left, self.dead = "", 0, False
        sys.addaudithook(self.hook)  # for as long as Python runs

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.folder or not (event in OPERATIONS or (event == "open" and self.writes(args))):
            return
        if isinstance(args[0], int) or not os.fspath(args[0]).startswith(self.folder):
            return
        self.left -= 1
        if self.left < 0:
            self.dead = True
            raise Killed

    @staticmethod
    def writes(args: tuple[Any, ...]) -> bool:
        return isinstance(args[2], int) and bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))

    @contextlib.contextmanager
    def after(self, operations: int, folder: Path) -> Iterator[None]:
        self.folder, self.left, self.dead = str(folder), operations, False
        try:
            yield
        except BaseException:
            if not self.dead:
                raise
        finally:
            self.folder = ""


@pytest.fixture(scope="module")
def killer() -> Killer:
    return Killer()


def kills(killer: Killer, make: Callable[[int], checkpoints.Checkpoint], place: Path, step: int) -> dict[str, int]:
    """How often the old and the new checkpoint was left, killed at every `step`-th operation until none is left."""
    old, new = make(5), make(9)
    checkpoints.save(place / "old", old)
    found = {"old": 0, "new": 0}
    for operations in itertools.count(0, step):
        path = place / f"{operations}"
        shutil.copytree(place / "old", path)
        with killer.after(operations, path):
            checkpoints.save(path, new)
        is_old = is_whole(path, old)
        assert is_old or is_whole(path, new)
        found["old" if is_old else "new"] += 1
        if not killer.dead:
            assert not is_old and names(path) == ["astra.json", "tokenizer-0002", "weights-0002"]
            return found
        checkpoints.save(path, new)  # what was left is no obstacle, and is removed
        assert is_whole(path, new) and len(names(path)) == 3
        shutil.rmtree(path)
    raise AssertionError


def test_a_kill_leaves_the_old_checkpoint_or_the_new_one(
    killer: Killer, make: Callable[[int], checkpoints.Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_one_operation(folder: Path, parts: Any) -> dict[str, str]:
        whole = dict(parts)
        np.savez(folder / "all", **{f"{name}/{path}": a for name, part in whole.items() for path, a in part.items()})
        return {name: digest(arrays) for name, arrays in whole.items()}

    def from_one(stored: Any, model: Any) -> Iterator[Any]:
        with np.load(stored.weights / "all.npz") as arrays:
            for name in stored.parts:
                yield name, {p.partition("/")[2]: arrays[p] for p in arrays if p.startswith(f"{name}/")}

    # Every other operation, and none of Orbax; all are in the slow test.
    monkeypatch.setattr(store, "_write_parts", in_one_operation)
    monkeypatch.setattr(store, "_read_parts", from_one)
    found = kills(killer, make, tmp_path, 2)
    assert found["old"] >= 4 and found["new"] >= 2, found


@pytest.mark.slow
def test_a_kill_at_any_operation(killer: Killer, make: Callable[[int], checkpoints.Checkpoint], tmp_path: Path) -> None:
    found = kills(killer, make, tmp_path, 1)
    assert found["old"] >= 20 and found["new"] >= 4, found


def test_a_killed_export_is_whole_or_no_model(
    killer: Killer, make: Callable[[int], checkpoints.Checkpoint], tmp_path: Path
) -> None:
    old, new, found = make(5), make(9), []
    huggingface.write_folder(old, tmp_path / "old")
    for operations in itertools.count(0):
        path = tmp_path / f"{operations}"
        shutil.copytree(tmp_path / "old", path)
        with killer.after(operations, path):
            huggingface.write_folder(new, path)
        try:
            weights = flat_state(huggingface.read(str(path)).model)["norm.scale"]
            which = [bool(jnp.array_equal(weights, one.model.norm.scale[...])) for one in (old, new)]
            files = (old if which[0] else new).tokenizer_files
            assert sum(which) == 1 and files
            assert (path / "tokenizer.json").read_bytes() == (files / "tokenizer.json").read_bytes()
            found.append("old" if which[0] else "new")
        except AstraError as error:
            assert "has neither model.safetensors nor" in str(error)
            found.append("none")
        if not killer.dead:
            break
        huggingface.write_folder(new, path)  # what was left is no obstacle, and is removed
        assert huggingface.read(str(path)) and not list(path.glob(".model*"))
        shutil.rmtree(path)
    assert {*found} == {"old", "none", "new"} and found[-1] == "new"


def test_ctrl_c_tidies_up(make: Callable[[int], checkpoints.Checkpoint], tmp_path: Path) -> None:
    def interrupted() -> Iterator[Any]:
        yield next(iter(cut(make(9).model)))
        raise KeyboardInterrupt

    checkpoints.save(tmp_path, make(5))
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(tmp_path, make(9), interrupted())
    assert names(tmp_path) == ["astra.json", "tokenizer-0001", "weights-0001"] and is_whole(tmp_path, make(5))


def test_a_tokenizer_that_is_gone_is_not_left_out(
    make: Callable[[int], checkpoints.Checkpoint], tmp_path: Path
) -> None:
    checkpoints.save(tmp_path, make(5))
    loaded = checkpoints.load(tmp_path)
    checkpoints.save(tmp_path, make(9))
    with pytest.raises(AstraError, match="tokenizer-0001: the tokenizer is gone: was the checkpoint saved over"):
        checkpoints.save(tmp_path, loaded)
    assert is_whole(tmp_path, make(9))


# Several at a time


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
    read = store._read_parts

    def late(*args: Any) -> Any:
        checkpoints.save(tmp_path, make(9))
        return read(*args)

    monkeypatch.setattr(store, "_read_parts", late)
    with pytest.raises(AstraError, match="was saved over while it was read: repeat the command"):
        checkpoints.load(tmp_path)


# Damage


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_a_flipped_bit_is_found_wherever_it_is(
    step: int, make: Callable[[int], checkpoints.Checkpoint], tmp_path: Path
) -> None:
    expected, rng = make(5), np.random.default_rng(0)
    checkpoints.save(tmp_path, expected)
    refused = {True: 0, False: 0}  # by whether it is a file of numbers
    for file in files_of(tmp_path)[::step]:
        before = file.read_bytes()
        numbers = file.name[0].isdecimal()
        for _ in range(2 if numbers and step == 1 else 1):
            damaged = bytearray(before)
            if damaged:
                damaged[rng.integers(len(before))] ^= 1 << rng.integers(8)
            file.write_bytes(damaged)
            try:
                assert is_whole(tmp_path, expected) and not numbers  # Orbax's notes of when it wrote, and such
            except AstraError as error:
                refused[numbers] += 1
                part = file.relative_to(tmp_path).parts[:2]
                assert "\n" not in str(error) and "/".join(part if len(part) > 1 else ["astra.json"]) in str(error)
        file.write_bytes(before)
    assert is_whole(tmp_path, expected)
    numbers = sum(file.name[0].isdecimal() for file in files_of(tmp_path)[::step])
    assert refused[True] == numbers * (2 if step == 1 else 1) and refused[False] >= (6 if step == 1 else 1)


@pytest.mark.parametrize("damage", ["zeros", "another part's", "astra.json", "tokenizer", "tokenizer's list", "gone"])
def test_damage_is_named(damage: str, make: Callable[[int], checkpoints.Checkpoint], tmp_path: Path) -> None:
    checkpoints.save(tmp_path, make(5))
    weights, meta = tmp_path / "weights-0001", tmp_path / "astra.json"
    expected = f"{weights / 'norm'}: is not as it was written (its SHA-256 differs)"
    if damage == "zeros":
        file = weights / "norm" / "norm.scale" / "0"
        file.write_bytes(bytes(file.stat().st_size))
    elif damage == "another part's":
        shutil.copy(weights / "norm" / "norm.bias" / "0", weights / "norm" / "norm.scale" / "0")
    elif damage == "astra.json":
        meta.write_text(meta.read_text().replace('"number": 5', '"number": 4'))
        expected = f"{meta}: is not as it was written"
    elif damage == "tokenizer":
        file = tmp_path / "tokenizer-0001" / "tokenizer.json"
        file.write_text(file.read_text().replace("w3", "w4"))
        expected = f"{file}: is not as it was written"
    elif damage == "tokenizer's list":
        (tmp_path / "tokenizer-0001" / "added_tokens.json").write_text("{}")
        expected = "tokenizer-0001/added_tokens.json: is not as it was written"
    else:
        shutil.rmtree(tmp_path / "tokenizer-0001")
        expected = "tokenizer-0001: the tokenizer is missing: copy the whole checkpoint folder"
    with pytest.raises(AstraError) as caught:
        checkpoints.load(tmp_path)
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    if damage in ("zeros", "another part's"):
        assert flat_state(checkpoints.load(tmp_path, verify=False).model)  # who does not ask is not told


@pytest.mark.parametrize("pieces", [[1_000_000_000], [9]])
def test_pieces_larger_than_their_array_are_refused(
    pieces: list[int], make: Callable[[int], checkpoints.Checkpoint], tmp_path: Path
) -> None:
    checkpoints.save(tmp_path, make(5))
    file = tmp_path / "weights-0001" / "norm" / "norm.scale" / ".zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chunks": pieces}))
    with pytest.raises(AstraError, match=r"norm: norm.scale of shape \[8\] is stored in pieces of .*which are larger"):
        checkpoints.load(tmp_path)


def test_what_file_browsers_leave_is_ignored(make: Callable[[int], checkpoints.Checkpoint], tmp_path: Path) -> None:
    path = tmp_path / "out"
    for place in (path, path / "weights-0001", path / "weights-0001" / "norm", path / "tokenizer-0001"):
        place.mkdir(exist_ok=True)
        for name in (".DS_Store", "._norm", "Thumbs.db"):
            (place / name).write_bytes(b"\0")
        if place == path:
            checkpoints.save(path, make(5))
    assert is_whole(path, make(5))


# What a checkpoint is


def test_a_checkpoint_is_known_by_its_bytes(make: Callable[[int], checkpoints.Checkpoint], tmp_path: Path) -> None:
    assert make(5).digest is None
    for name in ("a", "b", "b"):  # the second one over the first
        checkpoints.save(tmp_path / name, make(5))
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    digests = {checkpoints.read_meta(tmp_path / name).digest for name in "abc"}
    assert len(digests) == 1 and checkpoints.load(tmp_path / "c").digest in digests
    changed = make(5)
    changed.model.norm.scale[...] = changed.model.norm.scale[...].at[3].add(1e-6)
    others = [changed, dataclasses.replace(make(5), tokenizer_files=make(6).tokenizer_files), make(6)]
    for other in others:
        checkpoints.save(tmp_path / "a", other)
        digests.add(checkpoints.read_meta(tmp_path / "a").digest)
    assert len(digests) == 4


def test_a_part_is_known_by_its_names_shapes_and_kinds_of_numbers() -> None:
    a = np.arange(6, dtype=np.float32)
    others = [{"b": a}, {"a": a.reshape(2, 3)}, {"a": a.view(np.int32)}, {"a": a + 1}, {"a": a, "b": a}, {}]
    assert len({digest(one) for one in ({"a": a}, *others)}) == 7
    assert digest({"a": a.reshape(2, 3).T}) == digest({"a": np.ascontiguousarray(a.reshape(2, 3).T)})
    bfloat16 = np.asarray(jnp.arange(3, dtype=jnp.bfloat16))
    assert digest({"a": bfloat16, "b": np.float32(1)}) != digest({"a": bfloat16, "b": np.float32(2)})
    assert digest({"b": a, "a": bfloat16}) == digest({"a": jax.device_get(bfloat16), "b": a})


def test_checkpoints_of_format_2_are_read(make: Callable[[int], checkpoints.Checkpoint], tmp_path: Path) -> None:
    checkpoints.save(tmp_path, make(5))
    meta = json.loads((tmp_path / "astra.json").read_text())
    for name in ("parts", "files", "sha256", "tokenizer"):
        del meta[name]
    (tmp_path / "astra.json").write_text(json.dumps(meta | {"format": 2}))
    (tmp_path / "tokenizer-0001").rename(tmp_path / "tokenizer")
    assert is_whole(tmp_path, make(5)) and checkpoints.read_meta(tmp_path).digest is None
    with pytest.raises(AstraError, match="^no$"):
        checkpoints.save(tmp_path, make(9), raising(AstraError("no")))
    assert is_whole(tmp_path, make(5))
    checkpoints.save(tmp_path, make(9))
    assert is_whole(tmp_path, make(9)) and names(tmp_path) == ["astra.json", "tokenizer-0002", "weights-0002"]


def raising(error: Exception) -> Iterator[Any]:
    yield from ()
    raise error
