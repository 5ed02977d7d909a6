"""The tensors of a ViT."""

from typing import Any

from checkpoints.families.rows import Architecture, Family, Key, common_sizes, linear, norm

PATCHES = (
    Key("embeddings.position_embeddings", "1 T D", "position"),
    Key(
        "embeddings.patch_embeddings.projection.weight", "D channel row column", "embed.kernel", "row column channel D"
    ),
    Key("embeddings.patch_embeddings.projection.bias", "D", "embed.bias"),
)
ATTENTION = (
    *linear("encoder.layer.{l}.attention.attention.query", "blocks.attention.q", "HE", "D"),
    *linear("encoder.layer.{l}.attention.attention.key", "blocks.attention.k", "JE", "D"),
    *linear("encoder.layer.{l}.attention.attention.value", "blocks.attention.v", "JE", "D"),
    *linear("encoder.layer.{l}.attention.output.dense", "blocks.attention.o", "D", "HE"),
)
VIT = (
    Key("embeddings.cls_token", "1 1 D", "cls"),
    *PATCHES,
    *norm("encoder.layer.{l}.layernorm_before", "blocks.norm1"),
    *ATTENTION,
    *norm("encoder.layer.{l}.layernorm_after", "blocks.norm2"),
    *linear("encoder.layer.{l}.intermediate.dense", "blocks.mlp.up", "F", "D"),
    *linear("encoder.layer.{l}.output.dense", "blocks.mlp.down", "D", "F"),
    *norm("layernorm", "norm"),
)


# Of heads that are not read: pooler, masked patches.
HARMLESS = "encoder_stride pooler_act pooler_output_size"


def sizes(config: Any) -> dict[str, int]:
    """Lengths of the axes of families that read pictures. T are places."""
    D, P = config.hidden_size, config.patch_size
    more = {"T": config.positions, "channel": config.num_channels, "row": P, "column": P}
    return common_sizes(D, D, D, config) | more


FAMILIES = {
    "vit": Family(
        *("astra_jax.models.vit", "ViT", "ViTConfig", "vit.", VIT),
        {"ViTForImageClassification": Architecture(None, linear("classifier", "head", "C", "D"))},
        sizes,
        harmless=HARMLESS,
    )
}
