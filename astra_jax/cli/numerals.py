"""Numbers as people write them, and nothing else that Python takes for one: 1_0, digits of other scripts, inf."""

import re

MOST = 2**32 - 1  # of a whole number: what seeds may be; nothing that is counted here is more
LARGEST, SMALLEST = 1e30, 1e-30  # of any other: with room for products in float32

_WHOLE = re.compile(r"[+-]?[0-9]{1,20}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_ENDLESS = re.compile(r"[+-]?(inf|infinity|nan)", re.IGNORECASE)


class OutOfRange(ValueError):
    """It is a number, but nothing here can be of that size."""


def whole(text: str) -> int:
    """`"12"` -> 12. Raises ValueError, with what is wrong, for anything but a whole number up to `MOST`."""
    if not _WHOLE.fullmatch(text.strip(" ")):
        raise ValueError("it must be a whole number, such as 4")
    if abs(value := int(text)) > MOST:
        raise OutOfRange(f"it must be a whole number of at most {MOST}")
    return value


def number(text: str) -> float:
    """`"1.5"` or `"2e-3"` -> that. Raises ValueError, with what is wrong, for anything but a number of a usual size."""
    if not (endless := _ENDLESS.fullmatch(text.strip(" "))) and not _NUMBER.fullmatch(text.strip(" ")):
        raise ValueError("it must be a number, such as 0.5")
    value = float(text)
    zero = not set(re.split("[eE]", text)[0]) & set("123456789")
    if endless or (not zero and not SMALLEST <= abs(value) <= LARGEST):
        raise OutOfRange(f"it must be a number: 0, or from {SMALLEST:g} to {LARGEST:g}")
    return value
