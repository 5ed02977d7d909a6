"""The tensors of SigLIP's encoder of pictures."""

from checkpoints.families.clip import ENCODER, OTHERS, POSITIONS
from checkpoints.families.rows import Architecture, Family, Key, linear, norm
from checkpoints.families.vit import sizes

SIGLIP = (
    *ENCODER,
    Key("embeddings.patch_embedding.bias", "D", "embed.bias"),
    Key("head.probe", "1 1 D", "head.probe"),
    Key(
        "head.attention.in_proj_weight",
        *("HE+JE+JE D", "head.q.kernel head.k.kernel head.v.kernel", "D HE+JE+JE"),
    ),
    Key("head.attention.in_proj_bias", "HE+JE+JE", "head.q.bias head.k.bias head.v.bias"),
    *linear("head.attention.out_proj", "head.o", "D", "HE"),
    *norm("head.layernorm", "head.norm"),
    *linear("head.mlp.fc1", "head.up", "F", "D"),
    *linear("head.mlp.fc2", "head.down", "D", "F"),
)

FAMILIES = {
    "siglip_vision_model": Family(
        *("astra_jax.models.siglip", "SiglipVision", "SiglipVisionConfig", "vision_model.", SIGLIP),
        {"SiglipVisionModel": Architecture("image-embedding")},
        sizes,
        skipped=POSITIONS,
        left_out=OTHERS,
    )
}
