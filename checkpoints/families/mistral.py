"""The tensors of a Mistral."""

from checkpoints.families.llama import LLAMA, decoder

FAMILIES = {"mistral": decoder("Mistral", "mistral", LLAMA)}
