"""Hugging Face <-> Flax weights, and the checkpoint store. See `store` for the format."""
