"""Folders in a form that is not read are called what they are; odd ones that transformers loads are loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import checkpoints
from astra_jax.cli.main import main
from astra_jax.errors import AstraError
from astra_jax.models.gpt2 import GPT2Config
from astra_jax.models.llama import LlamaConfig
from checkpoints import huggingface
from checkpoints.tensor_maps import build, flat_state, with_state

GPT2 = GPT2Config(vocab_size=11, n_positions=6, n_embd=8, n_layer=1, n_head=2)
LLAMA = LlamaConfig(
    vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=16, tie_word_embeddings=True,
)  # fmt: skip


def write(folder: Path, family: str, config: Any, **more: Any) -> checkpoints.Checkpoint:
    """A Hugging Face folder of a random model."""
    rng, model = np.random.default_rng(0), build(family, config)
    drawn = {path: rng.normal(size=a.shape).astype(np.float32) for path, a in flat_state(model).items()}
    checkpoint = checkpoints.Checkpoint(
        family, config, None, None, None, {}, "float32", (), with_state(model, drawn), **more
    )
    huggingface.write_folder(checkpoint, folder)
    return checkpoint


def fault(folder: Path) -> str:
    with pytest.raises(AstraError) as raised:
        huggingface.open_folder(str(folder))
    assert "\n" not in str(raised.value)
    return str(raised.value)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
CONFIG = json.dumps({"model_type": "llama"})
# Files of a folder -> what it is called.
FOREIGN: dict[str, tuple[dict[str, str], str]] = {
    "LoRA": ({"adapter_config.json": "{}", "adapter_model.safetensors": ""}, "is an adapter (LoRA or the like)"),
    "LoRA with a config": ({"config.json": CONFIG, "adapter_model.bin": ""}, "is an adapter (LoRA or the like)"),
    "GGUF": ({"llama-3-8b.Q4_K_M.gguf": ""}, "is a GGUF file for llama.cpp"),
    "GGUF with a config": ({"config.json": CONFIG, "model.gguf": ""}, "is a GGUF file for llama.cpp"),
    "pickles": ({"config.json": CONFIG, "pytorch_model.bin": ""}, "only as pytorch_model.bin, which is not read"),
    "Llama as released": ({"params.json": "{}", "consolidated.00.pth": ""}, "the format of Llama's first release"),
    "diffusers": ({"model_index.json": "{}"}, "is a pipeline of diffusers"),
    "nothing": ({}, "has no config.json"),
    "a config alone": ({"config.json": CONFIG}, "has neither model.safetensors nor model.safetensors.index.json"),
    "LFS weights": ({"config.json": CONFIG, "model.safetensors": POINTER}, "safetensors is only git-lfs' pointer"),
    "LFS everything": ({"config.json": POINTER, "tokenizer.json": POINTER}, "(2 such files): run `git lfs pull` in"),
    "timm": (
        {"config.json": json.dumps({"architecture": "vit_base_patch16_224", "num_classes": 9, "pretrained_cfg": {}})},
        "is of a timm model ('vit_base_patch16_224')",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_folder_is_called_what_it_is(name: str, tmp_path: Path) -> None:
    files, expected = FOREIGN[name]
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    assert expected in fault(tmp_path)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "('gptq')"),
        ({"quantization_config": {"quant_method": "awq"}}, "('awq')"),
        ({"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}, "('fp8')"),
        ({"quantization_config": {"load_in_4bit": True}}, "('bitsandbytes')"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "('mlx')"),
        ({"quantization_config": {"format": "int-quantized"}}, "({'format': 'int-quantized'})"),
        ({"quantization_config": "int4"}, "('int4')"),
    ],
)
def test_quantized_weights_are_named(settings: dict[str, Any], expected: str, tmp_path: Path) -> None:
    write(tmp_path, "llama", LLAMA)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | settings))
    assert f"the weights are quantized {expected}, which is not read" in fault(tmp_path)


def test_two_kinds_of_model_in_one_configuration(tmp_path: Path) -> None:
    write(tmp_path, "llama", LLAMA)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"model_type": "mistral"}))
    assert "model_type is 'mistral', but LlamaForCausalLM is of 'llama'" in fault(tmp_path)


@pytest.mark.parametrize(
    ("family", "config", "embedding"),
    [("gpt2", GPT2, "transformer.wte.weight"), ("llama", LLAMA, "model.embed_tokens.weight")],
)
def test_a_tied_head_that_is_stored_alone(family: str, config: Any, embedding: str, tmp_path: Path) -> None:
    checkpoint = write(tmp_path, family, config)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors.pop(embedding)}, tmp_path / "model.safetensors")
    read = huggingface.read(str(tmp_path))
    assert read.config == config and read.model.head is None
    np.testing.assert_array_equal(read.model.embed.embedding[...], checkpoint.model.embed.embedding[...])


def test_a_token_beyond_the_vocabulary(tmp_path: Path, word_tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """As transformers does, it is only missed where it is used."""
    from tokenizers import Tokenizer

    write(tmp_path / "hf", "gpt2", GPT2)
    shutil.copytree(word_tokenizer(7), tmp_path / "hf", dirs_exist_ok=True)
    inner = Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    inner.add_special_tokens(["<pad>"])
    inner.save(str(tmp_path / "hf" / "tokenizer.json"))
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out.replace("\n", " ")
    assert "note: the model has no embedding for 1 token(s) of its tokenizer, such as '<pad>'" in out
    tokenizer = checkpoints.read_meta(tmp_path / "out").tokenizer
    assert tokenizer.encode("w1 w6") == [5, 10] and list(tokenizer.beyond) == ["<pad>"]
    with pytest.raises(AstraError, match="the text has the token '<pad>', which the model has no embedding for"):
        tokenizer.encode("w1 <pad> w6")


def test_padding_at_the_end_of_a_text_is_not_what_a_decoder_classifies(tmp_path: Path, word_tokenizer: Any) -> None:
    """transformers reads the last token that is no padding, also where a text itself ends in it."""
    files = word_tokenizer(7)
    classifier = GPT2Config(**{**vars(GPT2), "task": "classification", "num_labels": 2})
    checkpoint = write(tmp_path / "hf", "gpt2", classifier, tokenizer_files=files)
    assert checkpoint.tokenizer.encode("w1 w2 w2") == [5, 6, 6]
    content = json.loads((tmp_path / "hf" / "config.json").read_text()) | {"pad_token_id": 6}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(content))
    padded = huggingface.open_folder(str(tmp_path / "hf")).checkpoint.tokenizer
    assert [padded.encode(text) for text in ("w1 w2 w2", "w2 w1", "w2 w2")] == [[5], [6, 5], [6]]
