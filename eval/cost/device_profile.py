"""How fast a device is, as one number in a file, so that a machine that is not here can be planned for."""

import dataclasses
import json
from pathlib import Path

from astra_jax.codecs.config import from_dict
from astra_jax.errors import AstraError
from astra_jax.files import write_output
from checkpoints.files import read_json

SLOWEST, FASTEST = 1.0, 1e21  # FLOPs per second: beyond them times are no numbers any more that mean something


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


@dataclasses.dataclass(frozen=True)
class DeviceProfile:
    """The speed of a device.

    It is measured, not read from a data sheet: the FLOPs of one forward pass on one device (`eval.cost.flops`, matrix
    products alone) over the seconds that it takes there. What it takes for all the rest (softmax, norms, memory) is
    therefore in the number, and `flops / flops_per_second` predicts the seconds of other work of the same kind: the
    same model, precision, and about as many tokens.

    Attributes:
      name: what the device is called in tables.
      flops_per_second: effective floating-point operations per second.

    Raises:
      AstraError: a value is outside its range; the message names value, range and fix.
    """

    name: str
    flops_per_second: float | int  # a whole number in JSON is an int

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip() or not self.name.isprintable():
            raise AstraError(f"name is {self.name!r}; it must be one line of text: name the device")
        speed = self.flops_per_second
        number = isinstance(speed, int | float) and not isinstance(speed, bool)
        if not number or not SLOWEST <= speed <= FASTEST:
            raise AstraError(
                f"flops_per_second is {_short(speed)}; it must be a number above 0, "
                f"from {SLOWEST:g} to {FASTEST:g}: try 1e12"
            )


def read_profile(path: Path) -> DeviceProfile:
    """Reads a profile that `write_profile` wrote, or a person.

    Raises:
      AstraError: the file is missing, no JSON, or not a profile; the message names file, field, value and fix.
    """
    values = read_json(path)
    try:
        return from_dict(DeviceProfile, values, "profile")
    except AstraError as error:
        raise AstraError(f"{path}: {error}") from None


def write_profile(path: Path, profile: DeviceProfile) -> None:
    """Writes a profile as JSON. Raises AstraError where the file cannot be written."""
    write_output(path, json.dumps(dataclasses.asdict(profile), indent=2) + "\n")
