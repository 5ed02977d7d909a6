"""The tensors of CLIP's encoder of pictures."""

from typing import Any

from checkpoints.families import vit
from checkpoints.families.rows import Architecture, Family, Key, linear, norm

# SigLIP's are called the same.
ENCODER = (
    Key("embeddings.patch_embedding.weight", "D channel row column", "embed.kernel", "row column channel D"),
    Key("embeddings.position_embedding.weight", "T D", "position"),
    *norm("encoder.layers.{l}.layer_norm1", "blocks.norm1"),
    *linear("encoder.layers.{l}.self_attn.q_proj", "blocks.attention.q", "HE", "D"),
    *linear("encoder.layers.{l}.self_attn.k_proj", "blocks.attention.k", "JE", "D"),
    *linear("encoder.layers.{l}.self_attn.v_proj", "blocks.attention.v", "JE", "D"),
    *linear("encoder.layers.{l}.self_attn.out_proj", "blocks.attention.o", "D", "HE"),
    *norm("encoder.layers.{l}.layer_norm2", "blocks.norm2"),
    *linear("encoder.layers.{l}.mlp.fc1", "blocks.mlp.up", "F", "D"),
    *linear("encoder.layers.{l}.mlp.fc2", "blocks.mlp.down", "D", "F"),
    *norm("post_layernorm", "norm"),
)
# Of the encoder of texts, in folders that have both, and of how their embeddings are compared.
OTHERS = (r"text_model\..*", r"text_projection\.weight", "logit_scale", "logit_bias")
POSITIONS = (r"embeddings\.position_ids",)  # 0, 1, 2, ...

CLIP = (
    Key("embeddings.class_embedding", "D", "cls"),
    *ENCODER,
    *norm("pre_layrnorm", "embed_norm"),
)


def _sizes(config: Any) -> dict[str, int]:
    return vit.sizes(config) | {"projection": config.projection_dim}


FAMILIES = {
    "clip_vision_model": Family(
        *("astra_jax.models.clip", "CLIPVision", "CLIPVisionConfig", "vision_model.", CLIP),
        {
            "CLIPVisionModelWithProjection": Architecture(
                "image-embedding", linear("visual_projection", "head", "projection", "D")
            ),
        },
        _sizes,
        skipped=POSITIONS,
        left_out=OTHERS,
        harmless="dropout",  # of training
    )
}
