"""Configurations as they are found: every field is read, or changes nothing, or is refused by its name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
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
from checkpoints.problems import problem_of
from checkpoints.tensor_maps import FAMILIES
from eval.cost.presets import PRESETS
from eval.service.service import class_rows
from tests.helpers.folders import drawn
from tests.helpers.published import PUBLISHED


@pytest.mark.parametrize(
    ("preset", "name"),
    [
        ("qwen3-0.6b", "Qwen3-0.6B"),
        ("gemma-3-1b", "gemma-3-1b-it"),
        ("mistral-7b", "Mistral-7B-v0.3"),
        ("phi-4-mini", "Phi-4-mini-instruct"),
        ("smollm3-3b", "SmolLM3-3B"),
    ],
)
def test_presets_compute_what_is_published(preset: str, name: str) -> None:
    ours, theirs = PRESETS[preset][1], config_from_hf(*PUBLISHED[name], Path())[0]
    assert (ours.windows or [None])[0] == (theirs.windows or [None])[0] or name.startswith("Phi-4")  # wider than texts
    assert [ours.E, ours.J, ours.biases, ours.most_tokens] == [theirs.E, theirs.J, theirs.biases, theirs.most_tokens]
    x = jnp.ones((1, 2, 1, ours.E))
    for number in (0, ours.num_hidden_layers - 1):
        turned = [config.rotary(x, np.arange(2), number) for config in (ours, theirs)]
        np.testing.assert_array_equal(*turned)


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


BETA = {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64}
HALF = {"partial_rotary_factor": 0.5}
SU: dict[str, Any] = {"type": "su", "long_factor": [1.0] * 48}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 128}, "is a mixture of experts, which is not"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "every host would have to hold all experts"),
        (
            {"architectures": ["Qwen3NextForCausalLM"], "layer_types": ["linear_attention", "full_attention"]},
            "has layers whose state must pass from host to host",
        ),
        ({"architectures": ["MambaForCausalLM"], "state_size": 16}, "(as Mamba or DeltaNet), which is not supported"),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "an encoder with a decoder"),
        ({"architectures": ["ResNetForImageClassification"]}, "is not known; there are those of bert, "),
    ],
)
def test_kinds_of_models_that_are_not_supported(content: dict[str, Any], expected: str) -> None:
    with pytest.raises(AstraError) as raised:
        configs.architecture_in(content, Path("folder"))
    assert expected in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("family", "content", "expected"),
    [
        (
            "phi3",
            {"rope_scaling": SU | {"short_factor": [1]}},
            "short_factor of the rotary embedding has 1 numbers",
        ),
        ("phi3", {"rope_scaling": SU | {"short_factor": ["a"]}}, "short_factor[0] is 'a'; it must be of type float"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "a Phi-3 has default or longrope"),
        ("qwen3", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 32 blocks"),
        ("qwen2", {"num_hidden_layers": 1, "layer_types": ["linear_attention"]}, "layer_types has 'linear_attention'"),
        ("qwen2", {"layer_types": "full_attention"}, "layer_types is 'full_attention'; it must be of type"),
        ("mistral", {"sliding_window": 4.5}, "sliding_window is 4.5; it must be of type int or null"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0; it must be a whole number of at least 1"),
        ("smollm3", {"no_rope_layers": [1, 2]}, "no_rope_layers is (1, 2); it must be 0 or 1 for each of 36 blocks"),
        ("gemma2", {"final_logit_softcapping": -1.0}, "a bound of scores or logits is -1.0; it must be above 0"),
        (
            "gemma2",
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention is True, which is not supported",
        ),
        ("llama", {"rope_parameters": BETA}, "llama_4_scaling_beta is of Ministral 3 alone"),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": BETA}},
            "llama_4_scaling_beta is of Ministral 3 alone",
        ),
        ("gemma3_text", {"rope_parameters": {"sliding_attention": HALF}}, "partial_rotary_factor is 0.5; only 1"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 5.0}}, "it must have full_attention and sliding_attention"),
        (
            "gemma3_text",
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": {"full_attention": {}}},
            "has rope_scaling, which may be of either",
        ),
        ("modernbert", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "has rope_scaling, which may be of"),
        ("modernbert", {"rope_parameters": {"full_attention": HALF}}, "partial_rotary_factor is 0.5; only 1"),
        ("modernbert", {"rope_parameters": {"full_attention": SU | {"short_factor": [1.0] * 32}}}, "longrope is not"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping must be null"),
        ("gemma3_text", {"rope_parameters": {"full_attention": {}, "other": {"a": 1}}}, "has other {'a': 1}"),
    ],
)
def test_a_value_that_fits_no_model_is_refused(family: str, content: dict[str, Any], expected: str) -> None:
    with pytest.raises(AstraError) as raised:
        config_from_hf(family, content, Path("folder"))
    assert expected in str(raised.value) and "config.json: " in str(raised.value)


def test_a_gemma_3_of_old_has_two_bases_and_a_pattern() -> None:
    """As google/gemma-3-1b-it's config.json says it."""
    content = {
        "num_hidden_layers": 7, "sliding_window": 512, "sliding_window_pattern": 6, "rope_local_base_freq": 1e4,
        "rope_theta": 1e6, "rope_scaling": None, "attn_logit_softcapping": None, "cache_implementation": "hybrid",
    }  # fmt: skip
    config = config_from_hf("gemma3_text", content, Path())[0]
    assert config.windows == (*[512] * 5, None, 512)
    assert (config.rope_parameters.rope_theta, config.sliding_rope.rope_theta) == (1e6, 1e4)
    assert [rotary.rope_theta for rotary in config.rotary.blocks] == [*[1e4] * 5, 1e6, 1e4]
    outside = {"rope_theta": 7.0, "rope_parameters": {"full_attention": {"rope_type": "default"}}}
    assert config_from_hf("gemma3_text", outside, Path())[0].rope_parameters.rope_theta == 7.0
    scaled = content | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    config = config_from_hf("gemma3_text", scaled, Path())[0]
    assert (config.rope_parameters.factor, config.sliding_rope.factor) == (8.0, 1.0)


def test_longrope_takes_texts_up_to_its_original_length() -> None:
    """As microsoft/Phi-4-mini-instruct's config.json says it, but for its size."""
    content = {
        "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 36, "long_factor": [2.0] * 36},
    }  # fmt: skip
    config = config_from_hf("phi3", content, Path())[0]
    assert config.most_tokens == 4096 and config.max_position_embeddings == 131072
    assert config.rope_parameters.factor == 32.0


@pytest.mark.parametrize("family", FAMILIES)
def test_no_field_is_read_and_said_to_change_nothing(family: str) -> None:
    """But for those that only some families read."""
    own = {field.name for field in dataclasses.fields(configs.config_class(family))} - set(configs.DERIVED)
    both = (own | {*configs.READ, *fields.FIXED}) & fields.known_to_change_nothing(family)
    assert both <= {"tie_word_embeddings", "pad_token_id"}


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
