"""What models read: images, and batches of token ids."""

from typing import Literal

InputKind = Literal["images", "text"]  # what a model reads: `input_kind` of a model and of its configuration
