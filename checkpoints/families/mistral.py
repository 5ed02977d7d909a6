"""The tensors of Mistral and Ministral 3."""

from checkpoints.families.llama import LLAMA, decoder

FAMILIES = {
    "mistral": decoder("Mistral", "mistral", LLAMA),
    "ministral3": decoder("Ministral3", "mistral", LLAMA),
}
