"""config.json files as they are published, but for long lists of labels."""

from pathlib import Path
from typing import Any

from checkpoints.parts import part_of

BERT = {
    "attention_probs_dropout_prob": 0.1, "gradient_checkpointing": False, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072,
    "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert", "num_attention_heads": 12,
    "num_hidden_layers": 12, "pad_token_id": 0, "position_embedding_type": "absolute", "transformers_version": "4.6.0",
    "type_vocab_size": 2, "use_cache": True, "vocab_size": 30522,
}  # fmt: skip
ROBERTA = BERT | {
    "architectures": ["RobertaForMaskedLM"], "bos_token_id": 0, "eos_token_id": 2, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 514, "model_type": "roberta", "pad_token_id": 1, "type_vocab_size": 1,
    "vocab_size": 50265,
}  # fmt: skip
NOT_MPNET = ("type_vocab_size", "use_cache", "position_embedding_type", "gradient_checkpointing")
DISTILBERT = {
    "activation": "gelu", "architectures": ["DistilBertForMaskedLM"], "attention_dropout": 0.1, "dim": 768,
    "dropout": 0.1, "hidden_dim": 3072, "initializer_range": 0.02, "max_position_embeddings": 512,
    "model_type": "distilbert", "n_heads": 12, "n_layers": 6, "pad_token_id": 0, "qa_dropout": 0.1,
    "seq_classif_dropout": 0.2, "sinusoidal_pos_embds": False, "tie_weights_": True, "transformers_version": "4.10.0",
    "vocab_size": 30522,
}  # fmt: skip
GPT2 = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
    "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
    "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
    "summary_type": "cls_index", "summary_use_proj": True, "vocab_size": 50257,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}  # fmt: skip
LLAMA2 = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
LLAMA32 = LLAMA2 | {
    "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": [128001, 128008, 128009], "head_dim": 64,
    "hidden_size": 2048, "mlp_bias": False, "num_key_value_heads": 8, "rope_theta": 500000.0,
    "tie_word_embeddings": True, "vocab_size": 128256,
    "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}  # fmt: skip
VIT = {
    "architectures": ["ViTForImageClassification"], "attention_probs_dropout_prob": 0.0, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0, "hidden_size": 768, "id2label": {"0": "tench", "1": "goldfish"}, "image_size": 224,
    "initializer_range": 0.02, "intermediate_size": 3072, "label2id": {"tench": "0", "goldfish": "1"},
    "layer_norm_eps": 1e-12, "model_type": "vit", "num_attention_heads": 12, "num_channels": 3,
    "num_hidden_layers": 12, "patch_size": 16, "qkv_bias": True, "transformers_version": "4.13.0.dev0",
}  # fmt: skip
DINOV2 = {
    "apply_layernorm": True, "architectures": ["Dinov2Model"], "attention_probs_dropout_prob": 0.0,
    "drop_path_rate": 0.0, "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "hidden_size": 768, "image_size": 518,
    "initializer_range": 0.02, "layer_norm_eps": 1e-06, "layerscale_value": 1.0, "mlp_ratio": 4,
    "model_type": "dinov2", "num_attention_heads": 12, "num_channels": 3, "num_hidden_layers": 12,
    "out_features": ["stage12"], "out_indices": [12], "patch_size": 14, "qkv_bias": True,
    "reshape_hidden_states": True, "stage_names": ["stem", "stage1"], "torch_dtype": "float32",
    "transformers_version": "4.31.0.dev0", "use_swiglu_ffn": False,
}  # fmt: skip
CLIP = {
    "architectures": ["CLIPModel"], "initializer_factor": 1.0, "logit_scale_init_value": 2.6592, "model_type": "clip",
    "projection_dim": 512, "text_config": {"model_type": "clip_text_model"},
    "vision_config": {
        "_name_or_path": "", "add_cross_attention": False, "architectures": None, "attention_dropout": 0.0,
        "bad_words_ids": None, "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None,
        "diversity_penalty": 0.0, "do_sample": False, "dropout": 0.0, "early_stopping": False,
        "encoder_no_repeat_ngram_size": 0, "finetuning_task": None, "hidden_act": "quick_gelu", "hidden_size": 768,
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "image_size": 224, "initializer_factor": 1.0,
        "initializer_range": 0.02, "intermediate_size": 3072, "is_decoder": False, "is_encoder_decoder": False,
        "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "layer_norm_eps": 1e-05, "length_penalty": 1.0, "max_length": 20,
        "min_length": 0, "model_type": "clip_vision_model", "no_repeat_ngram_size": 0, "num_attention_heads": 12,
        "num_beam_groups": 1, "num_beams": 1, "num_hidden_layers": 12, "num_return_sequences": 1,
        "output_attentions": False, "output_hidden_states": False, "output_scores": False, "pad_token_id": None,
        "patch_size": 32, "prefix": None, "problem_type": None, "pruned_heads": {}, "remove_invalid_values": False,
        "repetition_penalty": 1.0, "return_dict": True, "return_dict_in_generate": False, "temperature": 1.0,
        "tie_encoder_decoder": False, "tie_word_embeddings": True, "top_k": 50, "top_p": 1.0, "torch_dtype": None,
        "torchscript": False, "transformers_version": "4.16.0.dev0", "use_bfloat16": False,
    },
}  # fmt: skip
WIDE = {"hidden_size": 1280, "num_attention_heads": 16, "patch_size": 14}
DECODER = {
    "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02, "rope_scaling": None,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True,
}  # fmt: skip
QWEN3 = DECODER | {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
    "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN25 = DECODER | {
    "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "use_mrope": False, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
GEMMA3 = DECODER | {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": None,
    "cache_implementation": "hybrid", "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
    "max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26,
    "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
    "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144,
}  # fmt: skip
GEMMA2 = DECODER | {
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid", "final_logit_softcapping": 30.0, "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304,
    "intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8,
    "num_hidden_layers": 26, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 256000,
}  # fmt: skip
MISTRAL = DECODER | {
    "architectures": ["MistralForCausalLM"], "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None,
    "tie_word_embeddings": False, "vocab_size": 32768,
}  # fmt: skip
PHI4 = DECODER | {
    "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "embd_pdrop": 0.0, "full_attn_mod": 1,
    "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 8192, "interpolate_factor": 1,
    "lm_head_bias": False, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "phi3",
    "num_attention_heads": 24, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "original_max_position_embeddings": 4096, "pad_token_id": 199999, "partial_rotary_factor": 0.75,
    "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 262144,
    "tie_word_embeddings": True, "vocab_size": 200064,
    "rope_scaling": {"long_factor": [1.5] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
}  # fmt: skip
SMOLLM3 = DECODER | {
    "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 11008, "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536,
    "max_window_layers": 28, "mlp_bias": False, "model_type": "smollm3", "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4,
    "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_theta": 5000000.0, "sliding_window": None,
    "use_sliding_window": False, "vocab_size": 128256,
}  # fmt: skip
OLMO2 = DECODER | {
    "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 8192, "max_position_embeddings": 4096, "model_type": "olmo2", "num_attention_heads": 16,
    "num_hidden_layers": 16, "num_key_value_heads": 16, "pad_token_id": 100277, "rms_norm_eps": 1e-06,
    "rope_theta": 500000, "tie_word_embeddings": False, "vocab_size": 100352,
}  # fmt: skip
MODERNBERT = {
    "architectures": ["ModernBertForMaskedLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 50281, "classifier_activation": "gelu", "classifier_bias": False, "classifier_dropout": 0.0,
    "classifier_pooling": "mean", "cls_token_id": 50281, "decoder_bias": True, "deterministic_flash_attn": False,
    "embedding_dropout": 0.0, "eos_token_id": 50282, "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0,
    "gradient_checkpointing": False, "hidden_activation": "gelu", "hidden_size": 768, "initializer_cutoff_factor": 2.0,
    "initializer_range": 0.02, "intermediate_size": 1152, "layer_norm_eps": 1e-05, "local_attention": 128,
    "local_rope_theta": 10000.0, "max_position_embeddings": 8192, "mlp_bias": False, "mlp_dropout": 0.0,
    "model_type": "modernbert", "norm_bias": False, "norm_eps": 1e-05, "num_attention_heads": 12,
    "num_hidden_layers": 22, "pad_token_id": 50283, "position_embedding_type": "absolute", "sep_token_id": 50282,
    "tie_word_embeddings": True, "torch_dtype": "float32", "transformers_version": "4.47.0.dev0", "vocab_size": 50368,
}  # fmt: skip
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-base-uncased": ("bert", BERT | {"architectures": ["BertForMaskedLM"]}),
    "all-MiniLM-L6-v2": (
        "bert",
        BERT
        | {"_name_or_path": "nreimers/MiniLM-L6-H384-uncased", "architectures": ["BertModel"], "hidden_size": 384}
        | {"intermediate_size": 1536, "num_hidden_layers": 6},
    ),
    "bert-base-multilingual-cased": (
        "bert",
        BERT
        | {"directionality": "bidi", "pooler_fc_size": 768, "pooler_num_attention_heads": 12, "pooler_num_fc_layers": 3}
        | {"pooler_size_per_head": 128, "pooler_type": "first_token_transform", "output_past": True},
    ),
    "bge-small-en": ("bert", BERT | {"classifier_dropout": None, "id2label": {"0": "LABEL_0"}}),
    "roberta-base": ("roberta", ROBERTA),
    "xlm-roberta-base": ("xlm-roberta", ROBERTA | {"output_past": True, "vocab_size": 250002}),
    "distilbert-base-uncased": ("distilbert", DISTILBERT),
    "distilbert-base-uncased-finetuned-sst-2-english": (
        "distilbert",
        DISTILBERT
        | {"architectures": ["DistilBertForSequenceClassification"], "finetuning_task": "sst-2", "output_past": True}
        | {"id2label": {"0": "NEGATIVE", "1": "POSITIVE"}, "label2id": {"NEGATIVE": 0, "POSITIVE": 1}},
    ),
    "all-mpnet-base-v2": (
        "mpnet",
        {name: value for name, value in ROBERTA.items() if name not in NOT_MPNET}
        | {"architectures": ["MPNetForMaskedLM"], "model_type": "mpnet", "relative_attention_num_buckets": 32},
    ),
    "gpt2": ("gpt2", GPT2),
    "gpt2-medium": ("gpt2", GPT2 | {"n_special": 0, "predict_special_tokens": True}),
    "distilgpt2": ("gpt2", GPT2 | {"_num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}),
    "Llama-2-7b": ("llama", LLAMA2),
    "TinyLlama-1.1B": (
        "llama",
        LLAMA2 | {"attention_bias": False, "hidden_size": 2048, "num_key_value_heads": 4, "rope_theta": 10000.0},
    ),
    "Llama-3.2-1B": ("llama", LLAMA32),
    "SmolLM2-135M": (
        "llama",
        LLAMA2
        | {"is_llama_config": True, "rope_interleaved": False, "rope_theta": 100000, "attention_dropout": 0.0}
        | {"transformers.js_config": {"dtype": "q4"}},
    ),
    "vit-base-patch16-224": ("vit", VIT),
    "dinov2-base": ("dinov2", DINOV2),
    "dinov2-giant": (
        "dinov2",
        DINOV2 | {"hidden_size": 1536, "num_attention_heads": 24, "num_hidden_layers": 40, "use_swiglu_ffn": True},
    ),
    "dinov2-with-registers-small": (
        "dinov2_with_registers",
        DINOV2 | {"hidden_size": 384, "num_attention_heads": 6, "num_register_tokens": 4}
        | {"architectures": ["Dinov2WithRegistersModel"], "model_type": "dinov2_with_registers"},
    ),
    "clip-vit-base-patch32": ("clip_vision_model", part_of({**CLIP, "vision_config_dict": None}, Path())),
    "CLIP-ViT-H-14-laion2B": (
        "clip_vision_model",
        part_of(CLIP | {"projection_dim": 1024, "vision_config_dict": WIDE}, Path()),
    ),
    "siglip-base-patch16-224": (
        "siglip_vision_model",
        part_of({"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model"}}, Path()),
    ),
    "deit-tiny-distilled-patch16-224": (
        "deit",
        VIT | {"architectures": ["DeiTForImageClassificationWithTeacher"], "model_type": "deit", "hidden_size": 192}
        | {"intermediate_size": 768, "num_attention_heads": 3, "torch_dtype": "float32"},
    ),
    "Qwen3-0.6B": ("qwen3", QWEN3),
    "Qwen2.5-0.5B": ("qwen2", QWEN25),
    "gemma-3-1b-it": ("gemma3_text", GEMMA3),
    "gemma-2-2b": ("gemma2", GEMMA2),
    "Mistral-7B-v0.3": ("mistral", MISTRAL),
    "Phi-4-mini-instruct": ("phi3", PHI4),
    "SmolLM3-3B": ("smollm3", SMOLLM3),
    "OLMo-2-0425-1B": ("olmo2", OLMO2),
    "ModernBERT-base": ("modernbert", MODERNBERT),
}  # fmt: skip
