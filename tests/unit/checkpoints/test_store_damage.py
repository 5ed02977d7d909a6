"""What is left of a checkpoint by kills, and by damage on the disk."""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import checkpoints
from astra_jax.errors import AstraError
from checkpoints import huggingface, store
from checkpoints.streaming import cut, digest
from checkpoints.tensor_maps import flat_state
from tests.helpers.folders import is_whole, names

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
    monkeypatch.setattr(store, "write_parts", in_one_operation)
    monkeypatch.setattr(store, "read_parts", from_one)
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
