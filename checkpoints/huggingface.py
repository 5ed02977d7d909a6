"""Hugging Face folders: a strict reader and an exact writer.

Only safetensors files are read and no code of a repository is ever run. Names in a folder's files are untrusted.
"""

import contextlib
import dataclasses
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from astra_jax.errors import AstraError
from astra_jax.files import is_disk_full, replacing, write_atomically, writing
from astra_jax.inputs.tokenizer import FILES
from checkpoints.configs import CONFIG, architecture_in, config_from_hf, config_to_hf, derived_fields
from checkpoints.description import META, Checkpoint
from checkpoints.families.rows import Family
from checkpoints.fields import check_generation, generation_settings, shorten
from checkpoints.files import is_empty, is_plain_name, read_json
from checkpoints.foreign import check_folder, check_plain, no_weights
from checkpoints.parts import part_of
from checkpoints.sentences import MODULES, check_width, copy_companions, sentence_files, sentence_notes, shown
from checkpoints.streaming import Part, assemble, part_name
from checkpoints.tensor_maps import FAMILIES, Tensor, architecture_of, build, flat_state, model_tensors

# safetensors' names of the dtypes that float32 holds exactly, so that an export gives back every bit.
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
PREPROCESSING, GENERATION = "preprocessor_config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
UNFINISHED = f".{WEIGHTS}.*"  # what a killed export left
# In the metadata of an exported model.safetensors: the mark of a folder that may be overwritten.
MARK = {"format": "pt", "written_by": "astra-jax"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# What is read of a hub repository: no code, no pickles.
DOWNLOADED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
PIECE = 2**22  # bytes of a tensor that are read at once

Progress = Callable[[str, int], AbstractContextManager[Callable[..., None]]]


@contextlib.contextmanager
def silent(label: str, total: int) -> Iterator[Callable[..., None]]:
    """Stands in for `astra_jax.report.progress` where nothing should be printed."""
    yield lambda n=1: None


class Stored(NamedTuple):
    """A tensor in a safetensors file, as its header says; `dtype` is one of safetensors' names."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def pieces(self) -> Iterator[tuple[Any, np.ndarray]]:
        """The tensor some rows at a time, and which they are (a vector as a whole)."""
        total = self.shape[0] if self.shape else 1
        rows = max(1, PIECE // (4 * math.prod(self.shape[1:]))) if len(self.shape) > 1 else total
        for start in range(0, total, rows):
            place = slice(start, min(start + rows, total)) if self.shape else ...
            with _open(self.file) as file:  # anew, because what was read of a file stays in memory while it is open
                piece = file.get_slice(self.name)[place]
            yield place, piece

    def is_finite(self) -> bool:
        """Whether all its values are numbers."""
        return all(bool(np.isfinite(piece).all()) for _, piece in self.pieces())

    def equals(self, other: "Stored") -> bool:
        """Whether another tensor is the same."""
        return self[2:] == other[2:] and all(
            np.array_equal(mine, theirs) for (_, mine), (_, theirs) in zip(self.pieces(), other.pieces(), strict=True)
        )


@dataclasses.dataclass(frozen=True)
class Folder:
    """A Hugging Face folder of which everything was read but the weights.

    Attributes:
      path: the folder.
      checkpoint: what becomes of it; its model is abstract.
      tensors: what the model needs, by name.
      stored: where that is.
      notes: what the folder says that is known and not done here, a line each.
    """

    path: Path
    checkpoint: Checkpoint
    tensors: dict[str, Tensor]
    stored: dict[str, Stored]
    notes: tuple[str, ...] = ()

    def parts(self, progress: Progress = silent) -> Generator[Part, None, None]:
        """Reads the weights part by part, in the dtype of the files (float32 where tensors differ).

        Raises:
          AstraError: at the end, if some are not finite, with all of their names.
        """
        groups = defaultdict(list)
        for name, (key, block) in self.tensors.items():
            groups[part_name(key.path, block)].append(name)
        shapes = flat_state(self.checkpoint.model)
        needless = [key for key in FAMILIES[self.checkpoint.family].keys if key.since and key.path in shapes]
        sizes = FAMILIES[self.checkpoint.family].sizes(self.checkpoint.config)
        not_finite: list[str] = []

        def read_part(names: Iterable[str]) -> dict[str, np.ndarray]:
            arrays = {}
            for name in names:
                key, block = self.tensors[name]
                for path in key.paths:
                    shape = shapes[path].shape if block is None else shapes[path].shape[1:]
                    arrays[path] = np.empty(shape, jnp.dtype(self.checkpoint.dtype))
                views, finite = key.as_theirs([arrays[path] for path in key.paths], sizes), True
                for rows, piece in self.stored[name].pieces():
                    finite &= bool(np.isfinite(piece).all())
                    key.fill(views, rows, piece)
                if not finite:
                    not_finite.append(name)
                advance()
            return arrays | unused(names)

        def unused(names: Iterable[str]) -> dict[str, np.ndarray]:
            """What the first blocks have in our stack alone."""
            blocks = {self.tensors[name].block for name in names} - {None}
            rows = [key for key in needless for block in blocks if block < key.since]  # type: ignore[operator]
            return {key.path: np.ones(shapes[key.path].shape[1:], jnp.dtype(self.checkpoint.dtype)) for key in rows}

        with progress("reading weights", len(self.tensors)) as advance:
            for part, names in sorted(groups.items()):
                yield part, read_part(names)
        _raise(self.path, {"NaN or infinite": not_finite})


def open_folder(source: str) -> Folder:
    """Reads all of a Hugging Face folder, or of a hub repository `org/name`, but the weights.

    Raises:
      AstraError: the source is missing, not understood, or its weights do not fit its own config.json: tensors are
        unmapped (no row of the key table knows them), unexpected (a row does, but this model has no such parameter),
        duplicated, unfilled, of a wrong shape or dtype, or not finite: all of them in one message.
    """
    folder = find(source)
    check_folder(folder)
    hf_config = read_json(folder / CONFIG)
    check_plain(hf_config, folder / CONFIG)
    hf_config = part_of(hf_config, folder / CONFIG) or hf_config
    family, architecture = architecture_in(hf_config, folder)
    known = FAMILIES[family]
    head = known.architectures[architecture]
    found = [tensor for file in tensor_files(folder) for tensor in _headers(file)]
    by_name = {known.bare(tensor.name): tensor for tensor in found}
    derived = derived_fields(family, head, by_name, folder)
    config, labels = config_from_hf(family, hf_config, folder, derived)
    if head.task == "embedding":
        check_width(folder, config.hidden_size)
    called = {tensor.name: known.bare(tensor.name) for tensor in found}
    left_out = [tensor for tensor in found if known.is_left_out(called[tensor.name])]
    found = [tensor for tensor in found if tensor not in left_out]
    config = _tied(known.architectures[architecture_of(family, config)].ties, config, by_name, found, called)
    model = build(family, config)
    tensors = model_tensors(family, model)
    stored = _match(folder, known, tensors, found, called, known.sizes(config))
    dtypes = {DTYPES[tensor.dtype] for tensor in stored.values()}
    preprocessing, generation = (
        read_json(folder / name) if (folder / name).is_file() else None for name in (PREPROCESSING, GENERATION)
    )
    reads_text = hasattr(config, "vocab_size") and any((folder / name).is_file() for name in FILES)
    checkpoint = Checkpoint(
        family=family,
        config=config,
        astra=None,
        labels=labels,
        preprocessing=preprocessing,
        hf_config=hf_config,
        dtype=dtypes.pop() if len(dtypes) == 1 else "float32",
        history=({"verb": "convert", "source": source},),
        model=model,
        generation=generation,
        tokenizer_files=folder if reads_text else None,
    )
    return Folder(folder, checkpoint, tensors, stored, (*_notes(checkpoint, folder), *_left_out(left_out)))


def _tied(
    ties: Mapping[str, str], config: Any, by_name: Mapping[str, Stored], found: list[Stored], called: dict[str, str]
) -> Any:
    """The configuration, and in `found` and `called` what there is to read, where a head repeats other tensors.

    As in transformers: a tied tensor that is stored alone is the other one, too; one that is stored beside it is
    skipped if it is the same, else it is one of its own.
    """
    tied = bool(ties) and config.tie_word_embeddings
    for name, other in ties.items() if tied else ():
        if (own := by_name.get(name)) is None:
            continue
        if other not in by_name:
            called[own.name] = other
        elif own.equals(by_name[other]):
            found.remove(own)
        else:
            config = dataclasses.replace(config, tie_word_embeddings=False)
    return config


def _left_out(tensors: Sequence[Stored]) -> Iterator[str]:
    """What is said of tensors that are neither computed nor kept."""
    if tensors:
        names = ", ".join(shown(tensor.name) for tensor in tensors[:4])
        yield f"{len(tensors)} tensor(s) of another head or model are left out: {names}"


def _notes(checkpoint: Checkpoint, folder: Path) -> Iterator[str]:
    """What a folder says that is known and not done here. Raises AstraError where a setting is of a wrong type."""
    if code := checkpoint.hf_config.get("auto_map"):
        yield f"{CONFIG} asks for code of its own ({shorten(code)}), which is never run: the model is what it is here"
    if checkpoint.config.input_kind == "images" and checkpoint.preprocessing is not None:
        checkpoint.processor  # noqa: B018  # raises unless it can be read
    if checkpoint.generation is not None:
        check_generation(checkpoint.generation, folder / GENERATION)
        if others := generation_settings(checkpoint.generation):
            yield f"{GENERATION} has {', '.join(others)}: `astra run` goes by its own options instead, see its --help"
    if getattr(checkpoint.config, "task", None) == "embedding":
        yield from sentence_notes(folder)
    if getattr(checkpoint.config, "masked_lm", False):
        yield (
            "the head that fills in masked words is kept for `astra export`, and not computed: this model is a "
            "sentence encoder here"
        )


def read(source: str, progress: Progress = silent) -> Checkpoint:
    """Like `open_folder`, with the weights: in float32, on the first local device.

    Raises:
      AstraError: as `open_folder`.
    """
    folder = open_folder(source)
    model = assemble(folder.checkpoint.model, folder.parts(progress), jnp.float32)
    return dataclasses.replace(folder.checkpoint, model=model)


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
        return Path(snapshot_download(hub_id, allow_patterns=DOWNLOADED))
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


def tensor_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a folder: the single one, or those that the index names.

    Raises:
      AstraError: there are none, or the index is damaged or names files elsewhere.
    """
    if (folder / WEIGHTS).is_file():
        return (folder / WEIGHTS,)
    if not (folder / INDEX).is_file():
        raise no_weights(folder, f"{WEIGHTS} nor {INDEX}")
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


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise AstraError(
            f"{path}: is truncated or not a safetensors file ({error}): download or copy it again"
        ) from error


def _headers(file: Path) -> list[Stored]:
    """The tensors of a safetensors file."""
    with _open(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}
        return [Stored(file, name, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()]


def _match(
    folder: Path,
    family: Family,
    tensors: Mapping[str, Tensor],
    found: Iterable[Stored],
    called: Mapping[str, str],
    sizes: Mapping[str, int],
) -> dict[str, Stored]:
    """Where every tensor that a model needs is; `called` has today's names, without prefix, of those in the files.

    Raises:
      AstraError: with all faults of all tensors (`open_folder`).
    """
    faults: dict[str, list[str]] = defaultdict(list)
    stored: dict[str, Stored] = {}
    readable = []
    for tensor in found:
        bare = called[tensor.name]
        name = next((name for name in (bare, family.prefix + bare) if name in tensors), None)
        if name is None:
            if not family.is_skipped(bare):
                faults["unexpected" if family.is_mapped(bare) else "unmapped"].append(tensor.name)
            continue
        if name in stored:
            faults["duplicated"].append(name)
        stored[name] = tensor
        expected = tensors[name].key.shape(sizes)
        if tensor.shape != expected:
            faults["wrong shape"].append(f"{tensor.name} {list(tensor.shape)} instead of {list(expected)}")
        if tensor.dtype in DTYPES:
            readable.append(tensor)
        else:
            faults[f"dtype other than {', '.join(DTYPES.values())}"].append(f"{tensor.name} ({tensor.dtype})")
    faults["unfilled"] = sorted(set(tensors) - set(stored))
    if any(faults.values()):  # then the weights are not going to be read, and this is the last word on them
        faults["NaN or infinite"] = [tensor.name for tensor in readable if not tensor.is_finite()]
    _raise(folder, faults)
    return stored


def _raise(folder: Path, faults: Mapping[str, list[str]], most: int = 4) -> None:
    """Raises one AstraError with all faults, at most `most` names of each kind; nothing if there are none."""
    texts = []
    for kind, names in faults.items():
        if names:
            more = f" and {len(names) - most} more" if len(names) > most else ""
            texts.append(f"{len(names)} {kind}: {', '.join(names[:most])}{more}")
    if texts:
        raise AstraError(f"{folder}: the weights do not fit {CONFIG}: {'; '.join(texts)}: is the folder complete?")


def tensors_of(checkpoint: Checkpoint, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """Name and content of every tensor of an export. Raises AstraError where a weight does not fit into `dtype`."""
    arrays = {path: np.asarray(a) for path, a in flat_state(checkpoint.model).items()}
    sizes = FAMILIES[checkpoint.family].sizes(checkpoint.config)
    for name, (key, block) in model_tensors(checkpoint.family, checkpoint.model).items():
        ours = [arrays[path] if block is None else arrays[path][block] for path in key.paths]
        theirs = np.empty(key.shape(sizes), jnp.dtype(dtype))
        with np.errstate(over="ignore"):  # reported below
            np.concatenate(key.as_theirs(ours, sizes), axis=key.shared, out=theirs, casting="unsafe")
        if not np.isfinite(theirs).all():
            raise AstraError(f"{name} has values that {dtype} cannot hold: export with --dtype float32")
        yield name, theirs


def is_export(folder: Path) -> bool:
    """Whether a folder was written by `write_folder`, also if that was killed, and so may be overwritten."""
    return any(map(_is_marked, (folder / WEIGHTS, *folder.glob(UNFINISHED))))


def _is_marked(weights: Path) -> bool:
    try:
        with safe_open(weights, framework="numpy") as file:
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
    if not is_empty(out, but_for=(UNFINISHED,)) and not is_export(out):
        raise AstraError(f"{out}: is not empty and no earlier export: choose another output folder")
    contents = {
        CONFIG: config_to_hf(checkpoint, dtype),
        PREPROCESSING: checkpoint.preprocessing,
        GENERATION: checkpoint.generation,
    }
    files = checkpoint.tokenizer_files
    sentences = getattr(checkpoint.config, "task", None) == "embedding"
    if sentences and (files is None or not (files / MODULES).is_file()):
        contents |= sentence_files(checkpoint.config)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        left = [*out.glob(UNFINISHED)]
        with replacing(out / WEIGHTS) as temporary:
            save_file(dict(tensors_of(checkpoint, dtype)), temporary, metadata=MARK)
            # While other files change there are no weights: what a killed export leaves is no model, rather than the
            # weights of one with the tokenizer of another.
            (out / WEIGHTS).unlink(missing_ok=True)
            if files is not None:
                copy_companions(files, out)
            for name, content in contents.items():
                if content is not None:
                    (out / name).parent.mkdir(exist_ok=True)
                    write_atomically(out / name, json.dumps(content, indent=2) + "\n")
        for file in left:
            file.unlink(missing_ok=True)
