"""How a model is compressed: the part of a checkpoint's configuration that ASTRA adds. One class per codec."""

import dataclasses
import itertools
from typing import Any, ClassVar, Literal, TypeVar, cast, get_args

from astra_jax.errors import AstraError

Site = Literal["hidden", "kv"]
ClassToken = Literal["distributed", "single"]
Prediction = Literal["none", "linear", "mlp"]
Kind = Literal["known", "coded", "predicted"]
Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]  # of sentences' embeddings

CODED: tuple[Kind, ...] = ("coded",)  # a schedule of one block

T = TypeVar("T")

MAX_CODEWORDS = 65_536  # codes are uint16
LARGEST = 2**27  # number of anything that a configuration counts: more is a mistake or a trap (our choice)


@dataclasses.dataclass(frozen=True)
class AstraConfig:
    """What is exchanged between devices (paper section 3; letters as in the README's legend). A codec has a subclass.

    Attributes:
      groups: G, code groups per token and block.
      codewords: K, codewords per group: a power of two, so that a code is exactly log2(K) bits on the wire.
      site: what is quantized: `hidden` is the input of the K and V projections (after the norm),
        `kv` is K and V themselves, before any rotary embedding, as one vector of width 2*J*E (our choice).
      class_token: `distributed` puts a replica of CLS at the head of every shard and averages their final
        states; `single` keeps one CLS on shard 0.
      predictor: how a token's vector is predicted from the block before, so that codes say only what differs
        (`codecs/predictor.py`, our choice).
      hidden_units: of the predictor `mlp`.
      schedule: what devices know of each other's tokens in every block (our choice); empty where all are `coded`.
        `coded`: their codes are sent. `predicted`: nothing is sent, and what the predictor expects stands in.
        `known`: of a text's first block, whose input follows from token ids, which are sent once.

    Raises:
      AstraError: a value is outside its range; the message names value, range and fix.
    """

    codec: ClassVar[str]
    nested: ClassVar[bool] = False  # whether the first groups are a code by themselves

    groups: int = 32
    codewords: int = 1024
    site: Site = "hidden"
    class_token: ClassToken = "distributed"
    predictor: Prediction = "none"
    hidden_units: int = 128
    schedule: tuple[Kind, ...] = ()

    def __post_init__(self) -> None:
        check_whole("groups", self.groups, "1, 8 or 32")
        check_codewords(self.codewords)
        check_whole("hidden_units", self.hidden_units, "128")
        for field, choices in (("site", Site), ("class_token", ClassToken), ("predictor", Prediction)):
            check_choice(field, getattr(self, field), choices)
        check_schedule(self.schedule, self.predictor)

    @property
    def bits(self) -> int:
        """log2(K): bits of one code."""
        return self.codewords.bit_length() - 1

    @property
    def token_bits(self) -> int:
        """Bits of one token in one coded block, G * log2(K)."""
        return self.groups * self.bits

    @property
    def expects(self) -> bool:
        """Whether devices expect something of a token before its code arrives."""
        return self.predictor != "none"

    def kinds(self, L: int) -> tuple[Kind, ...]:
        """The schedule of L blocks. Raises AstraError if it is of another number of blocks."""
        if self.schedule and len(self.schedule) != L:
            raise AstraError(f"schedule is of {len(self.schedule)} blocks; the model has {L}: calibrate it again")
        return self.schedule or CODED * L

    def mean_bits(self, L: int) -> float:
        """Bits of one token in one block, the mean of all L blocks but one that token ids say exactly."""
        kinds = self.kinds(L)
        return self.token_bits * kinds.count("coded") / max(1, L - kinds.count("known"))

    def with_groups(self, groups: int) -> "AstraConfig":
        """The same with another number of groups; of nested codes with the first so many.

        Raises:
          AstraError: nested codes have fewer.
        """
        return dataclasses.replace(self, groups=groups)

    def with_codec(self, name: str, groups: int, axes: int) -> "AstraConfig":
        """Another codec with the same K, site and class token, before calibration: `nested-pq` has all axes, spread
        evenly over the groups of every level.

        Args:
          name: see `codec_and_predictor`.
          axes: width of what is quantized.

        Raises:
          AstraError: there is no such codec, or it has more groups than axes.
        """
        codec, predictor = codec_and_predictor(name)
        astra, levels = VQConfig(groups, self.codewords, self.site, self.class_token, predictor), doubling(groups)
        if codec == "vq":
            return astra
        if max(levels) > axes:
            raise AstraError(
                f"groups is {groups}; a level of nested-pq would have more than {axes} axes: use at most {axes}"
            )
        widths = tuple(axes // n + (g < axes % n) for n in levels for g in range(n))
        return NestedPQConfig.of(astra, widths, levels)

    def in_words(self) -> str:
        """How codes are made, whatever their number."""
        parts = [self.codec + f"+{self.predictor}" * self.expects, f"K={self.codewords}", f"site {self.site}"]
        parts += [" ".join(self.schedule)] * bool(self.schedule)
        return ", ".join(parts + ["a single class token"] * (self.class_token == "single"))

    def as_dict(self) -> dict[str, Any]:
        """What `config_of` reads again, for JSON."""
        return {"codec": self.codec, **dataclasses.asdict(self)}


def class_kind(astra: AstraConfig | None) -> ClassToken:
    """How a model's class token, if it has one, is split over devices; `distributed` for one without codebooks."""
    return astra.class_token if astra else "distributed"


@dataclasses.dataclass(frozen=True)
class VQConfig(AstraConfig):
    """`vq`: a vector is cut into G equal groups and quantized as it is, as in the paper. G must divide its width."""

    codec: ClassVar[str] = "vq"

    def group_width(self, width: int) -> int:
        """d: the width of one group of a vector of `width`. Raises AstraError if the groups do not fit that width."""
        if width % self.groups:
            divisors = [g for g in range(1, width + 1) if width % g == 0]
            near = sorted(divisors, key=lambda g: abs(g - self.groups))[:3]
            raise AstraError(
                f"groups is {self.groups}, which does not divide the quantized width {width}: "
                f"try {' or '.join(str(g) for g in sorted(near))}"
            )
        return width // self.groups


@dataclasses.dataclass(frozen=True)
class NestedPQConfig(AstraConfig):
    """`nested-pq`: codes along axes that calibration finds, level by level, each of what those before it left, so that
    the first levels are a good code by themselves (`codecs/nested.py`, our choice).

    Attributes:
      widths: how many axes each group has.
      levels: how many groups each level has.
    """

    codec: ClassVar[str] = "nested-pq"
    nested: ClassVar[bool] = True

    widths: tuple[int, ...] = ()
    levels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, numbers, total in (("widths", self.widths, len), ("levels", self.levels, sum)):
            fits = isinstance(numbers, tuple | list) and all(map(is_whole, numbers)) and total(numbers) == self.groups
            if not fits:
                what = "one for each" if field == "widths" else "as many together"
                raise AstraError(
                    f"{field} is {numbers!r}; {self.groups} groups have {what}, whole numbers of at least 1"
                )

    @classmethod
    def of(cls, astra: AstraConfig, widths: tuple[int, ...], levels: tuple[int, ...]) -> "NestedPQConfig":
        """What another configuration says, with nested codes."""
        shared = {field.name: getattr(astra, field.name) for field in dataclasses.fields(AstraConfig)}
        return cls(**shared | {"groups": len(widths), "widths": widths, "levels": levels})

    def in_words(self) -> str:
        return f"{super().in_words()}, {self.widths[0]} axes in the first group"

    @property
    def level_widths(self) -> tuple[tuple[int, ...], ...]:
        """`widths`, level by level."""
        ends = tuple(itertools.accumulate(self.levels))
        return tuple(self.widths[start:end] for start, end in zip((0, *ends), ends, strict=False))

    def with_groups(self, groups: int) -> "AstraConfig":
        if groups > self.groups:
            raise AstraError(f"groups is {groups}; these codes have {self.groups}, of which the first can be used")
        starts = itertools.accumulate(self.levels, initial=0)
        levels = tuple(min(n, groups - start) for n, start in zip(self.levels, starts, strict=False) if start < groups)
        return dataclasses.replace(self, groups=groups, widths=self.widths[:groups], levels=levels)


CONFIGS: dict[str, type[AstraConfig]] = {"vq": VQConfig, "nested-pq": NestedPQConfig}
Codec = Literal["vq", "nested-pq"]  # the same names, for command lines


def config_of(values: dict[str, Any], where: str) -> AstraConfig:
    """The configuration that `as_dict` gave. Raises AstraError if it is none, and says `where`."""
    name = values.get("codec")
    if not isinstance(name, str) or name not in CONFIGS:
        raise AstraError(f"{where}: codec is {name!r}; it must be one of {', '.join(CONFIGS)}: calibrate it again")
    return from_dict(CONFIGS[name], {field: value for field, value in values.items() if field != "codec"}, where)


def is_whole(value: Any) -> bool:
    """Whether it is a whole number of at least 1, and no more than arrays can have of anything."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def check_whole(field: str, value: Any, hint: str) -> None:
    """Raises AstraError unless a value is a whole number of at least 1."""
    if not is_whole(value):
        raise AstraError(f"{field} is {value!r}; it must be a whole number of at least 1: try {hint}")


def check_codewords(K: Any) -> None:
    """Raises AstraError unless K is a power of two that codes can number."""
    if not is_whole(K) or not 2 <= K <= MAX_CODEWORDS or K & (K - 1):
        near = isinstance(K, int | float) and abs(K) < 2**31
        nearest = min(MAX_CODEWORDS, 1 << max(1, int(K).bit_length() - 1)) if near else 1024
        raise AstraError(f"codewords is {K!r}; it must be a power of two from 2 to {MAX_CODEWORDS}: try {nearest}")


def check_choice(field: str, value: Any, choices: Any) -> None:
    """Raises AstraError unless a value is one of a Literal."""
    if value not in get_args(choices):
        raise AstraError(f"{field} is {value!r}; it must be one of {', '.join(get_args(choices))}")


def check_schedule(schedule: Any, predictor: str) -> None:
    """Raises AstraError for a schedule that cannot be: only a predictor makes use of what is not coded, only the first
    block is known, and something has to be said before anything is predicted."""
    if not isinstance(schedule, tuple | list):
        raise AstraError(f"schedule is {schedule!r}; it must be a list of {', '.join(get_args(Kind))}")
    for number, kind in enumerate(schedule):
        check_choice("schedule", kind, Kind)
        if kind != "coded" and predictor == "none":
            raise AstraError(f"schedule has a block that is {kind}, which takes a predictor: choose one")
        if (kind == "known") > (number == 0) or (kind == "predicted" and number == 0):
            raise AstraError(f"schedule has block {number} as {kind}; the first is known or coded, no other is known")


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
    if codec not in CONFIGS or predictor not in get_args(Prediction):
        raise AstraError(f"there is no codec {name!r}: try vq, nested-pq, vq+linear or nested-pq+mlp")
    return cast(Codec, codec), cast(Prediction, predictor)


def from_dict(cls: type[T], values: Any, where: str) -> T:
    """Builds the frozen dataclass `cls` from parsed JSON. Raises AstraError for what has other fields, or none."""
    if not isinstance(values, dict):
        raise AstraError(f"{where}: {cls.__name__} is {values!r}; it must be an object: was it damaged?")
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
