"""`astra convert`, and its way back by `astra export`."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import checkpoints
from astra_jax.cli.main import main
from astra_jax.errors import AstraError
from checkpoints import huggingface
from tests.helpers.folders import (
    edit,
    fails,
    write,
)


def test_the_verbs_in_a_row(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, back, report = tmp_path / "out", tmp_path / "back", tmp_path / "report.json"
    assert main(["convert", str(folder), str(out), "--json", str(report)]) == 0
    printed = capsys.readouterr().out
    assert "vit: " in printed and "3 labels" in printed and f"next: astra calibrate {out}" in printed.replace("\n", "")
    converted = json.loads(report.read_text())
    assert converted["parameters"] == sum(t.size for t in load_file(folder / "model.safetensors").values())
    assert main(["export", str(out), str(back)]) == 0
    before, after = load_file(folder / "model.safetensors"), load_file(back / "model.safetensors")
    assert {n: t.tobytes() for n, t in before.items()} == {n: t.tobytes() for n, t in after.items()}
    assert main(["info", str(out)]) == 0
    assert "codebooks: none" in capsys.readouterr().out


def test_errors_are_one_line_and_exit_code_2(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(folder, other=np.zeros(1, np.float32))
    assert "unmapped" in fails(capsys, "convert", str(folder), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert "astra convert" in fails(capsys, "info", str(folder))
    assert "astra convert" in fails(capsys, "export", str(folder), str(tmp_path / "out"))
    assert "no such checkpoint" in fails(capsys, "info", str(tmp_path / "out"))
    assert "no such folder" in fails(capsys, "convert", str(tmp_path / "none"), str(tmp_path / "out"))


def test_a_tokenizer_goes_all_the_way(tmp_path: Path, word_tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    hf, out, copy, back = (tmp_path / name for name in ("hf", "out", "copy", "back"))
    write(hf, "gpt2")
    shutil.copytree(word_tokenizer(7), hf, dirs_exist_ok=True)
    (hf / "generation_config.json").write_text('{"eos_token_id": 3}')
    (hf / "tokenizer.py").write_text("raise SystemExit")  # no file of a tokenizer
    assert main(["convert", str(hf), str(out)]) == 0
    assert "warning" not in capsys.readouterr().out
    files = {"tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in (out / "tokenizer-0001").iterdir()} == files | {"config.json"}
    checkpoint = checkpoints.load(out)
    assert checkpoint.tokenizer.encode("w3 w6 nothing") == [7, 10, 0] and checkpoint.eos_ids == (3,)
    checkpoints.save(copy, checkpoint)
    checkpoints.save(out, checkpoint)  # onto itself
    assert checkpoints.load(copy).tokenizer.decode([7, 10]) == checkpoints.load(out).tokenizer.decode([7, 10])
    assert main(["export", str(copy), str(back)]) == 0
    for file in files:
        assert (back / file).read_bytes() == (hf / file).read_bytes()
    assert huggingface.read_json(back / "generation_config.json") == {"eos_token_id": 3}
    checkpoints.save(copy, dataclasses.replace(checkpoint, tokenizer_files=None))
    assert not list(copy.glob("tokenizer*"))


def test_a_language_model_without_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "hf", "llama")
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "warning" in printed and "tokenizer.json" in printed and "labels" not in printed
    checkpoint = checkpoints.read_meta(tmp_path / "out")
    assert not list((tmp_path / "out").glob("tokenizer*"))
    with pytest.raises(AstraError, match="has no tokenizer.*convert it again"):
        checkpoint.tokenizer  # noqa: B018


@pytest.mark.parametrize(
    ("damage", "expected"), [(None, "ids up to 11, but vocab_size in config.json is 11"), ("{", "cannot be read")]
)
def test_a_tokenizer_that_does_not_fit(
    damage: str | None, expected: str, tmp_path: Path, word_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "hf", "gpt2")
    shutil.copytree(word_tokenizer(8), tmp_path / "hf", dirs_exist_ok=True)
    if damage:
        (tmp_path / "hf" / "tokenizer.json").write_text(damage)
    assert expected in fails(capsys, "convert", str(tmp_path / "hf"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
