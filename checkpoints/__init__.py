"""Hugging Face <-> Flax weights, and the checkpoint store. See `store` for the format."""

from checkpoints.description import Checkpoint
from checkpoints.store import files, load, read_meta, save, with_codebooks

__all__ = ["Checkpoint", "files", "load", "read_meta", "save", "with_codebooks"]
