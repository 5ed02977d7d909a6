"""Which fields of a config.json change nothing of what a model computes, so that every other one is used or refused.

A field that nobody knows may be what makes a model another one: transformers ignores it, whoever wrote it did not.
"""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from astra_jax.errors import AstraError
from checkpoints.tensor_maps import FAMILIES

# Settings of `generate` that older versions of transformers kept in config.json. Today these have no effect there.
_GENERATION = """
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty forced_bos_token_id
    forced_eos_token_id length_penalty max_length max_new_tokens min_length no_repeat_ngram_size num_beam_groups
    num_beams num_return_sequences output_scores remove_invalid_values repetition_penalty return_dict_in_generate
    suppress_tokens temperature top_k top_p typical_p
"""

# Of all families: names and versions, what is returned beside the output, how training starts, tokens that the
# tokenizer knows itself, and how a program computes (never what).
_EVERYWHERE = """
    _attn_implementation _attn_implementation_autoset _commit_hash _experts_implementation _name_or_path _num_labels
    attn_implementation auto_map bos_token_id chunk_size_feed_forward cls_token_id decoder_start_token_id dtype
    eos_token_id finetuning_task gradient_checkpointing initializer_factor initializer_range is_decoder
    keys_to_ignore_at_inference label2id mask_token_id model_max_length name_or_path neftune_noise_alpha
    output_attentions output_hidden_states output_past pad_token_id prefix return_dict sep_token_id
    task_specific_params tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class torch_dtype
    torchscript transformers.js_config transformers_version unk_token_id unsloth_fixed unsloth_version use_bfloat16
    use_cache
"""

# What the dropout of a family is called: it is only of training, and finetuning here does without.
_DROPOUT = """
    attention_dropout attention_probs_dropout_prob attn_pdrop classifier_dropout embd_pdrop hidden_dropout
    hidden_dropout_prob resid_pdrop summary_first_dropout
"""

# What a field may only be; where it says something else nothing here computes it. A family may have more.
FIXED: dict[str, Any] = {"is_encoder_decoder": False, "add_cross_attention": False, "use_sliding_window": False}
# What may be there, but hold nothing.
EMPTY = ("pruned_heads", "per_layer_config", "cross_attention_hidden_size", "use_bidirectional_attention")


def known_to_change_nothing(family: str) -> frozenset[str]:
    """The fields of a family's config.json that are read past."""
    return frozenset(" ".join((_GENERATION, _EVERYWHERE, _DROPOUT, FAMILIES[family].harmless)).split())


def refuse_unknown(content: Mapping[str, Any], known: Collection[str], where: Path, advice: str) -> None:
    """Raises AstraError with every field of a JSON object that is not known; null says nothing, and is none."""
    unknown = [name for name, value in content.items() if name not in known and value is not None]
    if unknown:
        shown = ", ".join(f"{name} {shorten(content[name])}" for name in unknown[:4])
        more = f" and {len(unknown) - 4} more" if len(unknown) > 4 else ""
        raise AstraError(f"{where}: has {shown}{more}, which is not known here and might change the result: {advice}")


def shorten(value: Any, most: int = 60) -> str:
    """A value as an error shows it: not longer than a line."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def one_value(content: Mapping[str, Any], names: Iterable[str], where: Path) -> Any:
    """The value that one or several names of the same field have; None where none is there.

    Raises:
      AstraError: they have different ones.
    """
    found = {name: content[name] for name in names if content.get(name) is not None}
    first = next(iter(found.values()), None)
    if any(value != first for value in found.values()):
        values = " and ".join(f"{name} {shorten(value)}" for name, value in found.items())
        raise AstraError(f"{where}: has {values}, which are names of the same field: remove the wrong one")
    return first


# Fields of a generation_config.json that do not change how a text goes on, or are read: where it starts and ends, what
# pads a batch, what is returned, and how memory is used.
_NO_CHOICE = """
    _from_model_config bos_token_id cache_config cache_implementation compile_config continuous_batching_config
    decoder_start_token_id disable_compile eos_token_id is_assistant low_memory max_cache_len output_attentions
    output_hidden_states output_logits output_scores pad_token_id prefill_chunk_size return_dict_in_generate
    transformers_version use_cache
"""
# What says nothing: what is so without it.
_AS_USUAL = {"temperature": 1, "top_p": 1, "top_k": 50, "repetition_penalty": 1, "num_beams": 1, "max_length": 20}


def check_generation(content: Mapping[str, Any], where: Path) -> None:
    """Raises AstraError unless what ends a text is a token, several, or none."""
    ids = content.get("eos_token_id")
    for id in ids if isinstance(ids, list) else [ids]:
        if id is not None and (not isinstance(id, int) or isinstance(id, bool) or id < 0):
            raise AstraError(f"{where}: eos_token_id is {shorten(ids)}; it must be a whole number, or a list of such")


def generation_settings(content: Mapping[str, Any]) -> list[str]:
    """The settings of a generation_config.json that say how a text goes on, and differ from saying nothing."""
    return [
        f"{name} {shorten(value)}"
        for name, value in content.items()
        if name not in _NO_CHOICE.split() and value not in (None, False, _AS_USUAL.get(name))
    ]


def eos_ids(generation: Mapping[str, Any] | None, hf_config: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens that end a text, by a generation_config.json or else a config.json (`Checkpoint.eos_ids`)."""
    ids = (generation or {}).get("eos_token_id")
    ids = hf_config.get("eos_token_id") if ids is None else ids
    found = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if any(isinstance(id, bool) or not isinstance(id, int) or not -1 <= id < 2**31 for id in found):
        raise AstraError(
            f"eos_token_id is {ids!r}; it must be the number of a token, or a list of them: correct it in "
            "generation_config.json or config.json, and convert the model again"
        )
    return tuple(found)
