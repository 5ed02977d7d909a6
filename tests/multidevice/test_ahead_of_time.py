"""Programs of models that are too large for this machine, compiled from shapes alone."""

import dataclasses

import pytest

from eval.cost.ahead_of_time import Args, measure
from eval.cost.presets import LLAMA_3_8B


def check(row, L, N, T, G):
    assert row["bytes per block"] == T // N * G * 10 / 8
    assert row["as compiled"] == row["bytes per block"]
    assert row["working GB"] > 0 and row["cache MB"] > 2 * L * T // N * 8 * 128 * 2 / 1e6


def test_two_blocks_of_llama_3_8b_send_what_is_predicted():
    config = dataclasses.replace(LLAMA_3_8B, num_hidden_layers=2)
    check(measure(config, Args(), 32), L=2, N=4, T=1024, G=32)


@pytest.mark.slow
def test_llama_3_8b_compiles_for_four_devices_without_its_weights():
    row = measure(LLAMA_3_8B, Args(), 1)
    check(row, L=32, N=4, T=1024, G=1)
    assert row["parameters"] == 8_030_261_248
    assert 16.06 < row["weights GB"] < 17
