"""`python -m eval.cost.codecs`: operations of every codec against products by hand, and where fewer bits are faster."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import tyro

from astra_jax.codecs.config import AstraConfig, doubling
from astra_jax.errors import AstraError
from astra_jax.models.vit import ViTConfig
from astra_jax.strategies.base import Message
from eval.cost.codecs import COMMAND, Args, faster_below, grouped_axes, main, price, with_codec
from eval.cost.cost import Cost
from eval.cost.presets import PRESETS
from eval.cost.workload import Setting, open_workload
from eval.network.model import Link, pass_seconds

DOCS = Path(__file__).parents[4] / "docs" / "accuracy-per-bit.md"
SPEED = 33.2e9  # of the page: one device with 0.4 of a core (docs/performance.md)
D, F, L, K, RANK = 32, 48, 3, 16, 5
N, T = 4, 64
S, R, SLOTS = 16, 48, 17  # of one device: tokens, those of the others, and tokens with the class token
A = 24  # axes
VIT = ViTConfig(
    hidden_size=D, num_hidden_layers=L, num_attention_heads=2, intermediate_size=F, patch_size=4, num_labels=7
)


@pytest.fixture
def tiny(monkeypatch, tiny_gpt2):
    """Known architectures `tiny`, a ViT, and `tiny-text`, a GPT-2 of up to 64 tokens."""
    monkeypatch.setitem(PRESETS, "tiny", ("vit", VIT))
    monkeypatch.setitem(PRESETS, "tiny-text", ("gpt2", tiny_gpt2(n_layer=L).config))


def opened(name):
    return dataclasses.replace(open_workload(name, T, None, "float32"), astra=AstraConfig(codewords=K))


def priced(name, G, model="tiny"):
    return price(with_codec(opened(model), name, G, A if "pq" in name else None, RANK), name, N, 1e6)


LAYERS = 2 * SLOTS * (4 * D * D + 2 * D * F)  # queries, keys, values, output and MLP of one's own tokens
ATTENTION = 4 * SLOTS * (SLOTS + R) * D
PROJECTION = 2 * R * D * 2 * D  # of remote tokens to keys and values
NEAREST, NEAREST_AXES = 2 * S * K * D, 2 * S * K * A
ANALYSIS, SYNTHESIS, READOUT = 2 * S * D * A, 2 * N * S * A * D, 2 * R * A * 2 * D
LINEAR = 2 * N * S * D * D
BLOCKS = {
    ("vq", 1): LAYERS + 4 * SLOTS * (SLOTS + K) * D + NEAREST,  # from tables, and codewords are counted
    ("vq", 2): LAYERS + ATTENTION + PROJECTION + NEAREST,
    ("vq+diagonal", 1): LAYERS + ATTENTION + PROJECTION + NEAREST,
    ("vq+low-rank", 2): LAYERS + ATTENTION + PROJECTION + NEAREST + 2 * N * S * 2 * D * RANK,
    ("vq+linear", 2): LAYERS + ATTENTION + PROJECTION + NEAREST + LINEAR,
    ("vq+mlp", 2): LAYERS + ATTENTION + PROJECTION + NEAREST + LINEAR + 2 * N * S * 3 * D * RANK,
    ("rotated-pq", 2): LAYERS + ATTENTION + READOUT + ANALYSIS + NEAREST_AXES,
    ("nested-pq", 4): LAYERS + ATTENTION + READOUT + ANALYSIS + 3 * NEAREST_AXES,  # levels of 1, 1 and 2 groups
    ("rotated-pq+linear", 2): LAYERS + ATTENTION + PROJECTION + ANALYSIS + NEAREST_AXES + SYNTHESIS + LINEAR,
}


@pytest.mark.parametrize(("name", "G"), BLOCKS)
def test_a_block_by_hand(tiny, name, G):
    found = priced(name, G)
    assert found.block_flops == BLOCKS[name, G]
    assert found.work.astra.token_bits == found.first_bits == 4 * G


@pytest.mark.parametrize(("name", "predicted"), [("vq", 0), ("vq+linear", LINEAR)])
def test_a_pass_is_its_blocks_with_nothing_to_predict_from_in_the_first(tiny, name, predicted):
    found = priced(name, 2)
    around = 2 * S * (4 * 4 * 3) * D + 2 * SLOTS * D + 2 * D * 7  # patches, the class state, the head
    assert found.cost.flops == (around + L * found.block_flops - predicted,) * N
    assert found.cost.compute == pytest.approx((found.cost.flops[0] / 1e6,) * N)


def test_a_text_whose_ids_are_sent(tiny):
    """The first block of a GPT-2 with D=16 finds no codes and predicts nothing."""
    found = priced("vq+linear", 2, "tiny-text")
    assert (found.first_bits, found.work.astra.token_bits, found.work.astra.side_info) == (16, 8, "token-ids")
    assert [(m.bits, m.times) for m in found.cost.messages] == [(16 * S, 1), (8 * S, L - 1)]
    in_first = 2 * S * K * 16 + 2 * T * 16 * 16
    assert found.cost.flops[0] == L * found.block_flops - in_first + 2 * 16 * 50
    assert priced("vq", 2, "tiny-text").work.astra.side_info == "none"


def test_axes_are_spread_evenly_in_every_level():
    assert grouped_axes("vq", 7, 3, 7) == ((), ())
    assert grouped_axes("rotated-pq", 7, 3, 8) == ((3, 2, 2), ())
    assert grouped_axes("nested-pq", 7, 5, 8) == ((7, 7, 4, 3, 7), (1, 1, 2, 1))


@pytest.mark.parametrize("G", [1, 2, 3, 16, 31, 32])
def test_levels_are_those_of_the_calibration(G):
    assert grouped_axes("nested-pq", 64, G, 64)[1] == doubling(G)


def one(seconds, bits):
    """Four devices that compute for so long and send so much in each of two blocks, one of them slowly."""
    return Cost(Setting("astra", 4), (1.0,) * 4, (seconds / 2, seconds, 0.0, 0.0), (Message("all-gather", bits, 2),))


def test_the_rate_below_which_fewer_bits_are_faster():
    """0.5 s more of computing for 2 x 1,000 bits less."""
    few, many = one(2.5, 500), one(2.0, 1500)
    assert faster_below(few, many) == pytest.approx(4000)
    assert faster_below(few, many, "each") == pytest.approx(12_000)  # a message for each of three others
    assert faster_below(many, few) is None and faster_below(few, one(2.0, 500)) is None
    assert faster_below(one(2.0, 500), many) == math.inf
    for rate, less in ((3999.0, True), (4001.0, False)):
        here, there = (pass_seconds(c.compute, c.messages, 4, Link(rate, 0.25)) for c in (few, many))
        assert (here < there) == less


@pytest.fixture
def slow(tmp_path):
    """The file of a device of a million operations per second."""
    path = tmp_path / "slow.json"
    path.write_text('{"name": "slow", "flops_per_second": 1e6}')
    return path


def test_the_whole_way(tiny, tmp_path, slow):
    """With 1,024 codewords, which no table is made of. Compared with vq, which itself is not shown."""
    page = tmp_path / "page.md"
    page.write_text(f"before\n<!-- tiny of `{COMMAND}` -->\n<!-- end of tiny of `{COMMAND}` -->\nafter\n")
    words = (
        "tiny --tokens 64 --codecs vq+linear,rotated-pq --axes 8 --groups 4,2 --rates 1mbit,10mbit "
        f"--device-profile {slow} --markdown {page} --json {tmp_path}/out.json"
    )
    main(tyro.cli(Args, args=words.split()))
    found = json.loads((tmp_path / "out.json").read_text())
    rows = found["rows"]
    assert [(row["codec"], row["G"], row["bits"], row["in block 0"]) for row in rows] == [
        ("vq+linear", 2, 20, 20),
        ("rotated-pq", 2, 20, 20),
        ("vq+linear", 4, 40, 40),
        ("rotated-pq", 4, 40, 40),
    ]
    base = LAYERS + ATTENTION + PROJECTION + 2 * S * 1024 * D
    rotated = LAYERS + ATTENTION + 2 * R * 8 * 2 * D + 2 * S * D * 8 + 2 * S * 1024 * 8
    for row, block in zip(rows, (base + LINEAR, rotated) * 2, strict=True):
        assert row["GFLOP per block"] == pytest.approx(block / 1e9)
        assert row["% more than vq"] == pytest.approx(100 * (block / base - 1))
        bits = L * S * row["bits"] + 32 * D
        assert row["s at 1mbit"] - row["s at 10mbit"] == pytest.approx(bits * (1e-6 - 1e-7))
    # L - 1 products more take 0.26 s; 20 bits less of 16 tokens in 3 blocks are 960.
    below = "faster than vq G=4 below Mbit/s"
    assert [row[below] for row in rows] == [pytest.approx(960 / (2 * LINEAR / 1e6) / 1e6), "any", None, None]
    assert found["flops_per_second"] == 1e6 and found["axes"] == 8
    lines = page.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and len(lines) == 4 + 2 + 4


def test_measured_here(tiny, tmp_path):
    """One device, for want of a profile, and a block. With vq alone there is nothing to be faster than."""
    main(Args("tiny", tokens=T, codecs=("vq",), groups=(2,), repeats=1, json=tmp_path / "out.json"))
    found = json.loads((tmp_path / "out.json").read_text())
    (row,) = found["rows"]
    assert found["flops_per_second"] > 0 and row["ms here"] > 0 and row["% more than vq"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codecs": ("vq+cubic",)}, "there is no codec 'vq\\+cubic': try vq, rotated-pq, vq\\+linear"),
        ({"codecs": ()}, "--codecs, --groups and --rates are lists, such as"),
        ({"groups": (5,)}, "groups is 5, which does not divide the quantized width 32: try"),
        ({"groups": (0,)}, "groups is 0; it must be a whole number of at least 1"),
        ({"axes": 33}, "rotated-pq with 2 groups has 33 axes here; it can have 2 to 32: use other --axes"),
        ({"axes": 1}, "rotated-pq with 2 groups has 1 axes here"),
        ({"devices": 1}, "--devices is 1; codes are exchanged between at least 2: try 4"),
        ({"devices": 65}, "64 tokens cannot be split over 65 devices"),
        ({"repeats": -1}, "--repeats is -1; it must be at least 0"),
        ({"rates": ("10",)}, "the rate '10' is not understood"),
        ({"site": "kv", "axes": 65}, "has 65 axes here; it can have 2 to 64"),
    ],
)
def test_bad_input_gets_one_line(tiny, slow, options, message):
    with pytest.raises(AstraError, match=message) as error:
        main(Args("tiny", **{"tokens": T, "groups": (2,), "device_profile": slow, **options}))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_page_holds_what_the_command_writes(tmp_path):
    copy, profile = tmp_path / "page.md", tmp_path / "device.json"
    copy.write_text(DOCS.read_text())
    profile.write_text(json.dumps({"name": "0.4 of a core", "flops_per_second": SPEED}))
    main(Args("vit-base", device_profile=profile, markdown=copy))
    assert copy.read_text() == DOCS.read_text()
