"""What a checkpoint says of its model: astra.json, and what it is read into."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from astra_jax.codecs.config import AstraConfig, config_of, from_dict
from astra_jax.errors import AstraError
from astra_jax.inputs.images import ImageProcessor
from astra_jax.inputs.tokenizer import Tokenizer
from checkpoints.fields import eos_ids
from checkpoints.files import read_json
from checkpoints.problems import Problem, problem_of
from checkpoints.tensor_maps import FAMILIES, classifies, config_class

FORMAT = 3
META = "astra.json"
WEIGHTS = "weights-"
TOKENIZER = "tokenizer-"
OURS = re.compile(rf"(?:{WEIGHTS}|{TOKENIZER})([0-9]+)")  # folders of a save
DAMAGED = (
    "is not as it was written (its SHA-256 differs): the disk or a copy damaged it: copy it again, or make it again"
)
EXPORTED = ("float32", "float16", "bfloat16")  # dtypes of the weights in a Hugging Face export


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
        it is changed; None where it was read from none.
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
            types=getattr(config, "type_vocab_size", 0),
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


def describe(checkpoint: Checkpoint, written: Mapping[str, Any]) -> dict[str, Any]:
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
    """Where the weights of a checkpoint are, and the digests of its parts and its tokenizer's files.

    Attributes:
      parts: None to read them without comparing.
    """

    weights: Path
    parts: Mapping[str, str] | None
    files: Mapping[str, str]


def read_description(path: Path) -> tuple[Checkpoint, Stored]:
    """The description of a checkpoint, without model, and where the rest is."""
    if not path.exists():
        raise AstraError(f"{path}: there is no such checkpoint: `astra convert` makes one")
    if not (path / META).is_file():
        if (path / "config.json").is_file():
            raise AstraError(f"{path}: is a Hugging Face folder: run `astra convert {path} OUT` first and use OUT")
        raise AstraError(f"{path}: is not a checkpoint (it has no {META}): `astra convert` makes one")
    where, meta = path / META, read_json(path / META)
    seal, version = sealed(meta)["sha256"], meta.pop("format", None)
    if not isinstance(version, int):
        raise AstraError(f"{where}: has no format number: is the file damaged?")
    if version != FORMAT:
        fix = "upgrade astra-jax" if version > FORMAT else "convert the model again"
        raise AstraError(f"{where}: has format {version}; this version reads {FORMAT}: {fix}")
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
    check_labels(meta["labels"], meta["config"], where)
    tokenizer = None if tokenizer is None else path / _folder(tokenizer, where, "tokenizer")
    meta |= {"model": None, "tokenizer_files": tokenizer, "digest": said}
    checkpoint = from_dict(Checkpoint, meta, str(where))
    if said != seal:
        raise AstraError(f"{where}: {DAMAGED}")
    return checkpoint, Stored(path / weights, parts, files)


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
        "sha256": str,
    }
    wrong = sorted(name for name, kind in expected.items() if name not in meta or not isinstance(meta[name], kind))
    if not wrong and not all(isinstance(step, dict) for step in meta["history"]):
        wrong = ["history"]
    if not wrong and meta["dtype"] not in EXPORTED:
        wrong = ["dtype"]
    if wrong:
        raise AstraError(f"{where}: {', '.join(wrong)} is missing or of the wrong type: is the file damaged?")


def check_labels(labels: tuple[Any, ...] | None, config: Any, where: Path) -> None:
    """Raises AstraError unless labels are texts, one for every class."""
    if labels is None:
        return
    classes = config.num_labels if classifies(config) else 0
    if len(labels) != classes or not all(isinstance(label, str) for label in labels):
        raise AstraError(f"{where}: labels are no names of the {classes} classes of the model: correct them")
