"""The checkpoint folder: everything about a model, in a folder that needs no other.

    OUT/astra.json     what the model is: its configuration, codebooks' configuration, labels, image preprocessing,
                       the Hugging Face config.json it came from, how it was made, and which weights folder counts
    OUT/weights-0001/  its parameters, codebooks and statistics: an Orbax checkpoint for every part of the model, such
                       as `embed` and `block-0000`, so that no more than one has to be in memory at a time
    OUT/tokenizer/     the files of its tokenizer, if it reads text

Saving over a checkpoint leaves the old one good until the new one is complete: the weights are written under a
temporary name and renamed, astra.json is replaced at once, and only then the old weights are removed. Whatever else is
in the folder (the state and log of a training run) is left alone.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from astra_jax.config import AstraConfig, from_dict
from astra_jax.errors import AstraError
from astra_jax.files import write_atomically, writing
from astra_jax.preprocess import ImageProcessor
from astra_jax.tokenizer import FILES, Tokenizer
from checkpoints.files import copy_files, is_empty, is_plain_name, quiet, read_json
from checkpoints.keys import FAMILIES, build, config_class, flat_state, with_state
from checkpoints.parts import Part, assemble, cut, outline

FORMAT = 2  # 1 had the weights in one Orbax checkpoint, blocks stacked
META = "astra.json"
WEIGHTS = "weights-"
UNFINISHED = ".weights-"
TOKENIZER = "tokenizer"
CODEC = "blocks.attention.codec."
# What may be in the folder before the first save: a training run's state and log, and what a killed save left.
KNOWN = (f"{WEIGHTS}*", f"{UNFINISHED}*", f".{META}.*", TOKENIZER, "train", "train.jsonl")


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
      dtype: of the weights in a Hugging Face export: float32, float16 or bfloat16.
      history: what was done to the model, oldest first.
      model: the Flax module; abstract, or None, where only the description was read.
      generation: how text is generated: the content of a generation_config.json.
      tokenizer_files: a folder that holds the files of the model's tokenizer, among others.
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
    generation: dict[str, Any] | None = None
    tokenizer_files: Path | None = None

    @property
    def processor(self) -> ImageProcessor:
        """What turns pictures into the model's input. Raises AstraError if the checkpoint does not say."""
        if self.preprocessing is None:
            raise AstraError(
                "the checkpoint has no image preprocessing: put a preprocessor_config.json beside the model's "
                "config.json and convert it again"
            )
        return ImageProcessor.from_hf(self.preprocessing)

    @property
    def tokenizer(self) -> Tokenizer:
        """What turns text into the model's input and back. Raises AstraError if the checkpoint has none."""
        if self.tokenizer_files is None:
            raise AstraError(
                "the checkpoint has no tokenizer: put the model's tokenizer.json (or vocab.json and merges.txt, or "
                "vocab.txt) beside its config.json and convert it again"
            )
        return Tokenizer(self.tokenizer_files, self.config.vocab_size)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        ids = (self.generation or {}).get("eos_token_id")
        ids = self.hf_config.get("eos_token_id") if ids is None else ids
        return tuple(id for id in (ids if isinstance(ids, list) else [ids]) if isinstance(id, int))


def save(path: Path | str, checkpoint: Checkpoint, parts: Iterable[Part] | None = None) -> None:
    """Writes a checkpoint folder, whole or not at all; see the module's docstring.

    Args:
      path: the folder.
      checkpoint: what to write; its model may be abstract if there are `parts`.
      parts: the weights, if they are not those of the model. What they raise leaves nothing behind.

    Raises:
      AstraError: `path` is something else than a checkpoint, or the disk is full or not writable.
    """
    path = Path(path)
    first = not (path / META).is_file()
    if first and not is_empty(path, but_for=KNOWN):
        raise AstraError(f"{path}: is not empty and not a checkpoint: choose another output folder")
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        name = f"{WEIGHTS}{1 + max(map(_number, path.glob(f'{WEIGHTS}*')), default=0):04d}"
        temporary = path / f"{UNFINISHED}{name.removeprefix(WEIGHTS)}"
        _remove_weights(path, UNFINISHED)  # what a killed save left
        try:
            temporary.mkdir()
            _write_parts(temporary, cut(checkpoint.model) if parts is None else parts)
            if checkpoint.tokenizer_files is not None:
                _copy_tokenizer(checkpoint, path / TOKENIZER)
            temporary.rename(path / name)
            write_atomically(path / META, json.dumps(_meta(checkpoint, name), indent=2) + "\n")
        except Exception:
            # Not on Ctrl-C: astra.json may name the new weights already. The next save removes what is not in use.
            _remove_weights(path, UNFINISHED, name)
            if first:
                shutil.rmtree(path / TOKENIZER, ignore_errors=True)
            for folder in made:
                folder.rmdir()
            raise
    _remove_weights(path, WEIGHTS, but_for=name)
    if checkpoint.tokenizer_files is None:
        shutil.rmtree(path / TOKENIZER, ignore_errors=True)


def load(
    path: Path | str,
    dtype: Any = jnp.float32,
    *,
    param_dtype: Any = jnp.float32,
    shardings: Callable[[Any], Any] | None = None,
    groups: int | None = None,
    coded_blocks: int | None = None,
) -> Checkpoint:
    """Reads a checkpoint folder.

    Args:
      path: the folder.
      dtype: what the model computes in.
      param_dtype: what parameters are cast to; None leaves them as they are stored: a converted model's as they were
        in its files, a trained model's in float32. Codebooks and statistics are float32 whatever it is.
      shardings: from the abstract model to where its arrays go, such as
        `lambda model: astra_jax.parallel.shardings(model, mesh)`; None for the first local device.
      groups: how many groups of a `nested-pq` or `rotated-pq` codec to load, the first of them; None for all.
      coded_blocks: how many blocks, the first ones, are to send codes (`AstraConfig.coded_blocks`); None for as many as
        the checkpoint was made for.

    Raises:
      AstraError: the folder is missing, something else, damaged, or written by a newer version; or its codec has not so
        many groups, or only all or none; or it has not so many blocks, or no predictor for those without codes.
    """
    meta, weights, version = _read(Path(path))
    model = build(meta.family, meta.config, meta.astra, dtype)
    parts = _read_parts(weights, model, version)
    if groups is not None:
        if meta.astra is None or not meta.astra.rotated:
            raise AstraError(
                f"{path}: has no codes of which the first {groups} groups would do: run `astra calibrate --codec "
                "nested-pq` first"
            )
        meta = dataclasses.replace(meta, astra=meta.astra.with_groups(groups))
        model = build(meta.family, meta.config, meta.astra, dtype)
        parts = _first_groups(parts, model)
    if coded_blocks is not None:
        L = meta.config.num_hidden_layers
        if meta.astra is None or meta.astra.predictor == "none":
            raise AstraError(
                f"{path}: has no predictor, which blocks without codes go by: run `astra calibrate --predictor mlp` "
                "first"
            )
        if not 1 <= coded_blocks <= L:
            raise AstraError(f"--coded-blocks is {coded_blocks}; {path} has {L} blocks: give from 1 to {L}")
        meta = dataclasses.replace(meta, astra=dataclasses.replace(meta.astra, coded_blocks=coded_blocks))
        model = build(meta.family, meta.config, meta.astra, dtype)
    return dataclasses.replace(meta, model=assemble(model, parts, param_dtype, shardings and shardings(model)))


def _first_groups(parts: Iterable[Part], model: Any) -> Iterator[Part]:
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
        # Zeros of numpy, because those of jax are a program to compile for every shape.
        path: parameters[path] if path in parameters else jnp.asarray(np.zeros(empty.shape, empty.dtype))
        for path, empty in flat_state(model).items()
    }
    return dataclasses.replace(checkpoint, astra=astra, model=with_state(model, flat))


def _remove_weights(path: Path, *prefixes: str, but_for: str | None = None) -> None:
    for entry in path.iterdir():
        if entry.name.startswith(prefixes) and entry.name != but_for:
            shutil.rmtree(entry, ignore_errors=True)


def _copy_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    assert checkpoint.tokenizer_files is not None
    copy_files(checkpoint.tokenizer_files, folder, FILES)
    if checkpoint.hf_config:  # some tokenizers do not say themselves of what kind they are
        write_atomically(folder / "config.json", json.dumps(checkpoint.hf_config, indent=2) + "\n")


def _number(weights: Path) -> int:
    digits = weights.name.removeprefix(WEIGHTS)
    return int(digits) if digits.isdecimal() else 0


def _meta(checkpoint: Checkpoint, weights: str) -> dict[str, Any]:
    """The content of astra.json."""
    elsewhere = ("model", "tokenizer_files")
    fields = {f.name: getattr(checkpoint, f.name) for f in dataclasses.fields(checkpoint) if f.name not in elsewhere}
    config, astra = fields["config"], fields["astra"]
    fields |= {"config": dataclasses.asdict(config), "astra": dataclasses.asdict(astra) if astra else None}
    return {"format": FORMAT, **fields, "weights": weights}


def _read(path: Path) -> tuple[Checkpoint, Path, int]:
    """The description of a checkpoint, without model, its weights folder, and the format of that."""
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
    meta = {"generation": None, **meta}  # which is newer than the format
    _check_types(meta, where)
    if meta["family"] not in FAMILIES:
        raise AstraError(f"{where}: family is {meta['family']!r}; known are {', '.join(sorted(FAMILIES))}")
    labels, astra = meta["labels"], meta["astra"]
    try:
        meta |= {
            "config": _config(config_class(meta["family"]), meta["config"], str(where)),
            "astra": from_dict(AstraConfig, astra, str(where)) if astra is not None else None,
            "labels": tuple(labels) if labels is not None else None,
            "history": tuple(meta["history"]),
        }
    except TypeError as error:  # text where the configuration compares numbers
        raise AstraError(
            f"{where}: a value has the wrong type ({str(error).splitlines()[0]}): is the file damaged?"
        ) from error
    has_tokenizer = any((path / TOKENIZER / name).is_file() for name in FILES)
    meta |= {"model": None, "tokenizer_files": path / TOKENIZER if has_tokenizer else None}
    return from_dict(Checkpoint, meta, str(where)), path / weights, version


def _config(cls: type, values: dict[str, Any], where: str) -> Any:
    """A configuration, and those that are nested in it, from parsed JSON."""
    fields: Any = dataclasses.fields(cls)
    nested: Any = {f.name: f.type for f in fields if dataclasses.is_dataclass(f.type) and f.name in values}
    return from_dict(cls, values | {name: from_dict(kind, values[name], where) for name, kind in nested.items()}, where)


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
        "generation": dict | None,
    }
    wrong = sorted(name for name, kind in expected.items() if name not in meta or not isinstance(meta[name], kind))
    if wrong:
        raise AstraError(f"{where}: {', '.join(wrong)} is missing or of the wrong type: is the file damaged?")


def _write_parts(folder: Path, parts: Iterable[Part]) -> None:
    import orbax.checkpoint as ocp

    with quiet():
        # A file per array, written from where it is in memory: a copy, or a compressed one, would be there as a whole,
        # and weights hardly compress.
        handlers = ocp.type_handlers.create_type_handler_registry(
            (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False))
        )
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False, type_handler_registry=handlers)
        with ocp.Checkpointer(handler) as checkpointer:
            for name, arrays in parts:
                checkpointer.save((folder / name).absolute(), arrays)
                del arrays  # or this part is still there while the next one is read


def _read_parts(folder: Path, model: Any, version: int) -> Iterator[Part]:
    """Reads a weights folder part by part into arrays of exactly the paths and shapes of an abstract model."""
    if not folder.is_dir():
        raise AstraError(f"{folder}: the weights are missing: copy the whole checkpoint folder, or make it again")
    if version == 1:
        yield "", _read_part(folder, flat_state(model))
        return
    expected = outline(model)
    _check_same(folder, dict.fromkeys(expected, ()), {part.name: () for part in folder.iterdir()})
    for name, shapes in expected.items():
        yield name, _read_part(folder / name, shapes)


def _read_part(folder: Path, expected: Mapping[str, Any]) -> dict[str, np.ndarray]:
    import orbax.checkpoint as ocp

    try:
        with quiet(), ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(folder.absolute()).item_metadata.tree
            found = traverse_util.flatten_dict(tree, sep=".")
            _check_same(folder, *({path: tuple(a.shape) for path, a in arrays.items()} for arrays in (expected, found)))
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            arrays = checkpointer.restore(folder.absolute(), restore_args=as_numpy)
            return traverse_util.flatten_dict(arrays, sep=".")
    except AstraError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds, and all mean the same to the reader
        reason = str(error).strip().split("\n")[0][:120]
        raise AstraError(
            f"{folder}: the weights cannot be read ({type(error).__name__}: {reason}): the folder is damaged or "
            "incomplete: copy it again, or make it again"
        ) from error


def _check_same(folder: Path, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    differ = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    if differ:
        raise AstraError(
            f"{folder}: {len(differ)} weights do not fit {META}, such as {differ[0]}: are they of another model?"
        )
