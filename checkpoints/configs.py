"""Hugging Face's config.json <-> our configurations, and what sentence-transformers adds to it.

Everything numerical is read from there; what cannot be computed here is an error that names file and field.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from astra_jax.config import from_dict
from astra_jax.errors import AstraError
from astra_jax.rotary import ROPE_TYPES, Rotary
from astra_jax.sharding import Pooling
from checkpoints.files import is_plain_name, read_json, read_json_list
from checkpoints.keys import FAMILIES, architecture_of, classifies, config_class
from checkpoints.store import Checkpoint

CONFIG = "config.json"

# Fields of our configurations that are no fields of a config.json.
DERIVED = ("task", "pooling", "normalize", "max_seq_length", "pooler")
# What a config.json must say of a rotary embedding of some type.
ROPE_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
# What it may say that changes the frequencies, and is not computed here. transformers ignores what it does not know.
ROPE_UNSUPPORTED = ("short_factor", "long_factor", "mrope_section")
# How sentence-transformers calls the poolings that there are here.
MODULES, SENTENCES = "modules.json", "sentence_bert_config.json"
POOLING_MODES: dict[Pooling, str] = {
    "mean": "pooling_mode_mean_tokens",
    "class": "pooling_mode_cls_token",
    "last": "pooling_mode_lasttoken",
}


def architecture_in(hf_config: Mapping[str, Any], folder: Path) -> tuple[str, str]:
    """Family and class of a config.json: by `architectures`, or by `model_type` where there are none."""
    known = {architecture: name for name, family in FAMILIES.items() for architecture in family.architectures}
    architectures, model_type = hf_config.get("architectures"), hf_config.get("model_type")
    if not architectures and isinstance(model_type, str) and model_type in FAMILIES:
        return model_type, next(iter(FAMILIES[model_type].architectures))
    for architecture in architectures if isinstance(architectures, list) else ():
        if isinstance(architecture, str) and architecture in known:
            return known[architecture], architecture
    raise AstraError(
        f"{folder / CONFIG}: architecture {architectures or model_type!r} is not known; known are "
        f"{', '.join(sorted(known))}"
    )


def derived_fields(family: str, task: str | None, names: Iterable[str], folder: Path) -> dict[str, Any]:
    """The fields of a configuration that are not in the config.json."""
    values: dict[str, Any] = {"task": task, "pooler": "pooler.dense.weight" in names}
    # A classifier reads the class token.
    sentences = task == "embedding"
    values["pooling"], values["normalize"] = _sentence_pooling(folder) if sentences else ("class", False)
    limits = read_json(folder / SENTENCES) if sentences and (folder / SENTENCES).is_file() else {}
    values["max_seq_length"] = _typed("max_seq_length", limits.get("max_seq_length"), int | None, folder / SENTENCES)
    return {
        field.name: values[field.name] for field in dataclasses.fields(config_class(family)) if field.name in DERIVED
    }


def config_from_hf(
    family: str, hf_config: Mapping[str, Any], folder: Path, derived: Mapping[str, Any] | None = None
) -> tuple[Any, tuple[str, ...] | None]:
    """The family's configuration and the class names from a config.json.

    Our configurations have Hugging Face's names and defaults (a test compares them), so a missing key gets its default.

    Args:
      family: a key of `FAMILIES`.
      hf_config: the content of the config.json.
      folder: where it is.
      derived: the fields that are not in it; None for our defaults.

    Raises:
      AstraError: a value has the wrong type or is not supported.
    """
    where, cls = folder / CONFIG, config_class(family)
    for name, needed in getattr(cls, "FIXED", {}).items():
        if hf_config.get(name, needed) != needed:
            raise AstraError(f"{where}: {name} is {hf_config[name]!r}; only {needed!r} is supported")
    labels = _labels(hf_config, where)
    # Hugging Face's default is two labels, whatever the model.
    values = {"num_labels": hf_config.get("num_labels", 2) if labels is None else len(labels)}
    for field in dataclasses.fields(cls):
        if field.name in DERIVED:
            continue
        if field.type is Rotary:
            values[field.name] = _rotary(hf_config, values["max_position_embeddings"], where)
            continue
        value = values.setdefault(field.name, hf_config.get(field.name, field.default))
        if field.name in ("image_size", "patch_size"):
            value = _square(field.name, value, where)
        values[field.name] = _typed(field.name, value, field.type, where)
    config: Any = from_dict(cls, values | dict(derived or {}), str(where))
    return config, labels if classifies(config) else None


def _typed(name: str, value: Any, annotation: Any, where: Path) -> Any:
    """A value as the type that its field is annotated with. Raises AstraError if it is of another one."""
    kinds = get_args(annotation) or (annotation,)
    fits = isinstance(value, (*kinds, int) if float in kinds else kinds)
    if not fits or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise AstraError(f"{where}: {name} is {value!r}; it must be of type {names}")
    return float(value) if float in kinds and isinstance(value, int) else value


def _rotary(hf_config: Mapping[str, Any], limit: int, where: Path) -> Rotary:
    """The rotary embedding of a config.json: `rope_parameters`, or `rope_theta` and `rope_scaling` as of old."""
    field = "rope_scaling" if hf_config.get("rope_scaling") else "rope_parameters"
    found = hf_config.get(field) or {}
    if not isinstance(found, dict):
        raise AstraError(f"{where}: {field} is {found!r}; it must be an object")
    values = {name: value for name, value in found.items() if value is not None}
    rope_type = values.setdefault("rope_type", values.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise AstraError(f"{where}: {field} has rope_type {rope_type!r}; known are {', '.join(ROPE_TYPES)}")
    for name in ("rope_theta", "partial_rotary_factor"):
        if hf_config.get(name) is not None:
            values.setdefault(name, hf_config[name])
    if (part := values.pop("partial_rotary_factor", 1)) != 1:
        raise AstraError(f"{where}: partial_rotary_factor is {part!r}; only 1 is supported: whole heads are rotated")
    if rope_type in ("llama3", "yarn"):
        values.setdefault("original_max_position_embeddings", limit)
    if rope_type == "yarn" and "factor" in found and "factor" not in values:  # null: the ratio of the two limits
        values["factor"] = limit / values["original_max_position_embeddings"]
    missing = [name for name in ROPE_NEEDS.get(rope_type, ()) if name not in values]
    if missing:
        raise AstraError(f"{where}: {field} of type {rope_type} has no {' and no '.join(missing)}")
    unsupported = [name for name, value in values.items() if name in ROPE_UNSUPPORTED or isinstance(value, dict)]
    if unsupported:
        raise AstraError(f"{where}: {field} has {unsupported[0]!r}, which is not supported")
    fields = [f for f in dataclasses.fields(Rotary) if f.name in values]
    return Rotary(**{f.name: _typed(f"{field}.{f.name}", values[f.name], f.type, where) for f in fields})


def rotary_to_hf(rotary: Rotary) -> dict[str, Any]:
    """The `rope_parameters` of a config.json: what the type needs, and what is not as by default."""
    needed = ("rope_type", "rope_theta", *ROPE_NEEDS.get(rotary.rope_type, ()))
    values = dataclasses.asdict(rotary)
    return {name: value for name, value in values.items() if name in needed or value != getattr(Rotary, name)}


def _sentence_pooling(folder: Path) -> tuple[Pooling, bool]:
    """How a sentence-transformers folder makes an embedding of a sentence: pooling, and whether it is normalised.

    Without a modules.json it is the mean of all tokens, as sentence-transformers does.
    """
    where = folder / MODULES
    if not where.is_file():
        return "mean", False
    modules = read_json_list(where)
    if not all(isinstance(m, dict) and isinstance(m.get("type"), str) for m in modules):
        raise AstraError(f"{where}: every module must be an object with a type: is the file damaged?")
    # A class from elsewhere would be code of its own, whatever it is called.
    kinds = [re.sub(r"^sentence_transformers\..*\.", "", module["type"]) for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise AstraError(
            f"{where}: has the modules {', '.join(kinds)}; supported are Transformer and Pooling, and then Normalize"
        )
    transformer, pooling = modules[0].get("path", ""), modules[1].get("path")
    if transformer != "":
        raise AstraError(f"{where}: the Transformer has the path {transformer!r}; it must be the folder itself, ''")
    if not is_plain_name(pooling):
        raise AstraError(
            f"{where}: the Pooling has the path {pooling!r}; it must be the name of a folder beside the file"
        )
    where = folder / pooling / CONFIG
    modes = [name for name, on in read_json(where).items() if name.startswith("pooling_mode_") and on]
    known = {mode: name for name, mode in POOLING_MODES.items()}
    if len(modes) != 1 or modes[0] not in known:
        raise AstraError(
            f"{where}: has {' and '.join(modes) or 'no pooling_mode'}; supported is one of {', '.join(known)}"
        )
    return known[modes[0]], "Normalize" in kinds


def sentence_files(config: Any) -> dict[str, Any]:
    """What sentence-transformers reads beside config.json: file -> content."""
    kinds = ("Transformer", "Pooling", *["Normalize"] * config.normalize)
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    modes = {mode: name == config.pooling for name, mode in POOLING_MODES.items()}
    files = {MODULES: modules, f"1_Pooling/{CONFIG}": {"word_embedding_dimension": config.hidden_size, **modes}}
    limit = config.max_seq_length
    return files | ({SENTENCES: {"max_seq_length": limit, "do_lower_case": False}} if limit else {})


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


def config_to_hf(checkpoint: Checkpoint, dtype: str) -> dict[str, Any]:
    """The config.json of an export: the original one, with what is different in this checkpoint."""
    family, ours = checkpoint.family, checkpoint.config
    content = dict(checkpoint.hf_config) or {
        "architectures": [architecture_of(family, ours)],
        "model_type": family,
        "dtype": dtype,
    }
    fields = [field.name for field in dataclasses.fields(ours)]
    derived = {name: getattr(ours, name) for name in fields if name in DERIVED}
    config, labels = config_from_hf(family, content, Path(), derived)
    for name in fields:
        value = getattr(ours, name)
        if value == getattr(config, name) or name == "num_labels":
            continue
        if isinstance(value, Rotary):
            content = {n: v for n, v in content.items() if n not in ("rope_scaling", "rope_theta")}
            value = rotary_to_hf(value)
        content[name] = value
    if (config.num_labels, labels) != (ours.num_labels, checkpoint.labels):
        names = checkpoint.labels or [f"LABEL_{c}" for c in range(ours.num_labels)]
        content["id2label"] = {str(c): name for c, name in enumerate(names)}
        content["label2id"] = {name: c for c, name in enumerate(names)}
    # Older versions of transformers call it torch_dtype.
    return content | {name: dtype for name in ("dtype", "torch_dtype") if name in content}
