"""How a model is compressed: the part of a checkpoint's configuration that ASTRA adds."""

import dataclasses
from typing import Any, Literal, TypeVar, get_args

from astra_jax.errors import AstraError

Site = Literal["hidden", "kv"]
ClassToken = Literal["distributed", "single"]

T = TypeVar("T")

MAX_CODEWORDS = 65_536  # codes are uint16


@dataclasses.dataclass(frozen=True)
class AstraConfig:
    """What is exchanged between devices (paper section 3; letters as in the README's legend).

    Attributes:
      groups: G, code groups per token and block. Must divide the width that is quantized.
      codewords: K, codewords per group: a power of two, so that a code is exactly log2(K) bits on the wire.
      site: what is quantized: `hidden` is the input of the K and V projections (after the norm),
        `kv` is K and V themselves, before any rotary embedding, as one vector of width 2*J*E (our choice).
      class_token: `distributed` puts a replica of CLS at the head of every shard and averages their final
        states; `single` keeps one CLS on shard 0.

    Raises:
      AstraError: a value is outside its range; the message names value, range and fix.
    """

    groups: int = 32
    codewords: int = 1024
    site: Site = "hidden"
    class_token: ClassToken = "distributed"

    def __post_init__(self) -> None:
        if not isinstance(self.groups, int) or self.groups < 1:
            raise AstraError(f"groups is {self.groups!r}; it must be a whole number of at least 1: try 1, 8 or 32")
        K = self.codewords
        if not isinstance(K, int) or not 2 <= K <= MAX_CODEWORDS or K & (K - 1):
            nearest = min(MAX_CODEWORDS, 1 << max(1, int(K).bit_length() - 1)) if isinstance(K, int | float) else 1024
            raise AstraError(f"codewords is {K!r}; it must be a power of two from 2 to {MAX_CODEWORDS}: try {nearest}")
        for field, allowed in (("site", get_args(Site)), ("class_token", get_args(ClassToken))):
            value = getattr(self, field)
            if value not in allowed:
                raise AstraError(f"{field} is {value!r}; it must be one of {', '.join(allowed)}")

    @property
    def bits(self) -> int:
        """log2(K): bits of one code."""
        return self.codewords.bit_length() - 1

    def group_width(self, width: int) -> int:
        """Width of one group of a vector of `width`. Raises AstraError where G does not divide it."""
        if width % self.groups:
            divisors = [g for g in range(1, width + 1) if width % g == 0]
            near = sorted(divisors, key=lambda g: abs(g - self.groups))[:3]
            raise AstraError(
                f"groups is {self.groups}, which does not divide the quantized width {width}: "
                f"try {' or '.join(str(g) for g in sorted(near))}"
            )
        return width // self.groups


def from_dict(cls: type[T], values: dict[str, Any], where: str) -> T:
    """Builds the frozen dataclass `cls` from parsed JSON. Raises AstraError on unknown or missing fields."""
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields))
    missing = sorted(
        n
        for n, f in fields.items()
        if n not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    )
    if unknown or missing:
        problems = [f"unknown {unknown}"] * bool(unknown) + [f"missing {missing}"] * bool(missing)
        raise AstraError(
            f"{where}: {cls.__name__} has {' and '.join(problems)} fields: was it written by another version?"
        )
    return cls(**values)
