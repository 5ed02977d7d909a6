"""A model in parts: what stands outside the blocks, module by module, and then one block after the other.

Weights are read, written and converted part by part, so that no more than one part of a model is in memory twice.
"""

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jaxtyping import Array

from astra_jax.mesh.sharding import put
from checkpoints.tensor_maps import flat_state, with_state

# Name of a part, and its arrays by their paths in the model; those of one block lack the leading axis L.
Part = tuple[str, dict[str, np.ndarray]]

BLOCKS = "blocks."
BLOCK = "block-"


def part_name(path: str, block: int | None = None) -> str:
    """The part that a parameter belongs to: its block, or the module at the top that it is in."""
    return path.split(".")[0] if block is None else f"{BLOCK}{block:04d}"


def outline(model: Any) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """The parts of a model, which may be abstract: name -> path -> shape and dtype."""
    parts: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
    for path, a in flat_state(model).items():
        stacked = path.startswith(BLOCKS)
        shape = jax.ShapeDtypeStruct(a.shape[1:] if stacked else a.shape, a.dtype)
        for block in range(a.shape[0]) if stacked else (None,):
            parts.setdefault(part_name(path, block), {})[path] = shape
    return dict(sorted(parts.items()))


def cut(model: Any) -> Iterator[Part]:
    """The parts of a model, in main memory one at a time (on a CPU nothing is copied but one block)."""
    flat = flat_state(model)
    blocks = {path: a for path, a in flat.items() if path.startswith(BLOCKS)}
    for name, shapes in outline(model).items():
        if name.startswith(BLOCK):
            yield name, jax.tree.map(np.asarray, _take(blocks, int(name.removeprefix(BLOCK))))
        else:
            yield name, {path: np.asarray(flat[path]) for path in shapes}


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 in hexadecimal of a part's arrays: of their names, dtypes, shapes and bytes."""

    def one(path: str) -> bytes:
        a = arrays[path]
        found = hashlib.sha256(f"{path}\0{a.dtype}\0{a.shape}\0".encode())
        found.update(np.ascontiguousarray(a).reshape(-1).view(np.uint8).data)
        return found.digest()

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # which hashing needs no lock of Python for
        return hashlib.sha256(b"".join(pool.map(one, sorted(arrays)))).hexdigest()


def assemble(model: Any, parts: Iterable[Part], param_dtype: Any = None, shardings: Any = None) -> Any:
    """The inverse of `cut`: puts every part straight onto its devices.

    Args:
      model: an abstract model.
      parts: all of its parts; blocks may also come stacked, as arrays of a part that is no block.
      param_dtype: what parameters are cast to; None leaves them as they are. Codebooks and statistics are float32.
      shardings: where every array goes, a state as the model's own; None for the first local device.
    """
    shapes, parameters = flat_state(model), flat_state(model, nnx.Param)
    if shardings is None:
        where = dict.fromkeys(shapes, jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    else:
        where = traverse_util.flatten_dict(nnx.to_pure_dict(shardings), sep=".")

    def dtype(path: str, a: np.ndarray) -> Any:
        return (param_dtype or a.dtype) if path in parameters else shapes[path].dtype

    flat: dict[str, Array] = {}
    stack: dict[str, Any] = {}
    whole = all(map(_is_main_memory, where.values()))
    for name, arrays in parts:
        block = int(name.removeprefix(BLOCK)) if name.startswith(BLOCK) else None
        if block is None:
            flat |= {p: put(a.astype(dtype(p, a), copy=False), where[p]) for p, a in arrays.items()}
        elif whole:
            if not stack:
                stack = {p: _aligned(shapes[p].shape, dtype(p, a)) for p, a in arrays.items()}
            for path, a in arrays.items():
                stack[path][block] = a
        else:
            if not stack:
                stack = {p: jnp.zeros(shapes[p].shape, dtype(p, a), device=where[p]) for p, a in arrays.items()}
                put_block = jax.jit(_put, donate_argnums=0, out_shardings={p: where[p] for p in stack})  # in place
            # Waited for, or blocks are read faster than they are put in place and pile up.
            stack = jax.block_until_ready(put_block(stack, arrays, block))
        del arrays  # or this part is still there while the next one is read
    return with_state(model, flat | {p: put(a, where[p]) for p, a in stack.items()})


def _is_main_memory(sharding: Any) -> bool:
    """Whether the devices of a sharding are CPUs that all have the whole array."""
    return sharding.is_fully_replicated and all(device.platform == "cpu" for device in sharding.device_set)


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that the CPU devices of a process use as it is, all of them the same one: no copy is made of what begins
    at a multiple of 64 bytes."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(dtype).reshape(shape)


@jax.jit
def _take(stack: dict[str, Array], block: Any) -> dict[str, Array]:
    return {path: jax.lax.dynamic_index_in_dim(a, block, keepdims=False) for path, a in stack.items()}


def _put(stack: dict[str, Array], arrays: dict[str, Array], block: Any) -> dict[str, Array]:
    return {p: jax.lax.dynamic_update_index_in_dim(a, arrays[p].astype(a.dtype), block, 0) for p, a in stack.items()}
