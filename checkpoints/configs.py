"""Hugging Face's config.json <-> our configurations.

Everything numerical is read from there. What cannot be computed here is an error that names file and field, and so is a
field that nobody here knows.
"""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from astra_jax.codecs.config import from_dict
from astra_jax.errors import AstraError
from astra_jax.inputs.images import CONFIG_FILE as PREPROCESSING
from astra_jax.inputs.images import ImageProcessor
from astra_jax.models.rotary import ROPE_TYPES, Rotary
from checkpoints.description import Checkpoint
from checkpoints.families.rows import Architecture
from checkpoints.fields import EMPTY, FIXED, known_to_change_nothing, one_value, refuse_unknown, shorten
from checkpoints.files import read_json
from checkpoints.problems import problem_of
from checkpoints.sentences import Sentences, read_sentences
from checkpoints.tensor_maps import FAMILIES, architecture_of, classifies, config_class, has_masked_lm

CONFIG = "config.json"

# Fields of our configurations that are no fields of a config.json.
_SETTINGS = {name for family in FAMILIES.values() for head in family.architectures.values() for name in head.settings}
DERIVED = (
    *("task", "pooler", "masked_lm", "picture_size", *sorted(_SETTINGS)),
    *(field.name for field in dataclasses.fields(Sentences)),
)
# What a config.json must say of a rotary embedding of some type.
ROPE_NEEDS = {
    "linear": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
# What is in a config.json beside the fields of our configurations, and read.
READ = (
    *("architectures", "model_type", "id2label", "num_labels", "problem_type"),
    *("sentence_transformers", "sbert_ce_default_activation_function", *EMPTY),
)
ROPE_FIELDS = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")
# A second rotary embedding, of blocks with a window: where it stands in `rope_parameters`. The bases of both as of old
# are called as a configuration's `THETAS` says.
SLIDING_ROPE, SLIDING, FULL = "sliding_rope", "sliding_attention", "full_attention"
ORIGINAL = "original_max_position_embeddings"
# `finetuned` only says how a model was made, and the length stands outside, too.
ROPE_READ = (*(field.name for field in dataclasses.fields(Rotary)), "type", "finetuned", "max_position_embeddings")


def architecture_in(hf_config: Mapping[str, Any], folder: Path) -> tuple[str, str]:
    """Family and class of a config.json: by `architectures`, or by `model_type` where there are none."""
    known = {architecture: name for name, family in FAMILIES.items() for architecture in family.architectures}
    architectures, model_type = hf_config.get("architectures"), hf_config.get("model_type")
    if "pretrained_cfg" in hf_config or {"architecture", "num_classes"} <= hf_config.keys():
        raise AstraError(
            f"{folder / CONFIG}: is of a timm model ({shorten(hf_config.get('architecture'))}), whose weights have "
            "other names: give the same model as transformers saves it"
        )
    if not architectures and isinstance(model_type, str) and model_type in FAMILIES:
        return model_type, next(iter(FAMILIES[model_type].architectures))
    for architecture in architectures if isinstance(architectures, list) else ():
        if isinstance(architecture, str) and architecture in known:
            if model_type is not None and model_type != known[architecture]:
                raise AstraError(
                    f"{folder / CONFIG}: model_type is {shorten(model_type)}, but {architecture} is of "
                    f"{known[architecture]!r}: which of them is the model? Correct the other"
                )
            return known[architecture], architecture
    named = f"{folder / CONFIG}: architecture {shorten(architectures or model_type)}"
    if why := _why_not(hf_config):
        raise AstraError(f"{named} {why}: use another model")
    if isinstance(model_type, str) and model_type in FAMILIES:
        raise AstraError(
            f"{named} is not known; of {model_type} there are {', '.join(FAMILIES[model_type].architectures)}"
        )
    raise AstraError(f"{named} is not known; there are those of {', '.join(sorted(FAMILIES))}")


# What keeps a model from being split by tokens with codes: fields that only such a model has, or their values.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")
STATE = ("linear_attention", "mamba", "recurrent", "conv", "short_conv")
STATE_FIELDS = ("state_size", "ssm_cfg", "mamba_d_state", "linear_num_value_heads", "lru_width", "rwkv_hidden_size")


def _why_not(hf_config: Mapping[str, Any]) -> str | None:
    """Why nobody here computes a model of a kind that is known; None for other kinds."""
    kinds = [*_words(hf_config.get("layer_types")), *_words(hf_config.get("layers_block_type"))]
    if hf_config.get("is_encoder_decoder") is True:
        return "is an encoder with a decoder, which is not supported"
    if any(hf_config.get(field) for field in EXPERTS):
        return "is a mixture of experts, which is not supported: every host would have to hold all experts"
    if any(hf_config.get(field) for field in STATE_FIELDS) or set(kinds) & set(STATE):
        return "has layers whose state must pass from host to host (as Mamba or DeltaNet), which is not supported"
    return None


def _words(value: Any) -> list[str]:
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []


def derived_fields(family: str, head: Architecture, names: Collection[str], folder: Path) -> dict[str, Any]:
    """The fields of a configuration that are not in the config.json, but in other files and the names of tensors.

    A config.json of a sentence-transformers model may name a class with a head that its tensors do not have.
    """
    wanted = {field.name for field in dataclasses.fields(config_class(family))} & set(DERIVED)
    masked_lm = head.task == "embedding" and has_masked_lm(family, names)
    values: dict[str, Any] = {"task": head.task, "pooler": "pooler.dense.weight" in names, "masked_lm": masked_lm}
    values |= head.settings
    # A classifier reads the class token.
    sentences = read_sentences(folder) if head.task == "embedding" else Sentences(pooling="class")
    values |= dataclasses.asdict(sentences)
    if "picture_size" in wanted:
        values["picture_size"] = _picture_size(folder)
    return {name: value for name, value in values.items() if name in wanted}


def _picture_size(folder: Path) -> int | None:
    """Pixels on a side of what the preprocessing makes of pictures; None where none is said."""
    where = folder / PREPROCESSING
    if not where.is_file():
        return None
    processor = ImageProcessor.from_hf(read_json(where))
    if processor.height != processor.width:
        raise AstraError(
            f"{where}: makes pictures of {processor.height} x {processor.width} pixels (height x width); only squares "
            "are supported: change crop_size or size"
        )
    return processor.height


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
    aliases: Mapping[str, str] = getattr(cls, "ALIASES", {})
    _check_fields(family, hf_config, where)
    labels = _labels(hf_config, where)
    # Hugging Face's default is two labels, whatever the model.
    values = {"num_labels": hf_config.get("num_labels", 2) if labels is None else len(labels)}
    for field in dataclasses.fields(cls):
        if field.name in DERIVED:
            continue
        if field.type is Rotary:
            thetas, sliding = getattr(cls, "THETAS", ()), field.name == SLIDING_ROPE
            found = _one_of_two(hf_config, sliding, thetas, where) if thetas else hf_config
            values[field.name] = _rotary(found, getattr(cls, field.name), values["max_position_embeddings"], where)
            continue
        if field.name in aliases:
            names = (field.name, aliases[field.name])
            value = one_value(hf_config, names, where)
            value = value if any(name in hf_config for name in names) else field.default
        else:
            value = values.setdefault(field.name, hf_config.get(field.name, field.default))
        if field.name in ("image_size", "patch_size"):
            value = _square(field.name, value, where)
        values[field.name] = _typed(field.name, value, field.type, where)
    config: Any = from_dict(cls, values | dict(derived or {}), str(where))
    if classifies(config):
        problem_of(hf_config, config.num_labels, where)
        if hf_config.get("num_labels", config.num_labels) != config.num_labels:
            raise AstraError(
                f"{where}: num_labels is {shorten(hf_config['num_labels'])}, but id2label names {config.num_labels} "
                "classes: correct the wrong one"
            )
    return config, labels if classifies(config) else None


def _check_fields(family: str, hf_config: Mapping[str, Any], where: Path) -> None:
    """Raises AstraError unless every field of a config.json is read, or known to change nothing."""
    cls = config_class(family)
    fields = dataclasses.fields(cls)
    names = {field.name for field in fields}
    fixed = {name: value for name, value in FIXED.items() if name not in names} | getattr(cls, "FIXED", {})
    for name, needed in fixed.items():
        if hf_config.get(name, needed) != needed:
            raise AstraError(f"{where}: {name} is {shorten(hf_config[name])}; only {needed!r} is supported")
    for name in EMPTY:
        if hf_config.get(name):
            raise AstraError(f"{where}: {name} is {shorten(hf_config[name])}, which is not supported: it must be empty")
    rotary: tuple[str, ...] = (*ROPE_FIELDS, ORIGINAL) if any(field.type is Rotary for field in fields) else ()
    rotary += getattr(cls, "THETAS", ())
    own = (field.name for field in fields if field.name not in DERIVED)
    aliases = getattr(cls, "ALIASES", {}).values()
    known = {*READ, *own, *aliases, *rotary, *fixed, *known_to_change_nothing(family)}
    refuse_unknown(hf_config, known, where, "remove it if the model does not depend on it")


def need_one_class(checkpoint: Checkpoint, name: Path, verb: str) -> None:
    """Raises AstraError of a classifier whose outputs are not one class of all, so that a class says too little.

    Args:
      verb: what the classes of data would do: `finetuned for`.
    """
    if classifies(checkpoint.config):
        problem = checkpoint.problem(checkpoint.config.num_labels)
        if problem != "single_label_classification":
            raise AstraError(
                f"{name}: is a model for {problem} ({checkpoint.config.num_labels} output(s)), which cannot be {verb} "
                "one class per row: `astra run` shows what it makes of an input"
            )


def _typed(name: str, value: Any, annotation: Any, where: Path) -> Any:
    """A value as the type that its field is annotated with. Raises AstraError if it is of another one."""
    if isinstance(value, list) and "tuple" in str(annotation):
        return _typed_list(name, value, annotation, where)
    kinds = get_args(annotation) or (annotation,)
    kinds = tuple(tuple if get_origin(kind) is tuple else kind for kind in kinds)
    fits = isinstance(value, (*kinds, int) if float in kinds else kinds)
    if not fits or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise AstraError(f"{where}: {name} is {shorten(value)}; it must be of type {names}")
    try:
        return float(value) if float in kinds and isinstance(value, int) else value
    except OverflowError:
        raise AstraError(f"{where}: {name} is {shorten(value)}, which is too large for a number") from None


def _typed_list(name: str, value: list[Any], annotation: Any, where: Path) -> tuple[Any, ...]:
    """A list as `tuple[kind, ...]`, or one of several types of which that is one."""
    of = next(kind for kind in (annotation, *get_args(annotation)) if get_origin(kind) is tuple)
    return tuple(_typed(f"{name}[{n}]", one, get_args(of)[0], where) for n, one in enumerate(value))


def _one_of_two(hf_config: Mapping[str, Any], sliding: bool, thetas: tuple[str, ...], where: Path) -> dict[str, Any]:
    """A config.json with one of its two rotary embeddings: that of blocks with a window, or of the others.

    Args:
      thetas: the fields of the bases of the others and of those, where they stand outside of `rope_parameters`.
    """
    content = {name: value for name, value in hf_config.items() if name not in (*thetas, "rope_theta")}
    content["rope_theta"] = hf_config.get(thetas[sliding])
    both, scaling = content.pop("rope_parameters", None), hf_config.get("rope_scaling")
    if scaling and (both or thetas[0] != "rope_theta"):
        raise AstraError(
            f"{where}: has rope_scaling, which may be of either of two kinds of blocks: use rope_parameters"
        )
    if sliding:  # as of old: without scaling
        content.pop("rope_scaling", None)
    if not both:
        return content
    if not isinstance(both, dict) or not {FULL, SLIDING} & set(both):
        raise AstraError(f"{where}: rope_parameters is {shorten(both)}; it must have {FULL} and {SLIDING}")
    refuse_unknown(both, (FULL, SLIDING), where, "rope_parameters are of two kinds of blocks here")
    return content | {"rope_parameters": both.get(SLIDING if sliding else FULL)}


def _rotary(hf_config: Mapping[str, Any], default: Rotary, limit: int, where: Path) -> Rotary:
    """The rotary embedding of a config.json: `rope_parameters`, or `rope_theta` and `rope_scaling` as of old."""
    field = "rope_scaling" if hf_config.get("rope_scaling") else "rope_parameters"
    found = hf_config.get(field) or {}
    if not isinstance(found, dict):
        raise AstraError(f"{where}: {field} is {found!r}; it must be an object")
    if not found and default.rope_type != "default":
        return default
    values = {name: value for name, value in found.items() if value is not None}
    rope_type = values.setdefault("rope_type", values.get("type", "default"))
    if rope_type == "su":  # its first name
        rope_type = values["rope_type"] = "longrope"
    if rope_type not in ROPE_TYPES:
        raise AstraError(f"{where}: {field} has rope_type {rope_type!r}; known are {', '.join(ROPE_TYPES)}")
    for name in ("rope_theta", "partial_rotary_factor"):
        if hf_config.get(name) is not None:
            values.setdefault(name, hf_config[name])
    values.setdefault("rope_theta", default.rope_theta)
    refuse_unknown(values, ROPE_READ, where, f"remove it from {field} if the model does not depend on it")
    if rope_type in ("llama3", "longrope", "yarn"):
        # As in transformers, what is said outside comes first.
        outside = hf_config.get(ORIGINAL)
        values[ORIGINAL] = values.get(ORIGINAL, limit) if outside is None else outside
        values[ORIGINAL] = _typed(ORIGINAL, values[ORIGINAL], int, where)
    by_limits = rope_type == "longrope" or (rope_type == "yarn" and "factor" in found)
    if by_limits and "factor" not in values:  # null: the ratio of the two limits
        values["factor"] = limit / max(1, values[ORIGINAL])
    missing = [name for name in ROPE_NEEDS.get(rope_type, ()) if name not in values]
    if missing:
        raise AstraError(f"{where}: {field} of type {rope_type} has no {' and no '.join(missing)}")
    fields = [f for f in dataclasses.fields(Rotary) if f.name in values]
    return Rotary(**{f.name: _typed(f"{field}.{f.name}", values[f.name], f.type, where) for f in fields})


def rotary_to_hf(rotary: Rotary) -> dict[str, Any]:
    """The `rope_parameters` of a config.json: what the type needs, and what is not as by default."""
    needed = ("rope_type", "rope_theta", *ROPE_NEEDS.get(rotary.rope_type, ()))
    values = dataclasses.asdict(rotary)
    return {name: value for name, value in values.items() if name in needed or value != getattr(Rotary, name)}


def rotaries_to_hf(config: Any) -> dict[str, Any]:
    """The same of a configuration, which may have two."""
    first = rotary_to_hf(config.rope_parameters)
    if not hasattr(config, SLIDING_ROPE):
        return first
    return {FULL: first, SLIDING: rotary_to_hf(getattr(config, SLIDING_ROPE))}


def _square(name: str, value: Any, where: Path) -> Any:
    """A size, which Hugging Face also writes as [height, width]."""
    if not isinstance(value, list):
        return value
    if len(value) != 2 or value[0] != value[1] or type(value[0]) is not type(value[1]):
        raise AstraError(f"{where}: {name} is {shorten(value)}; only squares, as one number or [n, n], are supported")
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
    # `picture_size` has to fit sizes that `content` need not have yet.
    derived = {name: getattr(ours, name) for name in fields if name in DERIVED and name != "picture_size"}
    config, labels = config_from_hf(family, content, Path(), derived)
    for name in fields:
        value = getattr(ours, name)
        if value == getattr(config, name) or name in ("num_labels", "picture_size"):
            continue
        if isinstance(value, Rotary):
            gone = {*ROPE_FIELDS, *getattr(ours, "THETAS", ()), ORIGINAL} - ({ORIGINAL} & set(fields))
            content = {n: v for n, v in content.items() if n not in gone}
            name, value = "rope_parameters", rotaries_to_hf(ours)
        content[name] = value
    if (config.num_labels, labels) != (ours.num_labels, checkpoint.labels):
        names = checkpoint.labels or [f"LABEL_{c}" for c in range(ours.num_labels)]
        content["id2label"] = {str(c): name for c, name in enumerate(names)}
        content["label2id"] = {name: c for c, name in enumerate(names)}
        content.pop("num_labels", None)  # the names say it
    # Older versions of transformers call it torch_dtype.
    return content | {name: dtype for name in ("dtype", "torch_dtype") if name in content}
