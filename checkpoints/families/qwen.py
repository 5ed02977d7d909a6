"""The tensors of Qwen2 and Qwen3."""

from checkpoints.families.llama import LLAMA, decoder
from checkpoints.families.rows import norm

HEAD_NORMS = (
    *norm("layers.{l}.self_attn.q_norm", "blocks.attention.q_norm", "E"),
    *norm("layers.{l}.self_attn.k_norm", "blocks.attention.k_norm", "E"),
)

FAMILIES = {
    "qwen2": decoder("Qwen2", "qwen", LLAMA),
    "qwen3": decoder("Qwen3", "qwen", (*LLAMA, *HEAD_NORMS)),
}
