"""The checkpoint folder: everything about a model, in a folder that needs no other.

    OUT/astra.json     what the model is: its configuration, codebooks' configuration, labels, image preprocessing,
                       the Hugging Face config.json it came from, how it was made, and which weights folder counts
    OUT/weights-0001/  its parameters, codebooks and statistics, written by Orbax

Saving over a checkpoint leaves the old one good until the new one is complete: the weights are written under a
temporary name and renamed, astra.json is replaced at once, and only then the old weights are removed. Whatever else is
in the folder (the state and log of a training run) is left alone.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from astra_jax.config import AstraConfig, from_dict
from astra_jax.console import write_atomically
from astra_jax.errors import AstraError
from astra_jax.preprocess import ImageProcessor
from checkpoints.files import is_empty, is_plain_name, quiet, read_json, writing
from checkpoints.keys import FAMILIES, build, config_class, flat_state, with_state

FORMAT = 1
META = "astra.json"
WEIGHTS = "weights-"
UNFINISHED = ".weights-"
# What may be in the folder before the first save: a training run's state and log, and what a killed save left.
KNOWN = (WEIGHTS, UNFINISHED, f".{META}.", "train")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model and everything that is known about it.

    Attributes:
      family: a key of `checkpoints.keys.FAMILIES`.
      config: the family's configuration, such as `ViTConfig`.
      astra: how it is compressed; None for a model without codebooks.
      labels: names of the classes, where there are any.
      preprocessing: how images become inputs: the content of a preprocessor_config.json.
      hf_config: the config.json that the model came from; empty if it came from none.
      dtype: of the weights in a Hugging Face export: float32, float16 or bfloat16. In memory they are float32.
      history: what was done to the model, oldest first.
      model: the Flax module; None where only the description was read.
    """

    family: str
    config: Any
    astra: AstraConfig | None
    labels: tuple[str, ...] | None
    preprocessing: dict[str, Any] | None
    hf_config: dict[str, Any]
    dtype: str
    history: tuple[dict[str, Any], ...]
    model: Any

    @property
    def processor(self) -> ImageProcessor:
        """What turns pictures into the model's input. Raises AstraError if the checkpoint does not say."""
        if self.preprocessing is None:
            raise AstraError(
                "the checkpoint has no image preprocessing: put a preprocessor_config.json beside the model's "
                "config.json and convert it again"
            )
        return ImageProcessor.from_hf(self.preprocessing)


def save(path: Path | str, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint folder, whole or not at all; see the module's docstring.

    Raises:
      AstraError: `path` is something else than a checkpoint, or the disk is full or not writable.
    """
    import orbax.checkpoint as ocp

    path = Path(path)
    if not (path / META).is_file() and not is_empty(path, but_for=KNOWN):
        raise AstraError(f"{path}: is not empty and not a checkpoint: choose another output folder")
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        name = f"{WEIGHTS}{1 + max(map(_number, path.glob(f'{WEIGHTS}*')), default=0):04d}"
        temporary = path / f"{UNFINISHED}{name.removeprefix(WEIGHTS)}"
        _remove_weights(path, UNFINISHED)  # what a killed save left
        try:
            with quiet(), ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(temporary.absolute(), nnx.to_pure_dict(nnx.state(checkpoint.model)))
                checkpointer.wait_until_finished()
            temporary.rename(path / name)
            write_atomically(path / META, json.dumps(_meta(checkpoint, name), indent=2) + "\n")
        except Exception:
            # Not on Ctrl-C: astra.json may name the new weights already. The next save removes what is not in use.
            _remove_weights(path, UNFINISHED, name)
            raise
    _remove_weights(path, WEIGHTS, but_for=name)


def load(path: Path | str, dtype: Any = jnp.float32) -> Checkpoint:
    """Reads a checkpoint folder.

    Args:
      path: the folder.
      dtype: what the model computes in. Parameters are float32 whatever it is.

    Raises:
      AstraError: the folder is missing, something else, damaged, or written by a newer version.
    """
    path = Path(path)
    meta, weights = _read(path)
    model = build(meta.family, meta.config, meta.astra, dtype)
    return dataclasses.replace(meta, model=with_state(model, _read_weights(weights, flat_state(model))))


def read_meta(path: Path | str) -> Checkpoint:
    """Like `load`, without the weights: `model` is None."""
    return _read(Path(path))[0]


def with_codebooks(checkpoint: Checkpoint, astra: AstraConfig, dtype: Any = jnp.float32) -> Checkpoint:
    """The same weights in a model that has codebooks for `astra` and computes in `dtype`.

    The codebooks are zero: `astra calibrate` fills them. Those that the checkpoint had are left behind.

    Raises:
      AstraError: `astra` does not fit the model.
    """
    model = build(checkpoint.family, checkpoint.config, astra, dtype)
    parameters = flat_state(checkpoint.model, nnx.Param)
    flat = {
        path: parameters[path] if path in parameters else jnp.zeros(empty.shape, empty.dtype)
        for path, empty in flat_state(model).items()
    }
    return dataclasses.replace(checkpoint, astra=astra, model=with_state(model, flat))


def _remove_weights(path: Path, *prefixes: str, but_for: str | None = None) -> None:
    for entry in path.iterdir():
        if entry.name.startswith(prefixes) and entry.name != but_for:
            shutil.rmtree(entry, ignore_errors=True)


def _number(weights: Path) -> int:
    digits = weights.name.removeprefix(WEIGHTS)
    return int(digits) if digits.isdecimal() else 0


def _meta(checkpoint: Checkpoint, weights: str) -> dict[str, Any]:
    """The content of astra.json."""
    fields = {f.name: getattr(checkpoint, f.name) for f in dataclasses.fields(checkpoint) if f.name != "model"}
    config, astra = fields["config"], fields["astra"]
    fields |= {"config": dataclasses.asdict(config), "astra": dataclasses.asdict(astra) if astra else None}
    return {"format": FORMAT, **fields, "weights": weights}


def _read(path: Path) -> tuple[Checkpoint, Path]:
    """The description of a checkpoint, without model, and its weights folder."""
    if not path.exists():
        raise AstraError(f"{path}: there is no such checkpoint: `astra convert` makes one")
    if not (path / META).is_file():
        if (path / "config.json").is_file():
            raise AstraError(f"{path}: is a Hugging Face folder: run `astra convert {path} OUT` first and use OUT")
        raise AstraError(f"{path}: is not a checkpoint (it has no {META}): `astra convert` makes one")
    where, meta = path / META, read_json(path / META)
    version = meta.pop("format", None)
    if not isinstance(version, int):
        raise AstraError(f"{where}: has no format number: is the file damaged?")
    if version > FORMAT:
        raise AstraError(f"{where}: has format {version}; this version reads up to {FORMAT}: upgrade astra-jax")
    weights = meta.pop("weights", None)
    if not is_plain_name(weights) or not weights.startswith(WEIGHTS):
        raise AstraError(f"{where}: weights is {weights!r}; it must be the name of a {WEIGHTS}… folder beside it")
    _check_types(meta, where)
    if meta["family"] not in FAMILIES:
        raise AstraError(f"{where}: family is {meta['family']!r}; known are {', '.join(sorted(FAMILIES))}")
    labels, astra = meta["labels"], meta["astra"]
    try:
        meta |= {
            "config": from_dict(config_class(meta["family"]), meta["config"], str(where)),
            "astra": from_dict(AstraConfig, astra, str(where)) if astra is not None else None,
            "labels": tuple(labels) if labels is not None else None,
            "history": tuple(meta["history"]),
        }
    except TypeError as error:  # text where the configuration compares numbers
        raise AstraError(
            f"{where}: a value has the wrong type ({str(error).splitlines()[0]}): is the file damaged?"
        ) from error
    return from_dict(Checkpoint, {**meta, "model": None}, str(where)), path / weights


def _check_types(meta: Mapping[str, Any], where: Path) -> None:
    """Raises AstraError where a field of astra.json is missing or has another type than it is written with."""
    expected = {
        "family": str,
        "config": dict,
        "astra": dict | None,
        "labels": list | None,
        "preprocessing": dict | None,
        "hf_config": dict,
        "dtype": str,
        "history": list,
    }
    wrong = sorted(name for name, kind in expected.items() if name not in meta or not isinstance(meta[name], kind))
    if wrong:
        raise AstraError(f"{where}: {', '.join(wrong)} is missing or of the wrong type: is the file damaged?")


def _read_weights(folder: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the weights folder into arrays of exactly the expected paths and shapes, on the first local device."""
    import orbax.checkpoint as ocp

    if not folder.is_dir():
        raise AstraError(f"{folder}: the weights are missing: copy the whole checkpoint folder, or make it again")
    # Named explicitly: a checkpoint may have been written on other devices than there are here.
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = {path: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here) for path, a in expected.items()}
    try:
        with quiet(), ocp.StandardCheckpointer() as checkpointer:
            found = traverse_util.flatten_dict(checkpointer.metadata(folder.absolute()).item_metadata.tree, sep=".")
            differ = sorted(
                path
                for path in {*found, *target}
                if path not in found or path not in target or tuple(found[path].shape) != target[path].shape
            )
            if differ:
                raise AstraError(
                    f"{folder}: {len(differ)} weights do not fit {META}, such as {differ[0]}: "
                    "are they of another model?"
                )
            restored = checkpointer.restore(folder.absolute(), traverse_util.unflatten_dict(target, sep="."))
            return traverse_util.flatten_dict(restored, sep=".")
    except AstraError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds, and all mean the same to the reader
        reason = str(error).strip().split("\n")[0][:120]
        raise AstraError(
            f"{folder}: the weights cannot be read ({type(error).__name__}: {reason}): the folder is damaged or "
            "incomplete: copy it again, or make it again"
        ) from error
