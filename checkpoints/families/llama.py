"""The tensors of a Llama, and of what is built as one."""

from typing import Any

from checkpoints.families.rows import Architecture, Family, Key, common_sizes, linear, norm

LLAMA = (
    Key("embed_tokens.weight", "V D", "embed.embedding"),
    *norm("layers.{l}.input_layernorm", "blocks.norm1"),
    *linear("layers.{l}.self_attn.q_proj", "blocks.attention.q", "HE", "D"),
    *linear("layers.{l}.self_attn.k_proj", "blocks.attention.k", "JE", "D"),
    *linear("layers.{l}.self_attn.v_proj", "blocks.attention.v", "JE", "D"),
    *linear("layers.{l}.self_attn.o_proj", "blocks.attention.o", "D", "HE"),
    *norm("layers.{l}.post_attention_layernorm", "blocks.norm2"),
    *linear("layers.{l}.mlp.gate_proj", "blocks.mlp.gate", "F", "D"),
    *linear("layers.{l}.mlp.up_proj", "blocks.mlp.up", "F", "D"),
    *linear("layers.{l}.mlp.down_proj", "blocks.mlp.down", "D", "F"),
    *norm("norm", "norm"),
)


def sizes(config: Any) -> dict[str, int]:
    """Lengths of the axes in the tables of decoders; E is the width of a head."""
    HE, JE = config.num_attention_heads * config.E, config.J * config.E
    return common_sizes(config.hidden_size, HE, JE, config) | {"V": config.vocab_size, "E": config.E}


def decoder(name: str, module: str, keys: tuple[Key, ...], harmless: str = "", lm: str = "") -> Family:
    """A family whose classes are called as Llama's: `NameForCausalLM` and `NameForSequenceClassification`.

    Args:
      name: of its model in `astra_jax/models/MODULE.py`.
      keys: of the common part.
      harmless: fields of a config.json that change nothing, besides those of all families.
      lm: the class with a language-model head, where it is called otherwise.
    """
    return Family(
        *(f"astra_jax.models.{module}", name, f"{name}Config", "model.", keys),
        {
            lm or f"{name}ForCausalLM": Architecture(
                "causal-lm", linear("lm_head", "head", "V", "D"), tied="embed_tokens.weight"
            ),
            f"{name}ForSequenceClassification": Architecture("classification", linear("score", "head", "C", "D")),
        },
        sizes,
        skipped=(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
        # How matrices are cut that are multiplied as a whole; who else writes the same model.
        harmless=f"is_llama_config max_sequence_length pretraining_tp {harmless}",
    )


FAMILIES = {"llama": decoder("Llama", "llama", LLAMA)}
