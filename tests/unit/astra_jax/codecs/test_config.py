"""AstraConfig: what it derives, and what it says when a value is wrong."""

import pytest

from astra_jax.codecs.config import AstraConfig, from_dict
from astra_jax.errors import AstraError


@pytest.mark.parametrize(("codewords", "bits"), [(2, 1), (8, 3), (1024, 10), (65_536, 16)])
def test_a_code_takes_log2_of_k_bits(codewords, bits):
    assert AstraConfig(codewords=codewords).bits == bits


@pytest.mark.parametrize(
    ("options", "sending", "bits"),
    [
        ({}, 4, 20),
        ({"coded_blocks": 3}, 3, 15),
        ({"coded_blocks": 9}, 4, 20),
        ({"side_info": "token-ids"}, 3, 20),  # of three blocks
        ({"side_info": "token-ids", "coded_blocks": 2}, 1, 20 / 3),
        ({"side_info": "token-ids", "coded_blocks": 1}, 0, 0),
    ],
)
def test_bits_of_blocks_that_send_codes(options, sending, bits):
    """Of four, with two groups."""
    config = AstraConfig(groups=2, predictor="mlp", **options)
    assert (config.sending(4), config.mean_bits(4)) == (sending, bits)
    assert AstraConfig(groups=2, predictor="mlp", side_info="token-ids").mean_bits(1) == 0


def test_the_width_of_a_group():
    assert AstraConfig(groups=32).group_width(768) == 24
    assert AstraConfig(groups=1).group_width(768) == 768


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
        ({"widths": 2}, "widths is 2", "it must be a list", "of whole numbers"),
        ({"levels": "a"}, "levels is 'a'", "it must be a list", "of whole numbers"),
        ({"groups": True}, "groups is True", "a whole number of at least 1", "try 1, 8 or 32"),
        ({"groups": 2**31}, "groups is 2147483648", "a whole number", "try 1, 8 or 32"),
        ({"codewords": 131_072}, "codewords is 131072", "a power of two from 2 to 65536", "try 65536"),
        ({"site": "mlp"}, "site is 'mlp'", "one of", "hidden, kv"),
        ({"class_token": "twice"}, "class_token is 'twice'", "one of", "distributed, single"),
        ({"coded_blocks": 0, "predictor": "mlp"}, "coded_blocks is 0", "at least 1", "none for all blocks"),
        ({"coded_blocks": 2}, "coded_blocks", "not sent", "takes a predictor"),
    ],
)
def test_an_error_names_value_range_and_fix(wrong, value, allowed, fix):
    with pytest.raises(AstraError) as raised:
        AstraConfig(**wrong)
    assert all(part in str(raised.value) for part in (value, allowed, fix))


def test_groups_must_divide_the_width():
    with pytest.raises(AstraError, match=r"groups is 5, .* width 16: try 2 or 4 or 8"):
        AstraConfig(groups=5).group_width(16)


def test_from_dict():
    assert from_dict(AstraConfig, {"groups": 8}, "here") == AstraConfig(groups=8)
    with pytest.raises(AstraError, match=r"config\.json: AstraConfig has unknown \['grups'\] fields"):
        from_dict(AstraConfig, {"grups": 8}, "config.json")
