"""The checkpoint folder: everything about a model, in a folder that needs no other.

    OUT/astra.json     what the model is: its configuration, codebooks' configuration, labels, image preprocessing,
                       the Hugging Face config.json it came from, how it was made, and which weights folder counts
                       and the SHA-256 of every part of it, of every file of the tokenizer, and of what astra.json says
    OUT/weights-0001/  its parameters, codebooks and statistics: an Orbax checkpoint for every part of the model, such
                       as `embed` and `block-0000`, so that no more than two have to be in memory at a time
    OUT/tokenizer-0001/  the files of its tokenizer, if it reads text

Saving over a checkpoint leaves the old one good until the new one is complete, whenever the process is killed: weights
and tokenizer are written into folders of a new number, astra.json, which names them, is replaced at once, and only then
the old folders are removed. Of several processes that save into one folder each waits for the one before. Whatever else
is in the folder (the state and log of a training run) is left alone.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from astra_jax.codecs.config import AstraConfig
from astra_jax.errors import AstraError
from astra_jax.files import write_atomically, writing
from checkpoints.description import (
    DAMAGED,
    META,
    OURS,
    TOKENIZER,
    WEIGHTS,
    Checkpoint,
    check_labels,
    describe,
    read_description,
)
from checkpoints.files import is_empty, is_foreign, read_json
from checkpoints.lock import alone, waiting
from checkpoints.sentences import copy_companions
from checkpoints.streaming import Part, assemble, cut
from checkpoints.tensor_maps import build, flat_state, with_state
from checkpoints.weights import first_groups, read_parts, write_parts

# What may be in the folder before the first save: a training run's state and log, and what a killed save left.
KNOWN = (f"{WEIGHTS}*", f"{TOKENIZER}*", f".{META}.*", "train", "train.jsonl", ".train.*")
LOCK = f".{META}.lock"


def save(path: Path | str, checkpoint: Checkpoint, parts: Iterable[Part] | None = None) -> None:
    """Writes a checkpoint folder, whole or not at all; see the module's docstring.

    Args:
      path: the folder.
      checkpoint: what to write; its model may be abstract if there are `parts`.
      parts: the weights, if they are not those of the model. What they raise leaves nothing behind.

    Raises:
      AstraError: `path` is something else than a checkpoint, the labels do not name the model's classes, or the disk is
        full or not writable.
    """
    path = Path(path)
    if not (path / META).is_file() and not is_empty(path, but_for=KNOWN):
        raise AstraError(f"{path}: is not empty and not a checkpoint: choose another output folder")
    check_labels(checkpoint.labels, checkpoint.config, path)
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        with writing(path), alone(path / LOCK, waiting(path)) as locked:
            _save(path, checkpoint, cut(checkpoint.model) if parts is None else parts, locked)
    except Exception:
        with contextlib.suppress(OSError):  # where something else is there by now
            for folder in made:
                folder.rmdir()
        raise


def _save(path: Path, checkpoint: Checkpoint, parts: Iterable[Part], locked: bool) -> None:
    before, there = _in_use(path), _folders(path)
    if locked and before is not None:
        _remove(path, there.keys() - before)  # what a killed save left
        for unfinished in {*path.glob(f".{META}.*")} - {path / LOCK}:
            unfinished.unlink(missing_ok=True)
    number = f"{1 + max(there.values(), default=0):04d}"
    weights, tokenizer = f"{WEIGHTS}{number}", f"{TOKENIZER}{number}"
    try:
        (path / weights).mkdir()
        written = {"weights": weights, "parts": write_parts(path / weights, parts), "tokenizer": None, "files": {}}
        if checkpoint.tokenizer_files is not None:
            written |= {"tokenizer": tokenizer, "files": _copy_tokenizer(checkpoint, path / tokenizer)}
        write_atomically(path / META, json.dumps(describe(checkpoint, written), indent=2) + "\n")
    except BaseException:
        # Ctrl-C may come when astra.json names the new folders already.
        _remove(path, {weights, tokenizer} - (_in_use(path) or set()))
        raise
    _remove(path, (there.keys() if before is None else before) - {weights, tokenizer})


def load(
    path: Path | str,
    dtype: Any = jnp.float32,
    *,
    param_dtype: Any = jnp.float32,
    shardings: Callable[[Any], Any] | None = None,
    groups: int | None = None,
    verify: bool = True,
) -> Checkpoint:
    """Reads a checkpoint folder.

    Args:
      path: the folder.
      dtype: what the model computes in.
      param_dtype: what parameters are cast to; None leaves them as they are stored: a converted model's as they were
        in its files, a trained model's in float32. Codebooks and statistics are float32 whatever it is.
      shardings: from the abstract model to where its arrays go, such as
        `lambda model: astra_jax.serving.compile.shardings(model, mesh)`; None for the first local device.
      groups: how many groups of a `nested-pq` codec to load, the first of them; None for all.
      verify: whether the parts' SHA-256 are compared with those that were written. Without, a part that was damaged
        since is found only where its files have another length or shape.

    Raises:
      AstraError: the folder is missing, something else, damaged, or written by a newer version; or its codec has not so
        many groups, or only all or none.
    """
    meta, stored = read_description(Path(path))
    model = build(meta.family, meta.config, meta.astra, dtype)
    parts = read_parts(stored if verify else stored._replace(parts=None), model)
    if groups is not None:
        if meta.astra is None or not meta.astra.nested:
            raise AstraError(
                f"{path}: has no codes of which the first {groups} groups would do: run `astra calibrate --codec "
                "nested-pq` first"
            )
        meta = dataclasses.replace(meta, astra=meta.astra.with_groups(groups))
        model = build(meta.family, meta.config, meta.astra, dtype)
        parts = first_groups(parts, model)
    try:
        if meta.tokenizer_files is not None:
            _check_tokenizer(meta.tokenizer_files, stored.files)
        return dataclasses.replace(meta, model=assemble(model, parts, param_dtype, shardings and shardings(model)))
    except AstraError:
        if stored.weights.name not in (_in_use(Path(path)) or {stored.weights.name}):
            raise AstraError(f"{path}: was saved over while it was read: repeat the command") from None
        raise


def _check_tokenizer(folder: Path, expected: Mapping[str, str]) -> None:
    """Raises AstraError where the files of a tokenizer are not as they were written."""
    if not folder.is_dir():
        raise AstraError(f"{folder}: the tokenizer is missing: copy the whole checkpoint folder, or make it again")
    found = _digests(folder)
    if differ := sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name)):
        raise AstraError(f"{folder / differ[0]}: {DAMAGED}")


def read_meta(path: Path | str) -> Checkpoint:
    """Like `load`, without the weights: `model` is None."""
    return read_description(Path(path))[0]


def files(path: Path | str) -> dict[str, Path]:
    """All files of a checkpoint, by their names below its folder: what another folder needs to be the same checkpoint.

    Raises:
      AstraError: the folder is missing, something else, damaged, or written by a newer version.
    """
    folder = Path(path)
    meta, stored = read_description(folder)
    parts = [found for found in (stored.weights, meta.tokenizer_files) if found is not None]
    found = [folder / META, *sorted(file for part in parts for file in part.rglob("*") if file.is_file())]
    return {file.relative_to(folder).as_posix(): file for file in found}


def with_codebooks(checkpoint: Checkpoint, astra: AstraConfig, dtype: Any = jnp.float32) -> Checkpoint:
    """The same weights in a model that has codebooks for `astra` and computes in `dtype`.

    The codebooks are zero: `astra calibrate` fills them. Those that the checkpoint had are left behind.

    Raises:
      AstraError: `astra` does not fit the model.
    """
    model = build(checkpoint.family, checkpoint.config, astra, dtype)
    parameters = flat_state(checkpoint.model, nnx.Param)
    flat = {
        # Zeros of numpy, because those of jax are a program to compile for every shape.
        path: parameters[path] if path in parameters else jnp.asarray(np.zeros(empty.shape, empty.dtype))
        for path, empty in flat_state(model).items()
    }
    return dataclasses.replace(checkpoint, astra=astra, model=with_state(model, flat))


def _folders(path: Path) -> dict[str, int]:
    """Names of the folders of all saves, and their numbers."""
    found = {entry.name: OURS.fullmatch(entry.name) for entry in path.iterdir()}
    return {name: int(match[1]) for name, match in found.items() if match}


def _in_use(path: Path) -> set[str] | None:
    """Names of the folders that astra.json names; None where it cannot be read."""
    if not (path / META).exists():
        return set()
    try:
        meta = read_json(path / META)
    except AstraError:
        return None
    return {str(meta.get("weights")), str(meta.get("tokenizer"))}


def _remove(path: Path, names: Iterable[str]) -> None:
    for name in names:
        shutil.rmtree(path / name, ignore_errors=True)


def _copy_tokenizer(checkpoint: Checkpoint, folder: Path) -> dict[str, str]:
    """Copies the files of a tokenizer, and returns their digests."""
    folder.mkdir()
    assert checkpoint.tokenizer_files is not None
    copy_companions(checkpoint.tokenizer_files, folder)
    if not any(folder.iterdir()):
        raise AstraError(f"{checkpoint.tokenizer_files}: the tokenizer is gone: was the checkpoint saved over?")
    if checkpoint.hf_config:  # some tokenizers do not say themselves of what kind they are
        write_atomically(folder / "config.json", json.dumps(checkpoint.hf_config, indent=2) + "\n")
    return _digests(folder)


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files in a folder, by name."""
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not is_foreign(file)
    }
