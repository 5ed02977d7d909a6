"""`python -m eval.cost.pieces`: every piece runs, and what is said of them follows from their times."""

import json

import numpy as np
import pytest

from eval.cost import pieces


def test_operations_in_the_time_of_a_byte():
    """768 tokens: 1.8 GFLOP in 18 ms are 100 per ns; tables of G=2 are 9.4 MB, in 1 ms 9.4 bytes per ns."""
    purpose = "keys and values of remote tokens, G=2"
    rows = [
        {"what for": purpose, "in which way": "projected", "ms": 18.12},
        {"what for": purpose, "in which way": "from tables", "ms": 1.0},
    ]
    assert pieces.flops_per_byte(rows, 2) == pytest.approx(100 / 9.437, rel=1e-3)


def test_the_greatest_scores_of_a_group():
    y, C = pieces.draw(5, 2, 3), pieces.draw(2, 8, 3)
    expected = np.einsum("mgd,gkd->gkm", y, C).max(1)
    np.testing.assert_allclose(pieces.scores(y, C), expected, rtol=1e-6)


def test_all_pieces_are_timed(monkeypatch, tmp_path):
    for name, size in {"S": 8, "R": 24, "D": 8, "K": 16}.items():
        monkeypatch.setattr(pieces, name, size)
    pieces.main(pieces.Args(groups=(1, 2), repeats=1, json=tmp_path / "out.json"))
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["rows"]) == 12 and all(row["ms"] > 0 for row in found["rows"])
    assert found["flops_per_byte"] > 0
