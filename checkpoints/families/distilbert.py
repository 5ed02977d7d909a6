"""The tensors of a DistilBERT."""

from checkpoints.families.bert import sizes
from checkpoints.families.rows import Architecture, Family, Key, linear, masked_lm, norm

DISTILBERT = (
    Key("embeddings.word_embeddings.weight", "V D", "embed.embedding"),
    Key("embeddings.position_embeddings.weight", "T D", "position"),
    *norm("embeddings.LayerNorm", "embed_norm"),
    *linear("transformer.layer.{l}.attention.q_lin", "blocks.attention.q", "HE", "D"),
    *linear("transformer.layer.{l}.attention.k_lin", "blocks.attention.k", "JE", "D"),
    *linear("transformer.layer.{l}.attention.v_lin", "blocks.attention.v", "JE", "D"),
    *linear("transformer.layer.{l}.attention.out_lin", "blocks.attention.o", "D", "HE"),
    *norm("transformer.layer.{l}.sa_layer_norm", "blocks.norm1"),
    *linear("transformer.layer.{l}.ffn.lin1", "blocks.mlp.up", "F", "D"),
    *linear("transformer.layer.{l}.ffn.lin2", "blocks.mlp.down", "D", "F"),
    *norm("transformer.layer.{l}.output_layer_norm", "blocks.norm2"),
)
CLASSIFIER = (
    *linear("pre_classifier", "head.dense", "pooled", "D"),
    *linear("classifier", "head.out", "C", "pooled"),
)

FAMILIES = {
    "distilbert": Family(
        *("astra_jax.models.distilbert", "DistilBert", "DistilBertConfig", "distilbert.", DISTILBERT),
        {
            "DistilBertModel": Architecture("embedding"),
            "DistilBertForMaskedLM": masked_lm(
                "vocab_transform", "vocab_layer_norm", "vocab_projector", "vocab_projector.bias"
            ),
            "DistilBertForSequenceClassification": Architecture("classification", CLASSIFIER),
        },
        sizes,
        skipped=(r"embeddings\.position_ids",),
        # Dropout; how the table of positions was made, which is stored; an old name for a tied decoder.
        harmless="dropout qa_dropout seq_classif_dropout sinusoidal_pos_embds tie_weights_",
    )
}
