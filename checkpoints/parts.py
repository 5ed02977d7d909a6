"""Folders of several models, of which one is read: of CLIP and SigLIP the encoder of pictures, not that of texts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from astra_jax.errors import AstraError
from checkpoints.fields import shorten

# `model_type` of the whole -> that of the part, and the class that has it alone.
PARTS = {
    "clip": ("clip_vision_model", "CLIPVisionModelWithProjection"),
    "siglip": ("siglip_vision_model", "SiglipVisionModel"),
}
WIDTH = "projection_dim"  # of the embeddings of both encoders, which the whole says of CLIP


def part_of(hf_config: Mapping[str, Any], where: Path) -> dict[str, Any] | None:
    """What the config.json of the part that is read would be; None where the folder is of one model.

    Raises:
      AstraError: the whole says nothing of the part.
    """
    model_type = hf_config.get("model_type")
    if not isinstance(model_type, str) or model_type not in PARTS:
        return None
    # As in transformers, the old name of the field is the whole truth where it is there.
    found = hf_config.get("vision_config_dict") or hf_config.get("vision_config")
    if not isinstance(found, dict):
        raise AstraError(f"{where}: vision_config is {shorten(found)}; it must be an object")
    family, architecture = PARTS[model_type]
    width = {WIDTH: hf_config[WIDTH]} if WIDTH in hf_config else {}
    return {**found, **width, "model_type": family, "architectures": [architecture]}
