"""A block alone, and what encoding must take of it."""

import numpy as np
import pytest

from astra_jax.codecs.config import VQConfig
from astra_jax.models.vit import ViTConfig
from astra_jax.strategies.coded import Astra, AstraPlain
from eval.cost.encoding import encoding, floor_percent, measure, one_block

CODEC = VQConfig(groups=1, codewords=16)
T, N = 96, 4


@pytest.fixture(scope="module")
def config():
    return ViTConfig(hidden_size=64, num_attention_heads=4, intermediate_size=128, image_size=32, num_labels=2)


def test_a_block_with_tables_gives_what_the_plain_one_gives(config):
    fast, plain = (one_block(config, T, N, CODEC, strategy) for strategy in (Astra, AstraPlain))
    assert "tables" in fast.state["attention"] and "tables" not in plain.state["attention"]
    assert fast.x.shape == (1, 1 + T // N, 64)
    np.testing.assert_allclose(fast.call()(), plain.call()(), rtol=1e-5, atol=1e-5)
    assert encoding(fast)().shape == (1, T // N, 1)


def test_the_floor_by_hand(config):
    """The plain block: q, k, v, o, MLP; k and v of remote tokens; attention of all slots to both; encoding."""
    block = one_block(config, T, N, CODEC, AstraPlain)
    D, F, K, slots, S, R = 64, 128, 16, 25, 24, 72
    operations = 2 * slots * (4 * D * D + 2 * D * F) + 4 * R * D * D + 4 * slots * (slots + R) * D + 2 * S * K * D
    assert floor_percent(block, K) == pytest.approx(100 * 2 * S * K * D / operations)
    assert floor_percent(one_block(config, T, N, CODEC), K) > floor_percent(block, K)


def test_a_row(config):
    row = measure(config, T, N, CODEC, repeats=2)
    assert (row["N"], row["G"]) == (4, 1) and row["encoding ms"] > 0
    assert row["share %"] == pytest.approx(100 * row["encoding ms"] / row["block ms"])
    assert row["share of plain %"] == pytest.approx(100 * row["encoding ms"] / row["plain block ms"])
    single = measure(config, T, N, None, repeats=2)
    assert list(single) == list(row) and single["N"] == 1 and single["block ms"] > 0 and single["share %"] is None
