"""Device profiles: what is written is read, and everything else is one line."""

import pytest

from astra_jax.errors import AstraError
from eval.cost.device_profile import DeviceProfile, read_profile, write_profile


def test_a_profile_is_written_and_read(tmp_path):
    profile = DeviceProfile("GTX 1660 Ti", 1.83e12)
    write_profile(tmp_path / "laptop.json", profile)
    assert read_profile(tmp_path / "laptop.json") == profile


def test_a_whole_number_is_a_speed(tmp_path):
    (tmp_path / "laptop.json").write_text('{"name": "laptop", "flops_per_second": 1000000000000}')
    assert read_profile(tmp_path / "laptop.json").flops_per_second == 1e12


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "it must be a JSON object"),
        ('{"name": "a"}', r"missing \['flops_per_second'\]"),
        ('{"name": "a", "flops_per_second": 1.0, "watts": 5}', r"unknown \['watts'\]"),
        ('{"name": "a", "flops_per_second": 0}', "flops_per_second is 0; it must be a number above 0"),
        ('{"name": "a", "flops_per_second": -1e12}', "flops_per_second is -1000000000000.0"),
        ('{"name": "a", "flops_per_second": NaN}', "flops_per_second is nan"),
        ('{"name": "a", "flops_per_second": Infinity}', "flops_per_second is inf"),
        ('{"name": "a", "flops_per_second": 1' + "0" * 400 + "}", "flops_per_second is 1"),
        (
            '{"name": "a", "flops_per_second": 1e-320}',
            "flops_per_second is 1e-320; it must be a number above 0, from 1 to",
        ),
        ('{"name": "a", "flops_per_second": 1e300}', "flops_per_second is 1e.300"),
        ('{"name": "a", "flops_per_second": "1e12"}', "flops_per_second is '1e12'"),
        ('{"name": "a", "flops_per_second": true}', "flops_per_second is True"),
        ('{"name": 7, "flops_per_second": 1.0}', "name is 7; it must be one line of text"),
        ('{"name": " ", "flops_per_second": 1.0}', "name is ' '"),
        ('{"name": "a\\nb", "flops_per_second": 1.0}', r"name is 'a\\nb'"),
    ],
)
def test_what_is_no_profile_is_one_line(tmp_path, text, message, unchecked):
    (tmp_path / "laptop.json").write_text(text)
    with pytest.raises(AstraError, match=message) as error:
        read_profile(tmp_path / "laptop.json")
    assert str(error.value).startswith(str(tmp_path / "laptop.json"))
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read_or_written_are_one_line(tmp_path):
    with pytest.raises(AstraError, match="has no laptop.json"):
        read_profile(tmp_path / "laptop.json")
    with pytest.raises(AstraError, match="cannot be written"):
        write_profile(tmp_path / "none" / "laptop.json", DeviceProfile("a", 1.0))
