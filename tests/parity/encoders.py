"""Encoders of texts of transformers that ours are compared with: which, and module by module."""

from typing import Any

from tests.parity.theirs import PAD, Theirs, same

BERT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
# Places begin behind that of padding.
ROBERTA = BERT | {"pad_token_id": PAD, "max_position_embeddings": 96, "type_vocab_size": 1}
DISTILBERT: dict[str, Any] = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 48,
    "max_position_embeddings": 40,
}
# Three blocks: the first without a norm, one that sees all and two with a window of 3 tokens to each side.
MODERN: dict[str, Any] = {
    **{name: BERT[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")},
    "num_hidden_layers": 3,
    "local_attention": 6,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
BASE = {
    "modernbert": MODERN,
    "bert": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "distilbert": DISTILBERT,
    "mpnet": BERT,
}

# Name -> Hugging Face class and what differs from the base.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", {}),
    "bert, relu, epsilon, one head": (
        "BertModel",
        {"hidden_act": "relu", "layer_norm_eps": 1e-2, "num_attention_heads": 1, "num_hidden_layers": 1},
    ),
    "bert, classes": ("BertForSequenceClassification", {"num_labels": 5}),
    "roberta": ("RobertaModel", {}),
    "roberta, classes": ("RobertaForSequenceClassification", {"num_labels": 5}),
    "xlm-roberta, classes": ("XLMRobertaForSequenceClassification", {"type_vocab_size": 2}),
    "modernbert": ("ModernBertModel", {}),
    "modernbert, biases, mean": (
        "ModernBertForSequenceClassification",
        {
            "norm_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "classifier_bias": True,
            "num_labels": 5,
            "classifier_pooling": "mean",
            "classifier_activation": "relu",
        },
    ),
    "modernbert, classes": ("ModernBertForSequenceClassification", {"num_labels": 5}),
    "distilbert, sines": ("DistilBertModel", {"sinusoidal_pos_embds": True, "activation": "relu"}),
    "mpnet": ("MPNetModel", {}),
    "mpnet, classes": ("MPNetForSequenceClassification", {"num_labels": 5, "relative_attention_num_buckets": 40}),
    "distilbert, classes": ("DistilBertForSequenceClassification", {"num_labels": 5}),
}

# What is kept and not computed: only how it is read and written is compared.
MASKED_LM: dict[str, tuple[str, dict[str, Any]]] = {
    "bert, masked words": ("BertForMaskedLM", {}),
    "modernbert, masked words": ("ModernBertForMaskedLM", {}),
    "modernbert, masked words, no bias": ("ModernBertForMaskedLM", {"decoder_bias": False, "norm_bias": True}),
    "roberta, masked words": ("RobertaForMaskedLM", {}),
    "mpnet, masked words": ("MPNetForMaskedLM", {}),
    "distilbert, masked words": ("DistilBertForMaskedLM", {}),
}

# Our module of a block (the block itself is empty) -> theirs, within their block.
Modules = tuple[str, dict[str, Theirs]]
BERT_BLOCK: Modules = (
    "encoder.layer.{l}",
    {
        "attention.q": same(".attention.self.query"),
        "attention.k": same(".attention.self.key"),
        "attention.v": same(".attention.self.value"),
        "attention.o": same(".attention.output.dense"),
        "attention": Theirs("", ".attention.output.dense"),
        "norm1": same(".attention.output.LayerNorm"),
        "mlp": Theirs(".intermediate.dense", ".output.dense"),
        "norm2": same(".output.LayerNorm"),
        "": same(""),
    },
)
MODERN_BLOCK: Modules = (
    "layers.{l}",
    {
        "attention.o": same(".attn.Wo"),
        "attention": same(".attn"),
        "norm2": same(".mlp_norm"),
        "mlp": same(".mlp"),
        "": same(""),
    },
)
DISTILBERT_BLOCK: Modules = (
    "transformer.layer.{l}",
    {
        "attention.q": same(".attention.q_lin"),
        "attention.k": same(".attention.k_lin"),
        "attention.v": same(".attention.v_lin"),
        "attention.o": same(".attention.out_lin"),
        "attention": same(".attention"),
        "norm1": same(".sa_layer_norm"),
        "mlp": same(".ffn"),
        "norm2": same(".output_layer_norm"),
        "": same(""),
    },
)
MPNET_BLOCK: Modules = (
    "encoder.layer.{l}",
    {
        "attention.q": same(".attention.attn.q"),
        "attention.k": same(".attention.attn.k"),
        "attention.v": same(".attention.attn.v"),
        "attention.o": same(".attention.attn.o"),
        "attention": same(".attention.attn"),
        "norm1": same(".attention.LayerNorm"),
        "mlp": Theirs(".intermediate.dense", ".output.dense"),
        "norm2": same(".output.LayerNorm"),
        "": same(""),
    },
)
MODULES = dict.fromkeys(("bert", "roberta", "xlm-roberta"), BERT_BLOCK) | {
    "modernbert": MODERN_BLOCK,
    "distilbert": DISTILBERT_BLOCK,
    "mpnet": MPNET_BLOCK,
}
