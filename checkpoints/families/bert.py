"""The tensors of a BERT."""

from typing import Any

from checkpoints.families.rows import Architecture, Family, Key, common_sizes, linear, masked_lm, norm

BERT = (
    Key("embeddings.word_embeddings.weight", "V D", "embed.embedding"),
    Key("embeddings.position_embeddings.weight", "T D", "position"),
    Key("embeddings.token_type_embeddings.weight", "type D", "token_type"),
    *norm("embeddings.LayerNorm", "embed_norm"),
    *linear("encoder.layer.{l}.attention.self.query", "blocks.attention.q", "HE", "D"),
    *linear("encoder.layer.{l}.attention.self.key", "blocks.attention.k", "JE", "D"),
    *linear("encoder.layer.{l}.attention.self.value", "blocks.attention.v", "JE", "D"),
    *linear("encoder.layer.{l}.attention.output.dense", "blocks.attention.o", "D", "HE"),
    *norm("encoder.layer.{l}.attention.output.LayerNorm", "blocks.norm1"),
    *linear("encoder.layer.{l}.intermediate.dense", "blocks.mlp.up", "F", "D"),
    *linear("encoder.layer.{l}.output.dense", "blocks.mlp.down", "D", "F"),
    *norm("encoder.layer.{l}.output.LayerNorm", "blocks.norm2"),
    *linear("pooler.dense", "pooler", "pooled", "D"),
)


def sizes(config: Any) -> dict[str, int]:
    """`type` counts the kinds of sentences."""
    D = config.hidden_size
    more = {"V": config.vocab_size, "T": config.max_position_embeddings, "type": config.type_vocab_size, "pooled": D}
    return common_sizes(D, D, D, config) | more


FAMILIES = {
    "bert": Family(
        *("astra_jax.models.bert", "Bert", "BertConfig", "bert.", BERT),
        {
            "BertModel": Architecture("embedding"),
            "BertForMaskedLM": masked_lm(
                *("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),
                *("cls.predictions.decoder", "cls.predictions.bias"),
            ),
            "BertForSequenceClassification": Architecture("classification", linear("classifier", "head", "C", "D")),
        },
        sizes,
        skipped=(r"embeddings\.position_ids",),
        renamed=(("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")),
        left_out=(r"cls\.seq_relationship\.(weight|bias)",),  # whether a sentence follows another one
        # Of the original release's pooler, which is always the class token behind a dense layer.
        harmless="directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers "
        "pooler_size_per_head pooler_type",
    )
}
