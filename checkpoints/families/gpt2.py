"""The tensors of a GPT-2."""

from typing import Any

from checkpoints.families.rows import Architecture, Family, Key, common_sizes, linear, norm


def _conv1d(name: str, paths: str, inputs: str, outputs: str) -> tuple[Key, Key]:
    """GPT-2's own linear layer, which is kept as (inputs, outputs)."""
    kernels, biases = (" ".join(f"{path}.{kind}" for path in paths.split()) for kind in ("kernel", "bias"))
    return Key(f"{name}.weight", f"{inputs} {outputs}", kernels), Key(f"{name}.bias", outputs, biases)


GPT2 = (
    Key("wte.weight", "V D", "embed.embedding"),
    Key("wpe.weight", "T D", "position"),
    *norm("h.{l}.ln_1", "blocks.norm1"),
    *_conv1d("h.{l}.attn.c_attn", "blocks.attention.q blocks.attention.k blocks.attention.v", "D", "HE+JE+JE"),
    *_conv1d("h.{l}.attn.c_proj", "blocks.attention.o", "HE", "D"),
    *norm("h.{l}.ln_2", "blocks.norm2"),
    *_conv1d("h.{l}.mlp.c_fc", "blocks.mlp.up", "D", "F"),
    *_conv1d("h.{l}.mlp.c_proj", "blocks.mlp.down", "F", "D"),
    *norm("ln_f", "norm"),
)


def _sizes(config: Any) -> dict[str, int]:
    D = config.n_embd
    return common_sizes(D, D, D, config) | {"V": config.vocab_size, "T": config.n_positions}


FAMILIES = {
    "gpt2": Family(
        *("astra_jax.models.gpt2", "GPT2", "GPT2Config", "transformer.", GPT2),
        {
            "GPT2LMHeadModel": Architecture("causal-lm", linear("lm_head", "head", "V", "D"), tied="wte.weight"),
            "GPT2ForSequenceClassification": Architecture("classification", linear("score", "head", "C", "D")),
        },
        _sizes,
        skipped=(r"h\.\d+\.attn\.(masked_)?bias",),
        # Of the double-head class; the size of a mask that every position has today; how float16 rounds scores.
        harmless="n_ctx n_special predict_special_tokens reorder_and_upcast_attn summary_activation "
        "summary_proj_to_labels summary_type summary_use_proj",
    )
}
