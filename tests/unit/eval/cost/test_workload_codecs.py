"""What a codec costs before anything is calibrated: operations against products by hand, and bits."""

import dataclasses

import pytest

from astra_jax.codecs.config import doubling
from astra_jax.errors import AstraError
from astra_jax.models.vit import ViTConfig
from eval.cost.cost import predicted_messages, share_flops
from eval.cost.presets import PRESETS
from eval.cost.workload import Setting, open_workload, settings
from eval.network.devices import Devices

D, F, L, K, HIDDEN = 32, 48, 3, 16, 128
N, T = 4, 64
S, R, SLOTS = 16, 48, 17  # of one device: tokens, those of the others, and tokens with the class token
VIT = ViTConfig(
    hidden_size=D, num_hidden_layers=L, num_attention_heads=2, intermediate_size=F, patch_size=4, num_labels=7
)


@pytest.fixture
def tiny(monkeypatch):
    """A ViT with few codewords."""
    monkeypatch.setitem(PRESETS, "tiny", ("vit", VIT))
    work = open_workload("tiny", T, None, "float32")
    return dataclasses.replace(work, astra=dataclasses.replace(work.astra, codewords=K))


AROUND = 2 * S * (4 * 4 * 3) * D + 2 * SLOTS * D + 2 * D * 7  # patches, the class state, the head
LAYERS = 2 * SLOTS * (4 * D * D + 2 * D * F)  # queries, keys, values, output and MLP of one's own tokens
ATTENTION = 4 * SLOTS * (SLOTS + R) * D
PROJECTION = 2 * R * D * 2 * D  # of remote tokens to keys and values; from axes, which are as many, it is no less
NEAREST = 2 * S * K * D
ANALYSIS, SYNTHESIS = 2 * S * D * D, 2 * N * S * D * D
LINEAR = 2 * N * S * D * D
MLP = LINEAR + 2 * N * S * 3 * D * HIDDEN
PLAIN = LAYERS + ATTENTION + PROJECTION
# Of every codec, operations of a block.
BLOCKS = {
    ("vq", 1): LAYERS + 4 * SLOTS * (SLOTS + K) * D + NEAREST,  # from tables, and codewords are counted
    ("vq", 2): PLAIN + NEAREST,
    ("vq+linear", 1): PLAIN + NEAREST + LINEAR,
    ("vq+linear", 2): PLAIN + NEAREST + LINEAR,
    ("vq+mlp", 2): PLAIN + NEAREST + MLP,
    ("nested-pq", 2): PLAIN + ANALYSIS + 2 * NEAREST,  # levels of 1 and 1 groups
    ("nested-pq", 4): PLAIN + ANALYSIS + 3 * NEAREST,  # levels of 1, 1 and 2 groups
    ("nested-pq+linear", 2): PLAIN + ANALYSIS + 2 * NEAREST + SYNTHESIS + LINEAR,
}


@pytest.mark.parametrize(("name", "G"), BLOCKS)
def test_a_pass_by_hand(tiny, name, G):
    way = Setting("astra", N, groups=G, codec=name)
    work, block = tiny.of(way), BLOCKS[name, G]
    assert share_flops(work, way) == AROUND + L * block
    codes, _ = predicted_messages(work, way, Devices((1.0,) * N))
    assert (codes.bits, codes.times) == (4 * G * S, L)


@pytest.mark.parametrize("G", [1, 2, 3, 16, 31, 32])
def test_levels_are_those_of_the_calibration_and_each_has_all_axes(tiny, G):
    astra = tiny.of(Setting("astra", N, groups=G, codec="nested-pq")).astra
    assert astra.levels == doubling(G)
    for widths in astra.level_widths:
        assert sum(widths) == D and max(widths) - min(widths) <= 1


def test_what_the_workload_has_is_kept_but_for_the_codec(tiny):
    kept = dict(site="kv", class_token="single")
    work = dataclasses.replace(tiny, astra=dataclasses.replace(tiny.astra, **kept))
    coded = work.of(Setting("astra", N, groups=1, codec="nested-pq")).astra
    assert (coded.site, coded.class_token, coded.codewords, coded.widths) == ("kv", "single", K, (2 * D,))
    assert work.of(Setting("astra", N, groups=1)) is work is work.of(Setting("sp", N))


def test_a_way_for_every_codec():
    ways = settings(("single", "astra", "sp"), 4, (1, 16), (1,), codecs=("vq", "nested-pq+mlp"))
    assert [str(way) for way in ways] == [
        "single",
        *("astra vq G=1", "astra vq G=16", "astra nested-pq+mlp G=1", "astra nested-pq+mlp G=16"),
        "sp",
    ]


@pytest.mark.parametrize(
    ("name", "G", "message"),
    [
        ("vq+cubic", 1, "there is no codec 'vq\\+cubic': try vq, nested-pq, vq\\+linear"),
        ("vq", 5, "groups is 5, which does not divide the quantized width 32: try"),
        ("nested-pq", 100, "groups is 100; a level of nested-pq would have more than 32 axes: use at most 32"),
    ],
)
def test_codecs_that_do_not_fit(tiny, name, G, message):
    with pytest.raises(AstraError, match=message):
        tiny.of(Setting("astra", N, groups=G, codec=name)).abstract(G)
