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
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from astra_jax.codecs.config import AstraConfig, config_of, from_dict
from astra_jax.errors import AstraError
from astra_jax.files import in_utf8, write_atomically, writing
from astra_jax.inputs.images import ImageProcessor
from astra_jax.inputs.tokenizer import FILES, Tokenizer
from checkpoints.fields import eos_ids
from checkpoints.files import is_empty, is_foreign, quiet, read_json
from checkpoints.lock import alone, waiting
from checkpoints.problems import Problem, problem_of
from checkpoints.sentences import copy_companions
from checkpoints.streaming import Part, assemble, cut, digest, outline
from checkpoints.tensor_maps import FAMILIES, build, classifies, config_class, flat_state, with_state

# 2 had no checksums, and `tokenizer` without a number; 1 had the weights in one Orbax checkpoint, blocks stacked.
FORMAT = 3
META = "astra.json"
WEIGHTS = "weights-"
TOKENIZER = "tokenizer"
LOCK = f".{META}.lock"
# Folders of a save; with a dot those that earlier versions had not finished.
OURS = re.compile(rf"\.?{WEIGHTS}([0-9]+)|{TOKENIZER}(?:-([0-9]+))?")
DAMAGED = (
    "is not as it was written (its SHA-256 differs): the disk or a copy damaged it: copy it again, or make it again"
)
CODEC = "blocks.attention.codec."
EXPORTED = ("float32", "float16", "bfloat16")  # dtypes of the weights in a Hugging Face export
# What may be in the folder before the first save: a training run's state and log, and what a killed save left.
KNOWN = (f"{WEIGHTS}*", f".{WEIGHTS}*", f"{TOKENIZER}-*", f".{META}.*", TOKENIZER, "train", "train.jsonl", ".train.*")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model and everything that is known about it.

    Attributes:
      family: a key of `checkpoints.tensor_maps.FAMILIES`.
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
      digest: SHA-256 of the stored checkpoint that this was read from: the same of a copy, and another once anything of
        it is changed; None where it was read from none, or from one that an earlier version wrote.
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
    digest: str | None = dataclasses.field(default=None, compare=False)

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
        config = self.config
        # As in transformers, a decoder's classifier reads the last token that is no padding, whoever put that there.
        pads = config.task == "classification" and not hasattr(config, "pooling")
        return Tokenizer(
            self.tokenizer_files,
            config.vocab_size,
            lower=getattr(config, "do_lower_case", False),
            prompt=getattr(config, "prompt", ""),
            drop_end=self.hf_config.get("pad_token_id") if pads else None,
        )

    def problem(self, outputs: int) -> Problem:
        """What so many outputs of a classifier are. Raises AstraError if what config.json says of it does not fit."""
        return problem_of(self.hf_config, outputs)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end a text; transformers' -1, which no token has, is one that never comes.

        Raises:
          AstraError: what the configuration says is no number of a token, nor a list of them.
        """
        return eos_ids(self.generation, self.hf_config)


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
    _check_labels(checkpoint.labels, checkpoint.config, path)
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
    number = f"{1 + max((n for name, n in there.items() if name[0] != '.'), default=0):04d}"
    weights, tokenizer = f"{WEIGHTS}{number}", f"{TOKENIZER}-{number}"
    try:
        (path / weights).mkdir()
        written = {"weights": weights, "parts": _write_parts(path / weights, parts), "tokenizer": None, "files": {}}
        if checkpoint.tokenizer_files is not None:
            written |= {"tokenizer": tokenizer, "files": _copy_tokenizer(checkpoint, path / tokenizer)}
        write_atomically(path / META, json.dumps(_meta(checkpoint, written), indent=2) + "\n")
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
    meta, stored = _read(Path(path))
    model = build(meta.family, meta.config, meta.astra, dtype)
    parts = _read_parts(stored if verify else stored._replace(parts=None), model)
    if groups is not None:
        if meta.astra is None or not meta.astra.nested:
            raise AstraError(
                f"{path}: has no codes of which the first {groups} groups would do: run `astra calibrate --codec "
                "nested-pq` first"
            )
        meta = dataclasses.replace(meta, astra=meta.astra.with_groups(groups))
        model = build(meta.family, meta.config, meta.astra, dtype)
        parts = _first_groups(parts, model)
    try:
        if meta.tokenizer_files is not None and stored.files is not None:
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


def _folders(path: Path) -> dict[str, int]:
    """Names of the folders of all saves, and their numbers."""
    found = {entry.name: OURS.fullmatch(entry.name) for entry in path.iterdir()}
    return {name: int(match[1] or match[2] or 0) for name, match in found.items() if match}


def _in_use(path: Path) -> set[str] | None:
    """Names of the folders that astra.json names; None where it cannot be read."""
    if not (path / META).exists():
        return set()
    try:
        meta = read_json(path / META)
    except AstraError:
        return None
    return {str(meta.get("weights")), str(meta.get("tokenizer", TOKENIZER))}


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


def _meta(checkpoint: Checkpoint, written: Mapping[str, Any]) -> dict[str, Any]:
    """The content of astra.json."""
    elsewhere = ("model", "tokenizer_files", "digest")
    fields = {f.name: getattr(checkpoint, f.name) for f in dataclasses.fields(checkpoint) if f.name not in elsewhere}
    config, astra = fields["config"], fields["astra"]
    fields |= {"config": dataclasses.asdict(config), "astra": astra.as_dict() if astra else None}
    return sealed({"format": FORMAT, **fields, **written})


def sealed(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The content of astra.json with its own SHA-256, which is that of the checkpoint: it has the parts' and the
    files', and does not depend on the names of folders."""
    content = {name: value for name, value in meta.items() if name != "sha256"}
    counts = {name: value for name, value in content.items() if name not in ("weights", "tokenizer")}
    as_read = json.dumps(json.loads(json.dumps(counts)), sort_keys=True)
    return {**content, "sha256": hashlib.sha256(as_read.encode()).hexdigest()}


class Stored(NamedTuple):
    """Where the weights of a checkpoint are, in which format, and the digests of its parts and its tokenizer's files;
    None of a checkpoint that an earlier version wrote."""

    weights: Path
    version: int
    parts: Mapping[str, str] | None
    files: Mapping[str, str] | None


def _read(path: Path) -> tuple[Checkpoint, Stored]:
    """The description of a checkpoint, without model, and where the rest is."""
    if not path.exists():
        raise AstraError(f"{path}: there is no such checkpoint: `astra convert` makes one")
    if not (path / META).is_file():
        if (path / "config.json").is_file():
            raise AstraError(f"{path}: is a Hugging Face folder: run `astra convert {path} OUT` first and use OUT")
        raise AstraError(f"{path}: is not a checkpoint (it has no {META}): `astra convert` makes one")
    where, meta = path / META, read_json(path / META)
    seal, version = sealed(meta)["sha256"], meta.pop("format", None)
    if not isinstance(version, int) or version < 1:
        raise AstraError(f"{where}: has no format number: is the file damaged?")
    if version > FORMAT:
        raise AstraError(f"{where}: has format {version}; this version reads up to {FORMAT}: upgrade astra-jax")
    if version < 3:
        has_tokenizer = any((path / TOKENIZER / name).is_file() for name in FILES)
        meta |= {"tokenizer": TOKENIZER if has_tokenizer else None, "parts": {}, "files": {}, "sha256": None}
        meta = {"generation": None, **meta}  # which is newer than the format
    _check_types(meta, where)
    weights, tokenizer = _folder(meta.pop("weights", None), where, "weights"), meta.pop("tokenizer")
    parts, files, said = meta.pop("parts"), meta.pop("files"), meta.pop("sha256")
    if meta["family"] not in FAMILIES:
        raise AstraError(f"{where}: family is {meta['family']!r}; known are {', '.join(sorted(FAMILIES))}")
    labels, astra = meta["labels"], meta["astra"]
    try:
        meta |= {
            "config": _config(config_class(meta["family"]), meta["config"], str(where)),
            "astra": config_of(astra, str(where)) if astra is not None else None,
            "labels": tuple(labels) if labels is not None else None,
            "history": tuple(meta["history"]),
        }
    except TypeError as error:  # text where the configuration compares numbers
        raise AstraError(
            f"{where}: a value has the wrong type ({str(error).splitlines()[0]}): is the file damaged?"
        ) from error
    _check_labels(meta["labels"], meta["config"], where)
    tokenizer = None if tokenizer is None else path / _folder(tokenizer, where, "tokenizer")
    meta |= {"model": None, "tokenizer_files": tokenizer, "digest": said}
    checkpoint = from_dict(Checkpoint, meta, str(where))
    if said is not None and said != seal:
        raise AstraError(f"{where}: {DAMAGED}")
    return checkpoint, Stored(path / weights, version, *((parts, files) if version >= 3 else (None, None)))


def _folder(name: Any, where: Path, field: str) -> str:
    """The name of a folder that astra.json names. Raises AstraError for one that is not of a save."""
    if not isinstance(name, str) or not OURS.fullmatch(name) or not name.startswith(field):
        raise AstraError(f"{where}: {field} is {name!r}; it must be the name of a {field}-… folder beside it")
    return name


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
        "tokenizer": str | None,
        "parts": dict,
        "files": dict,
        "sha256": str | None,
    }
    wrong = sorted(name for name, kind in expected.items() if name not in meta or not isinstance(meta[name], kind))
    if not wrong and not all(isinstance(step, dict) for step in meta["history"]):
        wrong = ["history"]
    if not wrong and meta["dtype"] not in EXPORTED:
        wrong = ["dtype"]
    if wrong:
        raise AstraError(f"{where}: {', '.join(wrong)} is missing or of the wrong type: is the file damaged?")


def _check_labels(labels: tuple[Any, ...] | None, config: Any, where: Path) -> None:
    """Raises AstraError unless labels are texts, one for every class."""
    if labels is None:
        return
    classes = config.num_labels if classifies(config) else 0
    if len(labels) != classes or not all(isinstance(label, str) for label in labels):
        raise AstraError(f"{where}: labels are no names of the {classes} classes of the model: correct them")


def _write_parts(folder: Path, parts: Iterable[Part]) -> dict[str, str]:
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


def _read_parts(stored: Stored, model: Any) -> Iterator[Part]:
    """Reads a weights folder part by part into arrays of exactly the paths and shapes of an abstract model.

    Raises:
      AstraError: they are not those, or not as they were written.
    """
    folder, digests = stored.weights, stored.parts
    if not folder.is_dir():
        raise AstraError(f"{folder}: the weights are missing: copy the whole checkpoint folder, or make it again")
    if stored.version == 1:
        yield "", _read_part(folder, flat_state(model))
        return
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
