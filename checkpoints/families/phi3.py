"""The tensors of a Phi-3: queries, keys and values are one, and so are the MLP's two projections."""

from checkpoints.families.llama import decoder
from checkpoints.families.rows import Key, linear, norm

PHI3 = (
    Key("embed_tokens.weight", "V D", "embed.embedding"),
    *norm("layers.{l}.input_layernorm", "blocks.norm1"),
    *linear(
        "layers.{l}.self_attn.qkv_proj",
        "blocks.attention.q blocks.attention.k blocks.attention.v",
        "HE+JE+JE",
        "D",
    ),
    *linear("layers.{l}.self_attn.o_proj", "blocks.attention.o", "D", "HE"),
    *norm("layers.{l}.post_attention_layernorm", "blocks.norm2"),
    *linear("layers.{l}.mlp.gate_up_proj", "blocks.mlp.gate blocks.mlp.up", "F+F", "D"),
    *linear("layers.{l}.mlp.down_proj", "blocks.mlp.down", "D", "F"),
    *norm("norm", "norm"),
)

FAMILIES = {"phi3": decoder("Phi3", "phi3", PHI3, "embd_pdrop")}
