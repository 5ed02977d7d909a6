"""How a model is compressed: the part of a checkpoint's configuration that ASTRA adds."""

import dataclasses
import itertools
from typing import Any, Literal, TypeVar, cast, get_args

from astra_jax.errors import AstraError

Site = Literal["hidden", "kv"]
ClassToken = Literal["distributed", "single"]
Codec = Literal["vq", "nested-pq"]
Prediction = Literal["none", "linear", "mlp"]
SideInfo = Literal["none", "token-ids"]
Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]  # of sentences' embeddings

T = TypeVar("T")

MAX_CODEWORDS = 65_536  # codes are uint16
LARGEST = 2**27  # number of anything that a configuration counts: more is a mistake or a trap (our choice)


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
      codec: `vq` quantizes a vector as it is, as the paper does; `nested-pq` along axes that calibration finds, level
        by level, each level what those before it left, so that the first levels are a good code by themselves
        (`astra_jax.codecs.quantizer.RotatedQuantizer`, our choice).
      widths: of `nested-pq` how many axes each group has.
      levels: of `nested-pq` how many groups each level has.
      predictor: how a token's vector is predicted from the block before, so that codes say only what differs
        (`astra_jax.codecs.predictor.Predictor`, our choice).
      hidden_units: of the predictor `mlp`.
      side_info: `token-ids` lets every device know the first block's vectors of a text exactly, without codes.
      coded_blocks: how many blocks, the first ones, have their tokens' codes sent; the others go by what is predicted
        from these. None for all. One that token ids say exactly counts (our choice).

    Raises:
      AstraError: a value is outside its range; the message names value, range and fix.
    """

    groups: int = 32
    codewords: int = 1024
    site: Site = "hidden"
    class_token: ClassToken = "distributed"
    codec: Codec = "vq"
    widths: tuple[int, ...] = ()
    levels: tuple[int, ...] = ()
    predictor: Prediction = "none"
    hidden_units: int = 128
    side_info: SideInfo = "none"
    coded_blocks: int | None = None

    def __post_init__(self) -> None:
        if not _whole(self.groups):
            raise AstraError(f"groups is {self.groups!r}; it must be a whole number of at least 1: try 1, 8 or 32")
        K = self.codewords
        if not _whole(K) or not 2 <= K <= MAX_CODEWORDS or K & (K - 1):
            near = isinstance(K, int | float) and abs(K) < 2**31
            nearest = min(MAX_CODEWORDS, 1 << max(1, int(K).bit_length() - 1)) if near else 1024
            raise AstraError(f"codewords is {K!r}; it must be a power of two from 2 to {MAX_CODEWORDS}: try {nearest}")
        for field, choices in (
            *(("site", Site), ("class_token", ClassToken), ("codec", Codec)),
            *(("predictor", Prediction), ("side_info", SideInfo)),
        ):
            value, allowed = getattr(self, field), get_args(choices)
            if value not in allowed:
                raise AstraError(f"{field} is {value!r}; it must be one of {', '.join(allowed)}")
        for field, numbers in (("widths", self.widths), ("levels", self.levels)):
            if not isinstance(numbers, tuple | list):
                raise AstraError(f"{field} is {numbers!r}; it must be a list of whole numbers")
        expected = self.groups if self.codec == "nested-pq" else 0
        if len(self.widths) != expected or not all(map(_whole, self.widths)):
            raise AstraError(
                f"widths is {list(self.widths)}; codec {self.codec} with {self.groups} groups has {expected} of them, "
                "each a whole number of at least 1"
            )
        if not all(map(_whole, self.levels)) or sum(self.levels) != expected:
            raise AstraError(
                f"levels is {list(self.levels)}; those of codec {self.codec} with {self.groups} groups have "
                f"{expected} together, each a whole number of at least 1"
            )
        if not _whole(self.hidden_units):
            raise AstraError(f"hidden_units is {self.hidden_units!r}; it must be a whole number of at least 1: try 128")
        if self.side_info != "none" and self.predictor == "none":
            raise AstraError(f"side_info is {self.side_info}, which only a predictor makes use of: choose one")
        if self.coded_blocks is not None:
            if not _whole(self.coded_blocks):
                raise AstraError(
                    f"coded_blocks is {self.coded_blocks!r}; it must be at least 1, or none for all blocks"
                )
            if self.predictor == "none":
                raise AstraError("coded_blocks says where codes are predicted and not sent, which takes a predictor")

    @property
    def level_widths(self) -> tuple[tuple[int, ...], ...]:
        """`widths`, level by level."""
        ends = tuple(itertools.accumulate(self.levels))
        return tuple(self.widths[start:end] for start, end in zip((0, *ends), ends, strict=False))

    @property
    def bits(self) -> int:
        """log2(K): bits of one code."""
        return self.codewords.bit_length() - 1

    @property
    def token_bits(self) -> int:
        """Bits of one token in one block, G * log2(K)."""
        return self.groups * self.bits

    def sending(self, L: int) -> int:
        """How many of L blocks send codes."""
        return min(self.coded_blocks or L, L) - (self.side_info != "none")

    def mean_bits(self, L: int) -> float:
        """Bits of one token in one block, the mean of all L blocks but one that token ids say exactly."""
        return self.token_bits * self.sending(L) / max(1, L - (self.side_info != "none"))

    def group_width(self, width: int) -> int:
        """d: the width of one group of a vector of `width`, of a codec without axes of its own.

        Raises:
          AstraError: the groups do not fit that width.
        """
        if width % self.groups:
            divisors = [g for g in range(1, width + 1) if width % g == 0]
            near = sorted(divisors, key=lambda g: abs(g - self.groups))[:3]
            raise AstraError(
                f"groups is {self.groups}, which does not divide the quantized width {width}: "
                f"try {' or '.join(str(g) for g in sorted(near))}"
            )
        return width // self.groups

    def with_groups(self, groups: int) -> "AstraConfig":
        """The same with another number of groups. Of unequal groups the first so many.

        Raises:
          AstraError: there are not so many unequal groups.
        """
        if self.levels and groups > self.groups:
            raise AstraError(f"groups is {groups}; these codes have {self.groups}, of which the first can be used")
        starts = itertools.accumulate(self.levels, initial=0)
        levels = tuple(min(n, groups - start) for n, start in zip(self.levels, starts, strict=False) if start < groups)
        return dataclasses.replace(self, groups=groups, widths=self.widths[:groups], levels=levels)


def _whole(value: Any) -> bool:
    """Whether it is a whole number of at least 1, and no more than arrays can have of anything."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def doubling(G: int) -> tuple[int, ...]:
    """Levels of 1, 1, 2, 4, 8, .. groups, G together, so that 1, 2, 4, 8, .. groups are whole levels (our choice)."""
    levels, total = [1], 1
    while total < G:
        levels.append(min(total, G - total))
        total += levels[-1]
    return tuple(levels)


def codec_and_predictor(name: str) -> tuple[Codec, Prediction]:
    """What is meant by `CODEC` or `CODEC+PREDICTOR`. Raises AstraError if there is no such thing."""
    codec, _, predictor = name.partition("+")
    predictor = predictor or "none"
    if codec not in get_args(Codec) or predictor not in get_args(Prediction):
        raise AstraError(f"there is no codec {name!r}: try vq, nested-pq, vq+linear or nested-pq+mlp")
    return cast(Codec, codec), cast(Prediction, predictor)


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
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
