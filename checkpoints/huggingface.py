"""Hugging Face folders: a strict reader and an exact writer.

Only safetensors files are read and no code of a repository is ever run. Names in a folder's files are untrusted.
"""

import contextlib
import dataclasses
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from astra_jax.config import from_dict
from astra_jax.console import write_atomically
from astra_jax.errors import AstraError
from checkpoints.files import is_disk_full, is_empty, is_plain_name, read_json, writing
from checkpoints.keys import FAMILIES, Key, build, config_class, flat_state, model_keys, with_state
from checkpoints.store import META, Checkpoint

# safetensors' names of the dtypes that float32 holds exactly, so that an export gives back every bit.
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
CONFIG, PREPROCESSING = "config.json", "preprocessor_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# In the metadata of an exported model.safetensors: the mark of a folder that may be overwritten.
MARK = {"format": "pt", "written_by": "astra-jax"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

Progress = Callable[[str, int], AbstractContextManager[Callable[..., None]]]


@contextlib.contextmanager
def silent(label: str, total: int) -> Iterator[Callable[..., None]]:
    """Stands in for `astra_jax.console.progress` where nothing should be printed."""
    yield lambda n=1: None


def read(source: str, progress: Progress = silent) -> Checkpoint:
    """Reads a Hugging Face folder, or a hub id `org/name`, which is downloaded first.

    Args:
      source: folder or hub id.
      progress: what shows that tensors are being read.

    Raises:
      AstraError: the source is missing, not understood, or does not fit its own config.json. All faults of all
        weights are in one message.
    """
    folder = find(source)
    hf_config = read_json(folder / CONFIG)
    family = family_of(hf_config, folder)
    config, labels = config_from_hf(family, hf_config, folder)
    model = build(family, config)
    weights, dtype = read_weights(folder, model_keys(family, model), FAMILIES[family].sizes(config), model, progress)
    preprocessing = folder / PREPROCESSING
    return Checkpoint(
        family=family,
        config=config,
        astra=None,
        labels=labels,
        preprocessing=read_json(preprocessing) if preprocessing.is_file() else None,
        hf_config=hf_config,
        dtype=dtype,
        history=({"verb": "convert", "source": source},),
        model=with_state(model, weights),
    )


def find(source: str) -> Path:
    """The folder that `source` names: itself, or a download of the hub repository of that name."""
    folder = Path(source)
    if (folder / META).is_file():
        raise AstraError(f"{source}: is a checkpoint of astra already: use it as it is")
    if folder.is_dir():
        return folder
    if folder.exists():
        raise AstraError(f"{source}: is a file; give the folder that holds it")
    if not HUB_ID.fullmatch(source):
        raise AstraError(f"{source}: there is no such folder, and a hub id looks like org/name")
    return _download(source)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.txt"]))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise AstraError(
            f"{hub_id}: there is no such folder, and no such repository on the Hugging Face hub that you may read: "
            "check the name, or log in with `hf auth login`"
        ) from error
    except Exception as error:  # which kinds a network has depends on the version of the hub's client
        if is_disk_full(error):
            raise AstraError(f"{hub_id}: the disk is full: free some space and repeat the command") from error
        reason = str(error).strip().split("\n")[0][:160]
        raise AstraError(
            f"{hub_id}: there is no such folder, and the download from the Hugging Face hub failed "
            f"({type(error).__name__}: {reason}): check the network and repeat the command, which resumes the download"
        ) from error


def family_of(hf_config: Mapping[str, Any], folder: Path) -> str:
    """The family of a config.json: by `architectures`, or by `model_type` where there are none."""
    known = {family.architecture: name for name, family in FAMILIES.items()}
    architectures = hf_config.get("architectures")
    if not architectures and hf_config.get("model_type") in FAMILIES:
        return hf_config["model_type"]
    for architecture in architectures if isinstance(architectures, list) else ():
        if isinstance(architecture, str) and architecture in known:
            return known[architecture]
    found = architectures or hf_config.get("model_type")
    raise AstraError(f"{folder / CONFIG}: architecture {found!r} is not known; known are {', '.join(sorted(known))}")


def config_from_hf(family: str, hf_config: Mapping[str, Any], folder: Path) -> tuple[Any, tuple[str, ...] | None]:
    """The family's configuration and the class names from a config.json.

    Our configurations have Hugging Face's names and defaults (a test compares them), so a missing key gets its default.

    Raises:
      AstraError: a value has the wrong type or is not supported.
    """
    where = folder / CONFIG
    labels = _labels(hf_config, where)
    # Hugging Face's default is two labels, whatever the model.
    values = {"num_labels": hf_config.get("num_labels", 2) if labels is None else len(labels)}
    for field in dataclasses.fields(config_class(family)):
        value = values.setdefault(field.name, hf_config.get(field.name, field.default))
        if field.name in ("image_size", "patch_size"):
            value = _square(field.name, value, where)
        if not isinstance(value, (int, float) if type(field.default) is float else type(field.default)):
            raise AstraError(f"{where}: {field.name} is {value!r}; it must be of type {type(field.default).__name__}")
        values[field.name] = value
    return from_dict(config_class(family), values, str(where)), labels


def _square(name: str, value: Any, where: Path) -> Any:
    """A size, which Hugging Face also writes as [height, width]."""
    if not isinstance(value, list):
        return value
    if len(value) != 2 or value[0] != value[1]:
        raise AstraError(f"{where}: {name} is {value}; only squares, as one number or [n, n], are supported")
    return value[0]


def _labels(hf_config: Mapping[str, Any], where: Path) -> tuple[str, ...] | None:
    id2label = hf_config.get("id2label")
    if id2label is None:
        return None
    if not isinstance(id2label, dict) or set(id2label) != {str(c) for c in range(len(id2label))}:
        raise AstraError(f"{where}: id2label must name the classes 0, 1, 2, ... without a gap")
    return tuple(str(id2label[str(c)]) for c in range(len(id2label)))


class _Tensor(NamedTuple):
    """A tensor of a checkpoint: its parameter, and its block (None where it is not one of many)."""

    key: Key
    block: int | None


def _expected(keys: Sequence[Key], L: int) -> dict[str, _Tensor]:
    """Every tensor that a model with L blocks needs, by name."""
    return {
        key.name.format(l=block): _Tensor(key, block if key.stacked else None)
        for key in keys
        for block in range(L if key.stacked else 1)
    }


def tensor_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a folder: the single one, or those that the index names.

    Raises:
      AstraError: there are none, or the index is damaged or names files elsewhere.
    """
    if (folder / WEIGHTS).is_file():
        return (folder / WEIGHTS,)
    if not (folder / INDEX).is_file():
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".h5", ".msgpack", ".pt", ".ckpt"))
        if others:
            raise AstraError(
                f"{folder}: has its weights only as {others[0]}, which is not read: re-save it as safetensors with "
                "`AutoModelForImageClassification.from_pretrained(...).save_pretrained(...)` of transformers"
            )
        raise AstraError(f"{folder}: has neither {WEIGHTS} nor {INDEX}")
    where, names = folder / INDEX, read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise AstraError(f"{where}: has no weight_map: is the file damaged?")
    outside = [name for name in names.values() if not is_plain_name(name) or not name.endswith(".safetensors")]
    if outside:
        raise AstraError(f"{where}: names {outside[0]!r}; it must be a .safetensors file in the same folder")
    files = tuple(folder / name for name in sorted(set(names.values())))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise AstraError(f"{folder}: {', '.join(missing)} is missing, which {INDEX} names: is the download complete?")
    return files


def read_weights(
    folder: Path, keys: Sequence[Key], sizes: Mapping[str, int], model: Any, progress: Progress = silent
) -> tuple[dict[str, Any], str]:
    """Reads a folder's tensors, one at a time, into arrays of the shapes of an abstract model.

    Args:
      folder: the Hugging Face folder.
      keys: rows of the key table that the model has.
      sizes: lengths of the axes in the table.
      model: the abstract model.
      progress: what shows that tensors are being read.

    Returns:
      path -> float32 array, and the dtype of the file (float32 where tensors differ).

    Raises:
      AstraError: tensors are unmapped (no row knows them), unexpected (a row does, but this model has no such
        parameter), duplicated, unfilled, of a wrong shape or dtype, or not finite: all of them in one message.
    """
    shapes = flat_state(model)
    L = next((shapes[key.path].shape[0] for key in keys if key.stacked), 0)
    expected = _expected(keys, L)
    faults: dict[str, list[str]] = defaultdict(list)
    arrays: dict[str, np.ndarray] = {}
    dtypes: set[str] = set()
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_open(path)) for path in tensor_files(folder)]
        count = Counter(name for file in files for name in file.keys())
        faults["duplicated"] = sorted(name for name, times in count.items() if times > 1)
        faults["unfilled"] = sorted(set(expected) - set(count))
        advance = stack.enter_context(progress("reading weights", count.total()))
        for file in files:
            for name in file.keys():
                advance()
                if name not in expected:
                    faults["unexpected" if _is_mapped(name) else "unmapped"].append(name)
                    continue
                key, block = expected[name]
                header = file.get_slice(name)
                shape, dtype = tuple(header.get_shape()), header.get_dtype()
                if shape != key.shape(sizes):
                    faults["wrong shape"].append(f"{name} {list(shape)} instead of {list(key.shape(sizes))}")
                if dtype not in DTYPES:
                    faults[f"dtype other than {', '.join(DTYPES.values())}"].append(f"{name} ({dtype})")
                    continue
                tensor = file.get_tensor(name).astype(np.float32)
                if not np.isfinite(tensor).all():
                    faults["NaN or infinite"].append(name)
                if shape == key.shape(sizes):
                    if key.path not in arrays:
                        arrays[key.path] = np.empty(shapes[key.path].shape, np.float32)
                    target = arrays[key.path] if block is None else arrays[key.path][block]
                    target[...] = key.to_ours(tensor, sizes, target.shape)
                    dtypes.add(DTYPES[dtype])
    _raise(folder, faults)
    # One at a time, so that no more than one parameter is held twice.
    weights = {path: jnp.asarray(arrays.pop(path)) for path in list(arrays)}
    return weights, dtypes.pop() if len(dtypes) == 1 else "float32"


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise AstraError(
            f"{path}: is truncated or not a safetensors file ({error}): download or copy it again"
        ) from error


def _is_mapped(name: str) -> bool:
    """Whether some row of some family's table is for this tensor."""
    patterns = (re.escape(key.name).replace(r"\{l\}", r"\d+") for f in FAMILIES.values() for key in f.keys)
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _raise(folder: Path, faults: Mapping[str, list[str]], most: int = 4) -> None:
    """Raises one AstraError with all faults, at most `most` names of each kind; nothing if there are none."""
    texts = []
    for kind, names in faults.items():
        if names:
            more = f" and {len(names) - most} more" if len(names) > most else ""
            texts.append(f"{len(names)} {kind}: {', '.join(names[:most])}{more}")
    if texts:
        raise AstraError(f"{folder}: the weights do not fit {CONFIG}: {'; '.join(texts)}: is the folder complete?")


def config_to_hf(checkpoint: Checkpoint, dtype: str) -> dict[str, Any]:
    """The config.json of an export: the original one, with what is different in this checkpoint."""
    family = FAMILIES[checkpoint.family]
    content = dict(checkpoint.hf_config) or {
        "architectures": [family.architecture],
        "model_type": checkpoint.family,
        "dtype": dtype,
    }
    config, labels = config_from_hf(checkpoint.family, content, Path())
    for name, value in dataclasses.asdict(checkpoint.config).items():
        if value != getattr(config, name) and name != "num_labels":
            content[name] = value
    if (config.num_labels, labels) != (checkpoint.config.num_labels, checkpoint.labels):
        names = checkpoint.labels or [f"LABEL_{c}" for c in range(checkpoint.config.num_labels)]
        content["id2label"] = {str(c): name for c, name in enumerate(names)}
        content["label2id"] = {name: c for c, name in enumerate(names)}
    # Older versions of transformers call it torch_dtype.
    return content | {name: dtype for name in ("dtype", "torch_dtype") if name in content}


def tensors_of(checkpoint: Checkpoint, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """Name and content of every tensor of an export. Raises AstraError where a weight does not fit into `dtype`."""
    state = flat_state(checkpoint.model)
    keys = model_keys(checkpoint.family, checkpoint.model)
    sizes = FAMILIES[checkpoint.family].sizes(checkpoint.config)
    arrays = {key.path: np.asarray(state[key.path]) for key in keys}
    L = next((arrays[key.path].shape[0] for key in keys if key.stacked), 0)
    for name, (key, block) in _expected(keys, L).items():
        ours = arrays[key.path] if block is None else arrays[key.path][block]
        with np.errstate(over="ignore"):  # reported below
            theirs = np.ascontiguousarray(key.to_theirs(ours, sizes).astype(jnp.dtype(dtype)))
        if not np.isfinite(theirs).all():
            raise AstraError(f"{name} has values that {dtype} cannot hold: export with --dtype float32")
        yield name, theirs


def is_export(folder: Path) -> bool:
    """Whether a folder was written by `write_folder`, and so may be overwritten."""
    try:
        with safe_open(folder / WEIGHTS, framework="numpy") as file:
            return (file.metadata() or {}).get("written_by") == MARK["written_by"]
    except (SafetensorError, OSError):
        return False


def write_folder(checkpoint: Checkpoint, out: Path | str, dtype: str | None = None) -> None:
    """Writes a checkpoint as a Hugging Face folder. Codebooks are left out: such a model has no place for them.

    Weights that were not trained are the original ones bit for bit.

    Args:
      checkpoint: what to write.
      out: the folder; it may be absent, empty, or an earlier export.
      dtype: of the weights: float32, float16 or bfloat16; None for that of the original.

    Raises:
      AstraError: `out` holds something else, the disk is full, or a weight does not fit into `dtype`.
    """
    out, dtype = Path(out), dtype or checkpoint.dtype
    if dtype not in DTYPES.values():
        raise AstraError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES.values())}")
    if not is_empty(out) and not is_export(out):
        raise AstraError(f"{out}: is not empty and no earlier export: choose another output folder")
    texts = {CONFIG: config_to_hf(checkpoint, dtype)}
    if checkpoint.preprocessing is not None:
        texts[PREPROCESSING] = checkpoint.preprocessing
    temporary = out / f".{WEIGHTS}.{os.getpid()}"
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        try:
            save_file(dict(tensors_of(checkpoint, dtype)), temporary, metadata=MARK)
            os.replace(temporary, out / WEIGHTS)
        finally:
            temporary.unlink(missing_ok=True)
        for name, content in texts.items():
            write_atomically(out / name, json.dumps(content, indent=2) + "\n")
