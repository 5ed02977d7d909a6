"""AstraConfig: what it derives, and what it says when a value is wrong."""

import json

import pytest

from astra_jax.codecs.config import NestedPQConfig, VQConfig, config_of
from astra_jax.errors import AstraError


@pytest.mark.parametrize(("codewords", "bits"), [(2, 1), (8, 3), (1024, 10), (65_536, 16)])
def test_a_code_takes_log2_of_k_bits(codewords, bits):
    assert VQConfig(codewords=codewords).bits == bits


K, C, P = "known", "coded", "predicted"


@pytest.mark.parametrize(
    ("schedule", "bits"),
    [((), 20), ((C, C, C, P), 15), ((K, C, C, C), 20), ((K, C, P, P), 20 / 3), ((K, P, P, P), 0)],
)
def test_bits_of_blocks_that_send_codes(schedule, bits):
    """Of four, with two groups; what is known beforehand does not count."""
    config = VQConfig(groups=2, predictor="mlp", schedule=schedule)
    assert (config.kinds(4), config.mean_bits(4)) == (schedule or (C,) * 4, bits)
    assert VQConfig(groups=2, predictor="mlp", schedule=(K,)).mean_bits(1) == 0


def test_a_schedule_is_of_all_blocks():
    with pytest.raises(AstraError, match="schedule is of 2 blocks; the model has 3: calibrate it again"):
        VQConfig(predictor="mlp", schedule=(C, P)).kinds(3)


def test_the_width_of_a_group():
    assert VQConfig(groups=32).group_width(768) == 24
    assert VQConfig(groups=1).group_width(768) == 768


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("wrong", "value", "allowed", "fix"),
    [
        ({"groups": 0}, "groups is 0", "at least 1", "try 1, 8 or 32"),
        ({"groups": "8"}, "groups is '8'", "at least 1", "try 1, 8 or 32"),
        ({"codewords": 16.0}, "codewords is 16.0", "a power of two from 2 to 65536", "try 16"),
        ({"codewords": 1000}, "codewords is 1000", "a power of two from 2 to 65536", "try 512"),
        ({"codewords": 1}, "codewords is 1", "a power of two from 2 to 65536", "try 2"),
        ({"codewords": 0}, "codewords is 0", "a power of two from 2 to 65536", "try 2"),
        ({"codewords": float("nan")}, "codewords is nan", "a power of two from 2 to 65536", "try 1024"),
        ({"codewords": float("inf")}, "codewords is inf", "a power of two from 2 to 65536", "try 1024"),
        ({"codewords": True}, "codewords is True", "a power of two from 2 to 65536", "try 2"),
        ({"groups": True}, "groups is True", "a whole number of at least 1", "try 1, 8 or 32"),
        ({"groups": 2**31}, "groups is 2147483648", "a whole number", "try 1, 8 or 32"),
        ({"codewords": 131_072}, "codewords is 131072", "a power of two from 2 to 65536", "try 65536"),
        ({"site": "mlp"}, "site is 'mlp'", "one of", "hidden, kv"),
        ({"class_token": "twice"}, "class_token is 'twice'", "one of", "distributed, single"),
        ({"schedule": ("coded", "lost")}, "schedule is 'lost'", "one of", "known, coded, predicted"),
        ({"schedule": "coded"}, "schedule is 'coded'", "must be a list", "known, coded, predicted"),
        ({"schedule": (C, P)}, "a block that is predicted", "takes a predictor", "choose one"),
        ({"schedule": (C, K), "predictor": "mlp"}, "block 1 as known", "no other is known", "first is known or coded"),
        ({"schedule": (P, C), "predictor": "mlp"}, "block 0 as predicted", "first is known or coded", "no other"),
    ],
)
def test_an_error_names_value_range_and_fix(wrong, value, allowed, fix):
    with pytest.raises(AstraError) as raised:
        VQConfig(**wrong)
    assert all(part in str(raised.value) for part in (value, allowed, fix))


def test_groups_must_divide_the_width():
    with pytest.raises(AstraError, match=r"groups is 5, .* width 16: try 2 or 4 or 8"):
        VQConfig(groups=5).group_width(16)


@pytest.mark.parametrize(
    "config", [VQConfig(groups=8, site="kv"), NestedPQConfig(groups=3, widths=(4, 2, 1), levels=(1, 2))], ids=str
)
def test_what_is_written_is_read(config):
    assert config_of(json.loads(json.dumps(config.as_dict())), "here") == config


def test_what_is_read_is_a_configuration():
    with pytest.raises(AstraError, match=r"config\.json: VQConfig has unknown \['grups'\] fields"):
        config_of({"codec": "vq", "grups": 8}, "config.json")
    with pytest.raises(AstraError, match=r"config\.json: codec is 'lattice'; it must be one of vq, nested-pq"):
        config_of({"codec": "lattice"}, "config.json")
