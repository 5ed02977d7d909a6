"""Numbers on the command line: those that people write, in a size that something can be computed with."""

import dataclasses
import io
import sys

import pytest

from astra_jax.cli.arguments import Integers, Numbers, parse
from astra_jax.cli.numerals import number, whole
from astra_jax.errors import AstraError
from astra_jax.mesh.sharding import parse_devices
from eval.network.lab import parse_packet_loss
from eval.network.model import parse_rate, parse_seconds

NO_WHOLE = [
    "1_0",
    "\uff11\uff10",
    "٣",
    "²",
    "inf",
    "nan",
    "1e3",
    "0x10",
    "1.0",
    "",
    " ",
    "--",
    "4294967296",
    "9" * 5000,
]
NO_NUMBER = [
    "1_0.5",
    "\uff11.5",
    "inf",
    "-inf",
    "nan",
    "infinity",
    "1e999",
    "1e-320",
    "1e-999",
    "0x1p3",
    "",
    ".",
    "1e",
    "e5",
]


@pytest.mark.parametrize(("text", "value"), [("12", 12), ("-1", -1), ("+3", 3), ("007", 7), ("4294967295", 2**32 - 1)])
def test_whole_numbers(text, value):
    assert whole(text) == value


@pytest.mark.parametrize(
    ("text", "value"), [("1", 1), ("-0.5", -0.5), (".5", 0.5), ("5.", 5), ("2e-3", 0.002), ("0e9", 0), ("0.0", 0)]
)
def test_numbers(text, value):
    assert number(text) == value


@pytest.mark.parametrize("text", NO_WHOLE)
def test_what_is_no_whole_number(text):
    with pytest.raises(ValueError, match="whole number"):
        whole(text)


@pytest.mark.parametrize("text", NO_NUMBER)
def test_what_is_no_number(text):
    with pytest.raises(ValueError, match="number"):
        number(text)


@dataclasses.dataclass(frozen=True)
class Args:
    count: int = 1
    most: int | None = None
    rate: float = 0.5
    some: Integers = ()
    shares: Numbers = ()


def test_options_are_read():
    words = ["--count", "3", "--most=4", "--rate", "1e-3", "--some", "1,2", "3", "--shares", "0.5,1"]
    assert parse(Args, words) == Args(3, 4, 0.001, (1, 2, 3), (0.5, 1.0))
    assert parse(Args, []) == Args()


@pytest.mark.parametrize("option", ["--count", "--most", "--some"])
@pytest.mark.parametrize("text", [text for text in NO_WHOLE if text.strip(" -")])
def test_an_odd_count_is_one_line_that_names_its_option(option, text):
    for words in ([option, text], [f"{option}={text}"], ["--rate", "1", option, text]):
        with pytest.raises(AstraError, match=r"whole number|is no list") as error:
            parse(Args, words)
        assert "\n" not in str(error.value) and (option in str(error.value) or option == "--some")


@pytest.mark.parametrize("option", ["--rate", "--shares"])
@pytest.mark.parametrize("text", [text for text in NO_NUMBER if text.strip()])
def test_an_odd_number_is_one_line_that_names_its_option(option, text):
    with pytest.raises(AstraError, match=r"a number|is no list"):
        parse(Args, [f"{option}={text}"])


def test_a_missing_option_is_said_and_exits_with_2(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with pytest.raises(SystemExit) as stopped:
        parse(Args, ["--speed", "1"])
    assert stopped.value.code == 2


@pytest.mark.parametrize("digits", ["\uff110", "٣", "1_0", "inf", "nan", "9" * 400, "1e3"])
def test_quantities_are_written_in_plain_digits(digits):
    for read, unit in ((parse_rate, "mbit"), (parse_seconds, "ms"), (parse_packet_loss, "%"), (parse_devices, "")):
        with pytest.raises(AstraError):
            read(f"{digits}{unit}")


def test_a_rate_of_nothing_is_none():
    for text in ("0mbit", "0.0001kbit", "0.000000000000001kbit"):
        with pytest.raises(AstraError, match="less than 1 bit per second: write one such as 10mbit"):
            parse_rate(text)
