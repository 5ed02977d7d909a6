"""The tensors of a SmolLM3."""

from checkpoints.families.llama import LLAMA, decoder

FAMILIES = {"smollm3": decoder("SmolLM3", "smollm3", LLAMA, "max_window_layers")}
