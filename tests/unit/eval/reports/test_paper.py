"""The paper's latency figures from our operations, bits, and one fitted speed."""

import re

import pytest

from eval.cost.cost import share_flops
from eval.cost.workload import open_workload
from eval.reports.paper import (
    FITTED,
    FOLDED,
    FULL,
    G1,
    ONE,
    PAPER,
    PUBLISHED,
    SP,
    Args,
    Model,
    fit,
    main,
    ratios,
)
from tests.helpers import ROOT

DOCS = ROOT / "docs" / "paper.md"


@pytest.fixture(scope="module")
def model():
    return Model(open_workload("vit-base", 1024, None, "float32"))


@pytest.mark.slow
def test_published_ratios_come_out_within_five_percent(model):
    found = ratios(model, fit(model))
    published = [row for row in found if row["paper"] is not None]
    assert len(published) == 5
    for row in published:
        assert row[PAPER.name] == pytest.approx(row["paper"], rel=0.05), row


def test_the_fit_is_the_speed_at_which_the_fitted_ratio_holds(model):
    """By hand: 12 blocks of 256 tokens of 10 bits, against 257 of 768 floats."""
    fast, slow, rate, ratio = FITTED
    assert (fast, slow, rate) == (G1, SP, "10mbit")
    speed = fit(model)
    compute = model.flops(SP, PAPER) / speed
    codes, floats = 12 * 256 * 10 / 10e6, 12 * 257 * 768 * 32 / 10e6
    assert (compute + floats) / (compute + codes) == pytest.approx(ratio, rel=1e-9)


def test_what_a_view_counts(model):
    assert model.flops(G1, FULL) - model.flops(G1, PAPER) == pytest.approx(12 * 2 * 256 * 1024 * 768, rel=0.05)
    state = model.link_seconds(G1, "10mbit", FULL) - model.link_seconds(G1, "10mbit", PAPER)
    assert state == pytest.approx(768 * 32 / 10e6)
    assert model.link_seconds(ONE, "10mbit", FULL) == 0
    assert PUBLISHED[0] == (G1, ONE, "10mbit", 2.64)


def test_the_paper_knows_no_tables(model):
    """Ours saves 2 x 2 R D^2 in each of 12 blocks, R = 768 remote tokens, as the column of tables says."""
    fast = share_flops(model.work, G1)
    assert model.flops(G1, FULL) - fast == 12 * 4 * 768 * 768**2
    assert model.flops(G1, FOLDED) == fast


@pytest.mark.slow
def test_the_page_holds_what_the_command_writes(tmp_path):
    copy = tmp_path / "paper.md"
    copy.write_text(DOCS.read_text())
    main(Args(markdown=copy))
    found, expected = (re.sub("<sub>.*</sub>", "", path.read_text()) for path in (copy, DOCS))
    assert found == expected
