"""The weights folder of a checkpoint: an Orbax checkpoint for every part of a model, with a digest of each."""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from astra_jax.errors import AstraError
from astra_jax.files import in_utf8
from checkpoints.description import DAMAGED, META, Stored
from checkpoints.files import is_foreign, quiet
from checkpoints.streaming import Part, digest, outline

CODEC = "blocks.attention.codec."


def write_parts(folder: Path, parts: Iterable[Part]) -> dict[str, str]:
    """Writes a weights folder part by part, and returns the parts' digests."""
    import orbax.checkpoint as ocp

    digests: dict[str, str] = {}
    with quiet(), in_utf8(folder) as folder:
        # A file per array, written from where it is in memory: a copy, or a compressed one, would be there as a whole,
        # and weights hardly compress.
        handlers = ocp.type_handlers.create_type_handler_registry(
            (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False))
        )
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False, type_handler_registry=handlers)
        with ocp.Checkpointer(handler) as checkpointer:
            for name, arrays in parts:
                digests[name] = digest(arrays)
                checkpointer.save(folder / name, arrays)
                del arrays  # or this part is still there while the next one is read
    return digests


def read_parts(stored: Stored, model: Any) -> Iterator[Part]:
    """Reads a weights folder part by part into arrays of exactly the paths and shapes of an abstract model.

    Raises:
      AstraError: they are not those, or not as they were written.
    """
    folder, digests = stored.weights, stored.parts
    if not folder.is_dir():
        raise AstraError(f"{folder}: the weights are missing: copy the whole checkpoint folder, or make it again")
    expected = outline(model)
    _check_same(folder, dict.fromkeys(expected, ()), {p.name: () for p in folder.iterdir() if not is_foreign(p)})
    with ThreadPoolExecutor(1) as pool:
        checked: Future[None] | None = None
        for name, shapes in expected.items():
            arrays = _read_part(folder / name, shapes)
            if checked:
                checked.result()
            if digests is not None:  # while the next part is read, so that two of them are there
                checked = pool.submit(_check_part, folder / name, arrays, digests.get(name))
            yield name, arrays
            del arrays  # or this part is still there while the next one is read
        if checked:
            checked.result()


def _check_part(part: Path, arrays: Mapping[str, np.ndarray], expected: str | None) -> None:
    if digest(arrays) != expected:
        raise AstraError(f"{part}: {DAMAGED}")


def _read_part(folder: Path, expected: Mapping[str, Any]) -> dict[str, np.ndarray]:
    import orbax.checkpoint as ocp

    try:
        with in_utf8(folder) as where, quiet(), ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(where).item_metadata.tree
            found = traverse_util.flatten_dict(tree, sep=".")
            _check_same(folder, *({path: tuple(a.shape) for path, a in arrays.items()} for arrays in (expected, found)))
            for path, a in found.items():
                _check_chunks(folder, path, a)
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            arrays = checkpointer.restore(where, restore_args=as_numpy)
            return traverse_util.flatten_dict(arrays, sep=".")
    except AstraError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds, and all mean the same to the reader
        reason = str(error).strip().split("\n")[0][:120]
        raise AstraError(
            f"{folder}: the weights cannot be read ({type(error).__name__}: {reason}): the folder is damaged or "
            "incomplete: copy it again, or make it again"
        ) from error


def _check_chunks(folder: Path, path: str, a: Any) -> None:
    """Raises AstraError where the pieces in which an array is stored are larger than itself: TensorStore makes room for
    a whole piece, and ends the process where there is none."""
    pieces = a.storage and a.storage.chunk_shape
    if pieces and any(piece > max(1, size) for piece, size in zip(pieces, a.shape, strict=True)):
        raise AstraError(
            f"{folder}: {path} of shape {list(a.shape)} is stored in pieces of {list(pieces)}, which are larger: the "
            "folder is damaged: copy it again, or make it again"
        )


def _check_same(folder: Path, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    differ = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    if differ:
        raise AstraError(
            f"{folder}: {len(differ)} weights do not fit {META}, such as {differ[0]}: are they of another model?"
        )


def first_groups(parts: Iterable[Part], model: Any) -> Iterator[Part]:
    """Parts of a model with more groups, and wider ones, cut to the shapes of a model with fewer."""
    shapes = {path: a.shape for arrays in outline(model).values() for path, a in arrays.items()}

    def cut(path: str, arrays: dict[str, np.ndarray]) -> np.ndarray:
        a, shape = arrays[path], shapes[path]
        codebook = f"{path.rpartition('.')[0]}.codebook"
        if a.ndim == 1 and codebook in arrays:  # of all axes of a level in one
            (full, *_), (groups, _, d) = arrays[codebook].shape, shapes[codebook]
            return a.reshape(full, -1)[:groups, :d].reshape(-1)
        return a[tuple(map(slice, shape))]

    for name, arrays in parts:
        kept = {path: a for path, a in arrays.items() if path in shapes or not path.startswith(CODEC)}
        yield name, {path: cut(path, arrays) if path.startswith(CODEC) else a for path, a in kept.items()}
