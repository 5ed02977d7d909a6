"""The network model against sums done by hand."""

import pytest

from astra_jax.errors import AstraError
from eval.network import latency, link_seconds, parse_rate


def test_rates():
    assert parse_rate("10mbit") == 10e6
    assert parse_rate("1.5 Gbit") == 1.5e9
    assert parse_rate("64kbit") == 64e3


@pytest.mark.parametrize("text", ["10", "mbit", "-1mbit", "0mbit", "10mb", "10mbit/s", ""])
def test_a_rate_without_a_unit_is_refused(text):
    with pytest.raises(AstraError, match="such as 10mbit"):
        parse_rate(text)


def test_latency_by_hand():
    # ViT-Base, 1024 tokens on 4 devices, G=1: 256 tokens x 10 bits x 12 blocks = 30,720 bits: 3.072 ms at 10 Mbps.
    assert link_seconds(256 * 10 * 12, 10e6) == pytest.approx(3.072e-3)
    assert latency(0.040, 256 * 10 * 12, 768 * 32, 10e6) == pytest.approx(0.040 + 3.072e-3 + 2.4576e-3)
    assert latency(0.040, 0, 0, 10e6) == 0.040
