"""Configurations as they are found: every field is read, or changes nothing, or is refused by its name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

import checkpoints
from astra_jax.cli.main import main
from astra_jax.errors import AstraError
from astra_jax.inputs.images import ImageProcessor
from astra_jax.models.gpt2 import GPT2Config
from astra_jax.serving.engine import classes
from checkpoints import Checkpoint, configs, fields
from checkpoints.configs import config_from_hf
from checkpoints.parts import part_of
from checkpoints.problems import problem_of
from checkpoints.tensor_maps import FAMILIES
from eval.service.service import class_rows
from tests.helpers.folders import drawn

# config.json files as they are published, but for long lists of labels.
BERT = {
    "attention_probs_dropout_prob": 0.1, "gradient_checkpointing": False, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072,
    "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert", "num_attention_heads": 12,
    "num_hidden_layers": 12, "pad_token_id": 0, "position_embedding_type": "absolute", "transformers_version": "4.6.0",
    "type_vocab_size": 2, "use_cache": True, "vocab_size": 30522,
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
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read(name: str) -> None:
    family, content = PUBLISHED[name]
    config, _ = config_from_hf(family, content, Path())
    assert config.hidden_size == content.get("hidden_size", 768)
    assert content.get("projection_dim") == getattr(config, "projection_dim", None)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes_of_a_default_configuration_is_read(family: str) -> None:
    for architecture in FAMILIES[family].architectures:
        theirs = getattr(transformers, architecture).config_class(architectures=[architecture])
        for written in (json.dumps(theirs.to_dict()), theirs.to_json_string()):
            content = json.loads(written)
            config, plain = (config_from_hf(family, found, Path())[0] for found in (content, {}))
            said = {name for name, value in vars(plain).items() if value is not None}
            assert {name: getattr(config, name) for name in said} == {name: getattr(plain, name) for name in said}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_field_is_read_and_said_to_change_nothing(family: str) -> None:
    """But for those that only some families read."""
    own = {field.name for field in dataclasses.fields(configs.config_class(family))} - set(configs.DERIVED)
    both = (own | {*configs.READ, *fields.FIXED}) & fields.known_to_change_nothing(family)
    assert both <= {"tie_word_embeddings"}


@pytest.mark.parametrize(
    ("family", "content", "expected"),
    [
        ("llama", {"sliding_window": 4096}, "has sliding_window 4096, which is not known here and might change"),
        ("llama", {"logits_scaling": 8.0, "embedding_multiplier": 12}, "logits_scaling 8.0, embedding_multiplier 12,"),
        ("llama", {"is_causal": False}, "is_causal is False; only True"),
        ("llama", {"use_sliding_window": True}, "use_sliding_window is True; only False"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved is True; only False"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "extra": 1}}, "has extra 1, which is not known"),
        ("llama", {"n_embd": 64}, "has n_embd 64"),
        ("gpt2", {"layer_norm_eps": 1e-3}, "has layer_norm_eps 0.001"),
        ("gpt2", {"rope_theta": 1e4}, "has rope_theta 10000.0"),
        ("bert", {"original_max_position_embeddings": 8}, "has original_max_position_embeddings 8"),
        ("bert", {"embedding_size": 128}, "has embedding_size 128"),
        ("bert", {"pruned_heads": {"0": [1]}}, "pruned_heads is {'0': [1]}, which is not supported"),
        ("vit", {"num_register_tokens": 4}, "has num_register_tokens 4"),
        ("vit", {f"field{i}": i for i in range(9)}, "field3 3 and 5 more, which"),
        ("gpt2", {"n_head": 4, "num_attention_heads": 2}, "has n_head 4 and num_attention_heads 2, which are names of"),
        ("gpt2", {"num_attention_heads": "2"}, "n_head is '2'; it must be of type int"),
        ("gpt2", {"layer_norm_epsilon": 10**400}, "which is too large for a number"),
        ("bert", {"hidden_size": "x" * 999}, "…; it must be of type int"),
    ],
)
def test_a_field_that_might_matter_is_refused(family: str, content: dict[str, Any], expected: str) -> None:
    with pytest.raises(AstraError) as raised:
        config_from_hf(family, content, Path("folder"))
    assert expected in str(raised.value) and "folder/config.json" in str(raised.value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_nothing_is_said_by_null() -> None:
    assert config_from_hf("llama", {"sliding_window": None, "n_head": None}, Path())


def test_gpt2_is_read_by_the_names_of_every_family() -> None:
    """As transformers' attribute_map has them."""
    assert {ours: theirs for theirs, ours in transformers.GPT2Config.attribute_map.items()} == configs.config_class(
        "gpt2"
    ).ALIASES
    named = {"num_attention_heads": 4, "hidden_size": 64, "num_hidden_layers": 3, "max_position_embeddings": 32}
    config, _ = config_from_hf("gpt2", {**named, "n_layer": 3}, Path())
    theirs = transformers.GPT2Config.from_dict(named)
    for name in ("n_head", "n_embd", "n_layer", "n_positions"):
        assert getattr(config, name) == getattr(theirs, name) in named.values()


@pytest.mark.parametrize("family", FAMILIES)
def test_aliases_are_those_of_transformers(family: str) -> None:
    theirs = getattr(transformers, next(iter(FAMILIES[family].architectures))).config_class
    aliases = getattr(configs.config_class(family), "ALIASES", {})
    assert {alias: name for name, alias in aliases.items()} == theirs.attribute_map


# What a classifier's outputs are

IDENTITY, SIGMOID = "torch.nn.modules.linear.Identity", "torch.nn.modules.activation.Sigmoid"


@pytest.mark.parametrize(
    ("content", "labels", "expected"),
    [
        ({}, 2, "single_label_classification"),
        ({"problem_type": None}, 5, "single_label_classification"),
        ({}, 1, "multi_label_classification"),
        ({"problem_type": "multi_label_classification"}, 3, "multi_label_classification"),
        ({"problem_type": "regression"}, 1, "regression"),
        ({"problem_type": "regression"}, 3, "regression"),
        ({"sbert_ce_default_activation_function": IDENTITY}, 1, "regression"),
        ({"sentence_transformers": {"activation_fn": IDENTITY, "version": "5.1.0"}}, 1, "regression"),
        ({"sentence_transformers": {"activation_fn": SIGMOID}}, 1, "multi_label_classification"),
    ],
)
def test_what_the_outputs_of_a_classifier_are(content: dict[str, Any], labels: int, expected: str) -> None:
    assert problem_of(content, labels) == expected


@pytest.mark.parametrize(
    ("content", "labels", "expected"),
    [
        ({"problem_type": "ranking"}, 2, "problem_type is 'ranking' of 2 label(s); it must be one of single_label"),
        ({"problem_type": "single_label_classification"}, 1, "of 1 label(s)"),
        ({"problem_type": ["regression"]}, 1, "problem_type is ['regression']"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.Tanh"}}, 1, "activation is 'torch.nn.Tanh'; known are"),
        ({"sentence_transformers": {"pooling": 1}}, 1, "has pooling 1, which is not known"),
        ({"sentence_transformers": 3}, 1, "it must be an object"),
    ],
)
def test_outputs_that_are_not_understood(content: dict[str, Any], labels: int, expected: str) -> None:
    with pytest.raises(AstraError) as raised:
        config_from_hf("vit", {**content, "id2label": {str(i): str(i) for i in range(labels)}}, Path())
    assert expected in str(raised.value)


@pytest.mark.parametrize(
    ("problem", "called", "expected"),
    [
        ("single_label_classification", "probability", lambda x: np.exp(x) / np.exp(x).sum()),
        ("multi_label_classification", "probability", lambda x: 1 / (1 + np.exp(-x))),
        ("regression", "score", lambda x: x),
    ],
)
def test_classes_are_shown_as_their_model_means_them(problem: str, called: str, expected: Any) -> None:
    logits = np.asarray([[4.1, -3.0, 0.5]], np.float32)
    checkpoint = Checkpoint("vit", None, None, ("a", "b", "c"), None, {"problem_type": problem}, "float32", (), None)
    rows = class_rows(classes(checkpoint, logits, 2), ("picture",))
    assert [row["class"] for row in rows] == ["a", "c"]
    np.testing.assert_allclose([row[called] for row in rows], expected(logits[0])[[0, 2]], rtol=1e-6)


def test_the_only_label_is_not_certain_because_it_is_the_only_one() -> None:
    checkpoint = Checkpoint("vit", None, None, ("spam",), None, {}, "float32", (), None)
    (row,) = class_rows(classes(checkpoint, np.asarray([[-2.0]], np.float32), 5), ("picture",))
    assert row["probability"] == pytest.approx(0.1192, abs=1e-4)


# Other files


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; it must be a whole number"),
        ({"eos_token_id": [1, 2.5]}, "eos_token_id is [1, 2.5]"),
        ({"eos_token_id": True}, "eos_token_id is True"),
        ({"eos_token_id": -1}, "eos_token_id is -1"),
    ],
)
def test_settings_of_generation_that_are_none(content: dict[str, Any], expected: str) -> None:
    with pytest.raises(AstraError, match="generation_config.json") as raised:
        fields.check_generation(content, Path("generation_config.json"))
    assert expected in str(raised.value)


def test_settings_of_generation_that_are_not_followed_are_named() -> None:
    content = {"eos_token_id": [2, 1], "temperature": 0.6, "top_p": 0.9, "do_sample": True, "use_cache": True}
    assert fields.generation_settings(content) == ["temperature 0.6", "top_p 0.9", "do_sample True"]
    assert fields.generation_settings(transformers.GenerationConfig().to_dict()) == []
    assert fields.generation_settings(transformers.GenerationConfig(eos_token_id=2).to_diff_dict()) == []


def test_an_image_processor_has_no_field_that_is_not_known() -> None:
    for name in ("ViTImageProcessor", "ViTImageProcessorPil", "DeiTImageProcessor"):
        if hasattr(transformers, name):
            assert ImageProcessor.from_hf(getattr(transformers, name)().to_dict())
    with pytest.raises(AstraError, match="has crop_pct 0.875, which is not known"):
        ImageProcessor.from_hf({"crop_pct": 0.875})
    for factor in ([], [0.5, 0.25]):
        with pytest.raises(AstraError, match="rescale_factor is .*; it must be a finite number"):
            ImageProcessor.from_hf({"rescale_factor": factor})


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression", None])
def test_models_that_do_not_say_one_class_are_shown_and_calibrated_but_not_judged_by_classes(
    problem: str | None, tmp_path: Path, word_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """One output without a problem_type is a label that is there or not."""
    labels = 3 if problem else 1
    config = GPT2Config(
        vocab_size=32, n_positions=32, n_embd=16, n_layer=1, n_head=2, task="classification", num_labels=labels
    )
    names, hf_config = tuple("abc"[:labels]), {"model_type": "gpt2", "problem_type": problem}
    model = drawn("gpt2", config)
    saved = Checkpoint(
        "gpt2", config, None, names, None, hf_config, "float32", (), model, None, word_tokenizer(28, special=True)
    )
    checkpoints.save(tmp_path / "plain", saved)
    table = tmp_path / "train.csv"
    table.write_text("text,label\n" + "".join(f"w{i} w{i + 1} w3,{i / 7}\n" for i in range(20)))
    few = ["--groups", "2", "--codewords", "4", "--tokens", "32", "--length", "8", "--text-column", "text"]
    assert main(["calibrate", str(tmp_path / "plain"), str(tmp_path / "coded"), "--data", str(table), *few]) == 0
    report = tmp_path / "run.json"
    assert main(["run", str(tmp_path / "plain"), "--prompt", "w1 w2", "--json", str(report)]) == 0
    rows = json.loads(report.read_text())["classes"]
    logits = np.asarray([row["score" if problem == "regression" else "probability"] for row in rows])
    assert len(rows) == labels and (problem == "regression" or abs(logits.sum() - 1) > 1e-3)
    capsys.readouterr()
    for verb in (["eval", str(tmp_path / "plain")], ["finetune", str(tmp_path / "coded"), str(tmp_path / "tuned")]):
        assert main([*verb, "--data", str(table)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"is a model for {problem or 'multi_label_classification'} ({labels} output(s)), which cannot be" in line
