"""The tensors of an OLMo 2."""

from checkpoints.families.llama import LLAMA, decoder
from checkpoints.families.rows import norm

OLMO2 = (
    *(key for key in LLAMA if "layernorm" not in key.name),
    *norm("layers.{l}.self_attn.q_norm", "blocks.attention.q_norm", "HE"),
    *norm("layers.{l}.self_attn.k_norm", "blocks.attention.k_norm", "JE"),
    *norm("layers.{l}.post_attention_layernorm", "blocks.norm1"),
    *norm("layers.{l}.post_feedforward_layernorm", "blocks.norm2"),
)

FAMILIES = {"olmo2": decoder("Olmo2", "olmo2", OLMO2)}
