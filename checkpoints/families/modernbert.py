"""The tensors of a ModernBERT: queries, keys and values are one, and so are the two projections of its MLP."""

from typing import Any

from checkpoints.families.rows import Architecture, Family, Key, common_sizes, linear, masked_lm, norm

MODERNBERT = (
    Key("embeddings.tok_embeddings.weight", "V D", "embed.embedding"),
    *norm("embeddings.norm", "embed_norm"),
    *(key._replace(since=1) for key in norm("layers.{l}.attn_norm", "blocks.norm1")),
    *linear(
        "layers.{l}.attn.Wqkv",
        "blocks.attention.q blocks.attention.k blocks.attention.v",
        "HE+JE+JE",
        "D",
    ),
    *linear("layers.{l}.attn.Wo", "blocks.attention.o", "D", "HE"),
    *norm("layers.{l}.mlp_norm", "blocks.norm2"),
    *linear("layers.{l}.mlp.Wi", "blocks.mlp.gate blocks.mlp.up", "F+F", "D"),
    *linear("layers.{l}.mlp.Wo", "blocks.mlp.down", "D", "F"),
    *norm("final_norm", "norm"),
)
CLASSIFIER = (
    *linear("head.dense", "head.dense", "pooled", "D"),
    *norm("head.norm", "head.norm"),
    *linear("classifier", "head.out", "C", "D"),
)


def _sizes(config: Any) -> dict[str, int]:
    D = config.hidden_size
    return common_sizes(D, D, D, config) | {"V": config.vocab_size, "pooled": D}


FAMILIES = {
    "modernbert": Family(
        *("astra_jax.models.modernbert", "ModernBert", "ModernBertConfig", "model.", MODERNBERT),
        {
            "ModernBertModel": Architecture("embedding"),
            "ModernBertForMaskedLM": masked_lm(
                *("head.dense", "head.norm", "decoder", "decoder.bias", "embeddings.tok_embeddings")
            ),
            "ModernBertForSequenceClassification": Architecture("classification", CLASSIFIER),
        },
        _sizes,
        # How training starts, drops out and is sped up; names of fields that are gone.
        harmless="initializer_cutoff_factor embedding_dropout mlp_dropout deterministic_flash_attn sparse_prediction "
        "sparse_pred_ignore_index reference_compile repad_logits_with_grad layer_norm_eps position_embedding_type",
    )
}
