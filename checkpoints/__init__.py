"""Hugging Face <-> Flax weights, and the checkpoint store. See `store` for the format."""

from checkpoints.description import Checkpoint
from checkpoints.store import load, read_meta, save, with_codebooks

__all__ = ["Checkpoint", "load", "read_meta", "save", "with_codebooks"]
