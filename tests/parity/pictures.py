"""Models of pictures of transformers that ours are compared with: which, and module by module."""

from typing import Any

from tests.parity.theirs import Theirs, same

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.1,
}
BASE: dict[str, dict[str, Any]] = {
    "deit": {**TINY, "intermediate_size": 48, "num_labels": 5},
    "dinov2": {**TINY, "mlp_ratio": 2, "num_labels": 5},
    "dinov2_with_registers": {**TINY, "mlp_ratio": 2, "num_register_tokens": 3},
    "clip_vision_model": {**TINY, "intermediate_size": 48, "projection_dim": 24},
    "siglip_vision_model": {**TINY, "intermediate_size": 48},
}

# Name -> Hugging Face class and what differs from the base.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "deit": ("DeiTForImageClassification", {}),
    "deit, teacher": ("DeiTForImageClassificationWithTeacher", {"qkv_bias": False, "hidden_act": "relu"}),
    "dinov2": ("Dinov2Model", {"use_swiglu_ffn": True, "use_mask_token": False}),
    "dinov2, classes": ("Dinov2ForImageClassification", {}),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", {"qkv_bias": False}),
    "dinov2_with_registers, classes": ("Dinov2WithRegistersForImageClassification", {"num_labels": 4}),
    "clip_vision_model, gelu": ("CLIPVisionModelWithProjection", {"hidden_act": "gelu"}),
    "clip_vision_model": ("CLIPVisionModelWithProjection", {"num_channels": 1}),
    "siglip_vision_model, large weights": ("SiglipVisionModel", {"initializer_range": 0.3}),
}

# Name -> pixels on a side of what the model reads, where the table of places is for another size.
SIDES = {"dinov2": 24, "dinov2, classes": 12, "dinov2_with_registers": 12, "dinov2_with_registers, classes": 20}

PROJECTIONS = {f"attention.{name}": same(f".attention.{name}_proj") for name in "qkvo"}
DINOV2: dict[str, Theirs] = {
    "norm1": same(".norm1"),
    **PROJECTIONS,
    "attention": same(".attention"),
    "norm2": same(".norm2"),
    "": same(""),
}
CLIP: dict[str, Theirs] = {
    "norm1": same(".layer_norm1"),
    **{f"attention.{name}": same(f".self_attn.{name}_proj") for name in "qkv"},
    "attention.o": same(".self_attn.out_proj"),
    "attention": same(".self_attn"),
    "norm2": same(".layer_norm2"),
    "mlp": same(".mlp"),
    "": same(""),
}
# Our module of a block (the block itself is empty) -> theirs, within their block.
MODULES: dict[str, tuple[str, dict[str, Theirs]]] = {
    "deit": (
        "layers.{l}",
        {
            "norm1": same(".layernorm_before"),
            **PROJECTIONS,
            "attention": same(".attention"),
            "norm2": same(".layernorm_after"),
            "mlp": same(".mlp"),
            "": same(""),
        },
    ),
    "dinov2": ("encoder.layer.{l}", DINOV2),
    "clip_vision_model": ("encoder.layers.{l}", CLIP),
    "siglip_vision_model": ("encoder.layers.{l}", CLIP),
    "dinov2_with_registers": ("encoder.layer.{l}", DINOV2),
}
# Their norm behind the last block; and what is ours of what they return, of which the first that is there.
LAST_NORM = {"deit": "layernorm", "dinov2": "layernorm", "dinov2_with_registers": "layernorm"} | {
    "clip_vision_model": "post_layernorm",
    "siglip_vision_model": "post_layernorm",
}
OUTPUT = ("logits", "image_embeds", "pooler_output")

# Models of pictures and texts: their part that is read, and fields of the other one.
_TEXTS = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 50,
}
WHOLES: dict[str, tuple[str, dict[str, Any]]] = {
    "CLIPModel": ("clip_vision_model", {**_TEXTS, "projection_dim": 12}),
    "SiglipModel": ("siglip_vision_model", _TEXTS),
}
