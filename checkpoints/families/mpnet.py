"""The tensors of an MPNet."""

from typing import Any

from checkpoints.families import bert, roberta
from checkpoints.families.rows import Architecture, Family, Key, linear, norm

MPNET = (
    Key("embeddings.word_embeddings.weight", "V D", "embed.embedding"),
    Key("embeddings.position_embeddings.weight", "T D", "position"),
    *norm("embeddings.LayerNorm", "embed_norm"),
    Key("encoder.relative_attention_bias.weight", "buckets H", "relative"),
    *linear("encoder.layer.{l}.attention.attn.q", "blocks.attention.q", "HE", "D"),
    *linear("encoder.layer.{l}.attention.attn.k", "blocks.attention.k", "JE", "D"),
    *linear("encoder.layer.{l}.attention.attn.v", "blocks.attention.v", "JE", "D"),
    *linear("encoder.layer.{l}.attention.attn.o", "blocks.attention.o", "D", "HE"),
    *norm("encoder.layer.{l}.attention.LayerNorm", "blocks.norm1"),
    *linear("encoder.layer.{l}.intermediate.dense", "blocks.mlp.up", "F", "D"),
    *linear("encoder.layer.{l}.output.dense", "blocks.mlp.down", "D", "F"),
    *norm("encoder.layer.{l}.output.LayerNorm", "blocks.norm2"),
    *linear("pooler.dense", "pooler", "pooled", "D"),
)


def _sizes(config: Any) -> dict[str, int]:
    more = {"buckets": config.relative_attention_num_buckets, "H": config.num_attention_heads}
    return bert.sizes(config) | more


FAMILIES = {
    "mpnet": Family(
        *("astra_jax.models.mpnet", "MPNet", "MPNetConfig", "mpnet.", MPNET),
        {
            "MPNetModel": Architecture("embedding"),
            "MPNetForMaskedLM": roberta.MASKED_LM,
            "MPNetForSequenceClassification": Architecture("classification", roberta.CLASSIFIER),
        },
        _sizes,
        skipped=(r"embeddings\.position_ids",),
    )
}
