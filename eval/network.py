"""The network model: what a link costs, as pure functions. Units are bits, seconds, and bits per second."""

import re

from astra_jax.errors import AstraError

_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


def parse_rate(text: str) -> float:
    """`"10mbit"` -> 10e6 bits per second. Raises AstraError without a unit."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]bit)", text.strip().lower())
    if not match or float(match[1]) == 0:
        raise AstraError(f"the rate {text!r} is not understood: write a number and kbit, mbit or gbit, such as 10mbit")
    return float(match[1]) * _UNITS[match[2]]


def link_seconds(bits: int, rate: float) -> float:
    """Seconds on the link when every device sends `bits`: `bits / rate`.

    The paper's convention: a device waits for the volume of one shard, all devices send at once, and the network
    stack costs nothing.
    """
    return bits / rate


def latency(compute: float, code_bits: int, class_bits: int, rate: float) -> float:
    """Seconds for one forward pass: `compute + (code_bits + class_bits) / rate`.

    Args:
      compute: seconds of computation of one device.
      code_bits: bits of codes that one device sends in all blocks together.
      class_bits: bits of the class state that it sends once, after the last block.
      rate: bits per second of the link.
    """
    return compute + link_seconds(code_bits, rate) + link_seconds(class_bits, rate)
