"""Models of pictures of transformers that ours are compared with: which, and module by module."""

from typing import Any

from tests.parity.theirs import Theirs, same

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.1,
}
BASE: dict[str, dict[str, Any]] = {
    "deit": {**TINY, "num_labels": 5},
}

# Name -> Hugging Face class and what differs from the base.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "deit": ("DeiTForImageClassification", {}),
    "deit, teacher": ("DeiTForImageClassificationWithTeacher", {"qkv_bias": False, "hidden_act": "relu"}),
}

PROJECTIONS = {f"attention.{name}": same(f".attention.{name}_proj") for name in "qkvo"}
# Our module of a block (the block itself is empty) -> theirs, within their block.
MODULES: dict[str, tuple[str, dict[str, Theirs]]] = {
    "deit": (
        "deit.layers.{l}",
        {
            "norm1": same(".layernorm_before"),
            **PROJECTIONS,
            "attention": same(".attention"),
            "norm2": same(".layernorm_after"),
            "mlp": same(".mlp"),
            "": same(""),
        },
    ),
}
# Their norm behind the last block, and what they return that is ours.
LAST_NORM = {"deit": "deit.layernorm"}
OUTPUT = {"deit": "logits"}
