"""The tensors of Gemma 2 and Gemma 3."""

from checkpoints.families.llama import LLAMA, decoder
from checkpoints.families.qwen import HEAD_NORMS
from checkpoints.families.rows import norm

GEMMA2 = (
    *(key for key in LLAMA if "layernorm" not in key.name),
    *norm("layers.{l}.input_layernorm", "blocks.norm1"),
    *norm("layers.{l}.post_attention_layernorm", "blocks.norm1_after"),
    *norm("layers.{l}.pre_feedforward_layernorm", "blocks.norm2"),
    *norm("layers.{l}.post_feedforward_layernorm", "blocks.norm2_after"),
)

# `hidden_activation` and `layer_types` are what counts; how a cache is laid out.
HARMLESS = "hidden_act _sliding_window_pattern cache_implementation"

FAMILIES = {
    "gemma2": decoder("Gemma2", "gemma", GEMMA2, HARMLESS),
    "gemma3_text": decoder("Gemma3Text", "gemma", (*GEMMA2, *HEAD_NORMS), HARMLESS, lm="Gemma3ForCausalLM"),
}
