"""`astra info`."""

import json
from pathlib import Path

import pytest

import checkpoints
from astra_jax.cli.main import main


def test_info_and_export_of_codebooks(
    calibrated: checkpoints.Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints.save(tmp_path / "out", calibrated)
    report = tmp_path / "report.json"
    assert main(["info", str(tmp_path / "out"), "--json", str(report)]) == 0
    content = json.loads(report.read_text())
    facts = {row["name"]: row["value"] for row in content["facts"]}
    assert facts["bits per token and block"] == 6
    assert facts["compression ratio"] == pytest.approx(8 * 32 / 6)
    assert [row["block"] for row in content["blocks"]] == [0, 1]
    assert all(1 < row["perplexity"] <= 8 for row in content["blocks"])
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "hf")]) == 0
    assert "codebooks are left out" in capsys.readouterr().out
