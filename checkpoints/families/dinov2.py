"""The tensors of a DINOv2, with registers or without."""

from typing import Any

from checkpoints.families import vit
from checkpoints.families.rows import Architecture, Family, Key, linear, norm

DINOV2 = (
    Key("embeddings.cls_token", "1 1 D", "cls"),
    Key("embeddings.register_tokens", "1 registers D", "registers"),
    Key("embeddings.mask_token", "1 D", "mask"),
    *vit.PATCHES,
    *norm("encoder.layer.{l}.norm1", "blocks.norm1"),
    *vit.ATTENTION,
    Key("encoder.layer.{l}.layer_scale1.lambda1", "D", "blocks.scale1"),
    *norm("encoder.layer.{l}.norm2", "blocks.norm2"),
    *linear("encoder.layer.{l}.mlp.fc1", "blocks.mlp.up", "F", "D"),
    *linear("encoder.layer.{l}.mlp.fc2", "blocks.mlp.down", "D", "F"),
    *linear("encoder.layer.{l}.mlp.weights_in", "blocks.swiglu.gate blocks.swiglu.up", "F+F", "D"),
    *linear("encoder.layer.{l}.mlp.weights_out", "blocks.swiglu.down", "D", "F"),
    Key("encoder.layer.{l}.layer_scale2.lambda1", "D", "blocks.scale2"),
    *norm("layernorm", "norm"),
)


def _sizes(config: Any) -> dict[str, int]:
    """`read` is what a classifier reads: the class token, and the mean of all patches."""
    return vit.sizes(config) | {"read": 2 * config.hidden_size, "registers": config.num_register_tokens}


def _family(name: str, prefix: str) -> Family:
    return Family(
        *("astra_jax.models.dinov2", "Dinov2", f"{name}Config", prefix, DINOV2),
        {
            f"{name}Model": Architecture("image-embedding"),
            f"{name}ForImageClassification": Architecture("classification", linear("classifier", "head", "C", "read")),
        },
        _sizes,
        # What training starts from and leaves out, and what is returned where the model is part of another one.
        harmless="layerscale_value drop_path_rate apply_layernorm reshape_hidden_states out_features out_indices "
        "stage_names",
    )


FAMILIES = {
    "dinov2": _family("Dinov2", "dinov2."),
    "dinov2_with_registers": _family("Dinov2WithRegisters", "dinov2_with_registers."),
}
