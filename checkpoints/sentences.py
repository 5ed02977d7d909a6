"""What sentence-transformers adds to a Hugging Face folder: how texts become one embedding each.

A folder of its own has modules.json (the steps), sentence_bert_config.json (what happens to texts),
1_Pooling/config.json, and config_sentence_transformers.json (what is put before texts, how embeddings are compared).
Every field is read, or known to change nothing, or an error.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from astra_jax.codecs.config import Similarity
from astra_jax.errors import AstraError
from astra_jax.inputs.tokenizer import tokenizer_names
from astra_jax.mesh.sharding import Pooling
from checkpoints.fields import refuse_unknown, shorten
from checkpoints.files import copy_files, is_plain_name, read_json, read_json_list

MODULES, SENTENCES, MODEL = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
# What the second of these was called for other models; the first that is there counts.
OLD_NAMES = tuple(
    f"sentence_{kind}_config.json" for kind in ("roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# Our name of a pooling -> how versions before 5.4 say it, and how later ones do.
POOLING_MODES: dict[Pooling, tuple[str, str]] = {
    "mean": ("pooling_mode_mean_tokens", "mean"),
    "class": ("pooling_mode_cls_token", "cls"),
    "last": ("pooling_mode_lasttoken", "lasttoken"),
}
OTHER_MODES = ("pooling_mode_max_tokens", "pooling_mode_mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens")
ADVICE = "remove it if the model does not depend on it"
# What versions from 5.4 on say of a model that reads texts and gives the states of tokens.
TEXT = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
# Fields that may only be so, or be left out.
ONLY: dict[str, Any] = {
    "transformer_task": "feature-extraction",
    "modality_config": TEXT,
    "module_output_name": "token_embeddings",
    "model_type": "SentenceTransformer",
    "module_input_name": "sentence_embedding",
}


@dataclasses.dataclass(frozen=True)
class Sentences:
    """How texts become embeddings: the fields of `BertConfig` of the same names."""

    pooling: Pooling = "mean"
    normalize: bool = False
    max_seq_length: int | None = None
    do_lower_case: bool = False
    prompt: str = ""
    similarity: Similarity = "cosine"


def read_sentences(folder: Path) -> Sentences:
    """What a folder says. Without a modules.json a sentence is the mean of all its tokens, as in sentence-transformers.

    Raises:
      AstraError: a file is damaged, or asks for what is not computed here.
    """
    modules = _modules(folder)
    text, model = _texts(folder), _model(folder)
    pooling: tuple[Pooling, bool] = _pooling(folder / modules["Pooling"] / "config.json") if modules else ("mean", True)
    if model["prompt"] and not pooling[1]:
        raise AstraError(
            f"{folder / MODEL}: texts get a prompt that include_prompt keeps out of the pooling, which is not "
            "supported: set default_prompt_name to null"
        )
    return Sentences(pooling[0], "Normalize" in modules, **text, **model)


def sentence_names(folder: Path) -> tuple[str, ...]:
    """The files of sentence-transformers that a folder has, by their names in it."""
    if not (folder / MODULES).is_file():
        return ()
    inner = (f"{path}/config.json" for path in _modules(folder).values() if path)
    return tuple(name for name in (MODULES, SENTENCES, *OLD_NAMES, MODEL, *inner) if (folder / name).is_file())


def companions(folder: Path) -> tuple[str, ...]:
    """The files of a folder that say how a text becomes what the model reads, and an embedding: their names in it."""
    return (*tokenizer_names(folder), *sentence_names(folder))


def copy_companions(source: Path, target: Path) -> None:
    """Makes these files of a folder the same as in another one."""
    copy_files(source, target, sorted({*companions(source), *companions(target)}))


def sentence_notes(folder: Path) -> list[str]:
    """What somebody should know who knows the model from sentence-transformers."""
    prompts = read_json(folder / MODEL).get("prompts") if (folder / MODEL).is_file() else None
    named = [name for name, prompt in (prompts or {}).items() if prompt]
    if not named:
        return []
    return [
        f"{MODEL} has prompts ({', '.join(named)}): only its default_prompt_name is put before texts by itself; "
        "write the others there"
    ]


def sentence_files(config: Any) -> dict[str, Any]:
    """What sentence-transformers reads beside config.json, of a model that came without: file -> content."""
    kinds = ("Transformer", "Pooling", *["Normalize"] * config.normalize)
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    modes = {old: name == config.pooling for name, (old, _) in POOLING_MODES.items()}
    prompts = {"prompts": {"default": config.prompt}, "default_prompt_name": "default"} if config.prompt else {}
    limits = {"max_seq_length": config.max_seq_length, "do_lower_case": config.do_lower_case}
    return {
        MODULES: modules,
        "1_Pooling/config.json": {"word_embedding_dimension": config.hidden_size, **modes},
        SENTENCES: limits,
        MODEL: {**prompts, "similarity_fn_name": config.similarity},
    }


def check_width(folder: Path, hidden_size: int) -> None:
    """Raises AstraError where the pooling is of embeddings of another width than the model's."""
    modules = _modules(folder)
    if not modules:
        return
    where = folder / modules["Pooling"] / "config.json"
    for name in ("word_embedding_dimension", "embedding_dimension"):
        width = read_json(where).get(name, hidden_size)
        if width != hidden_size:
            raise AstraError(
                f"{where}: {name} is {shorten(width)}, but hidden_size in config.json is {hidden_size}: is it the "
                "pooling of another model?"
            )


def _modules(folder: Path) -> dict[str, str]:
    """The kinds of modules and their folders, in order; empty without a modules.json."""
    where = folder / MODULES
    if not where.is_file():
        return {}
    modules = read_json_list(where)
    if not all(isinstance(m, dict) and isinstance(m.get("type"), str) for m in modules):
        raise AstraError(f"{where}: every module must be an object with a type: is the file damaged?")
    for module in modules:
        refuse_unknown(module, ("idx", "name", "path", "type"), where, ADVICE)
    # A class from elsewhere would be code of its own, whatever it is called.
    kinds = [re.sub(r"^sentence_transformers\..*\.", "", module["type"]) for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise AstraError(
            f"{where}: has the modules {', '.join(map(shown, kinds))}; supported are Transformer and Pooling, and then "
            "Normalize"
        )
    paths = [module.get("path", "") for module in modules]
    if paths[0] != "":
        raise AstraError(f"{where}: the Transformer has the path {paths[0]!r}; it must be the folder itself, ''")
    for kind, path in zip(kinds[1:], paths[1:], strict=True):
        if not is_plain_name(path):
            raise AstraError(
                f"{where}: the {kind} has the path {path!r}; it must be the name of a folder beside the file"
            )
    if (folder / paths[-1] / "config.json").is_file() and kinds[-1] == "Normalize":
        _only(folder / paths[-1] / "config.json", ("module_input_name",), also=("module_output_name",))
    return dict(zip(kinds, paths, strict=True))


def shown(name: str) -> str:
    """A name as it is, or in quotes where a line cannot show it."""
    return name if name.isprintable() else shorten(name)


def _only(where: Path, names: tuple[str, ...], also: tuple[str, ...] = ()) -> dict[str, Any]:
    """An object of which the fields `names` may only be as in `ONLY`, and no others are there but `also`."""
    content = read_json(where)
    refuse_unknown(content, (*names, *also), where, ADVICE)
    for name in names:
        if content.get(name) not in (None, ONLY[name]):
            raise AstraError(f"{where}: {name} is {shorten(content[name])}; only {ONLY[name]!r} is supported")
    return content


def _pooling(where: Path) -> tuple[Pooling, bool]:
    """How tokens become one embedding, and whether those of a prompt count."""
    content = read_json(where)
    olds = [old for old, _ in POOLING_MODES.values()]
    known = ("word_embedding_dimension", "embedding_dimension", "include_prompt", "pooling_mode", *olds, *OTHER_MODES)
    refuse_unknown(content, known, where, ADVICE)
    include = _of_type(content, "include_prompt", bool, True, where)
    found = content.get("pooling_mode")
    if found is not None:
        names = {new: name for name, (_, new) in POOLING_MODES.items()}
        modes = found if isinstance(found, list) else [found]
    else:
        names = {old: name for name, (old, _) in POOLING_MODES.items()}
        modes = [name for name, on in content.items() if name.startswith("pooling_mode_") and on]
    if len(modes) != 1 or modes[0] not in list(names):  # which may be of any type
        has = " and ".join(map(shorten, modes)) if found is not None else " and ".join(modes)
        raise AstraError(f"{where}: has {has or 'no pooling_mode'}; supported is one of {', '.join(names)}")
    return names[modes[0]], include


def _texts(folder: Path) -> dict[str, Any]:
    """What happens to texts before the model: the most tokens, and whether they are made lower case."""
    where = next((folder / name for name in (SENTENCES, *OLD_NAMES) if (folder / name).is_file()), None)
    content: Mapping[str, Any] = {}
    if where is not None:
        fixed = ("transformer_task", "modality_config", "module_output_name")
        # How a batch is computed, and lengths that only the tasks of queries and documents have.
        nothing = ("unpad_inputs", "query_length", "document_length")
        content = _only(where, fixed, also=("max_seq_length", "do_lower_case", *nothing, *_EMPTY))
        for name in _EMPTY:
            if content.get(name):
                raise AstraError(f"{where}: {name} is {shorten(content[name])}; it must be empty: {ADVICE}")
    where = where or folder / SENTENCES
    limit = _of_type(content, "max_seq_length", int, None, where)
    return {
        "max_seq_length": _tokenizer_limit(folder) if limit is None else limit,
        "do_lower_case": _of_type(content, "do_lower_case", bool, False, where),
    }


# Arguments of a class; older versions keep an empty object.
_EMPTY = ("model_args", "tokenizer_args", "config_args", "processing_kwargs", "query_expansion")


def _tokenizer_limit(folder: Path) -> int | None:
    """The most tokens, where sentence-transformers from 5.4 on keeps them: the tokenizer's `model_max_length`."""
    where = folder / "tokenizer_config.json"
    limit = read_json(where).get("model_max_length") if where.is_file() else None
    # Some say 10^30, which means none.
    return limit if isinstance(limit, int) and not isinstance(limit, bool) and 1 <= limit < 10**9 else None


def _model(folder: Path) -> dict[str, Any]:
    """What is put before a text, and how embeddings are compared."""
    where = folder / MODEL
    if not where.is_file():
        return {"prompt": "", "similarity": "cosine"}
    read = ("prompts", "default_prompt_name", "similarity_fn_name")
    content = _only(where, ("model_type",), also=(*read, "__version__", "requirements"))
    prompts = _of_type(content, "prompts", dict, {}, where)
    name = _of_type(content, "default_prompt_name", str, None, where)
    if name is not None and name not in prompts:
        raise AstraError(f"{where}: default_prompt_name is {shorten(name)}, which is not among its prompts")
    prompt = (prompts.get(name) or "") if name is not None else ""
    if not isinstance(prompt, str):
        raise AstraError(f"{where}: the prompt {shorten(name)} is {shorten(prompt)}; it must be text")
    # A name that is not known is an error of `BertConfig`.
    return {"prompt": prompt, "similarity": _of_type(content, "similarity_fn_name", str, "cosine", where)}


def _of_type(content: Mapping[str, Any], name: str, kind: type, default: Any, where: Path) -> Any:
    """A field's value, or the default for none. Raises AstraError if it is of another type."""
    value = content.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise AstraError(f"{where}: {name} is {shorten(value)}; it must be of type {kind.__name__}")
    return value
