"""The command line: its options are the fields of a dataclass, and numbers on it are written as people write them.

Lists: `--rates 10mbit,20mbit` and `--rates 10mbit 20mbit` are the same.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from astra_jax.cli.numerals import OutOfRange, number, whole
from astra_jax.errors import AstraError

T = TypeVar("T")


class _Odd(AstraError):
    """A word that is not what its option takes; which option that is, only who has all words knows."""

    def __init__(self, word: str, why: str):
        super().__init__(f"{word!r}: {why}")
        self.word, self.why = word, why


def _read(kind: Callable[[str], Any], word: str) -> Any:
    try:
        return kind(word)
    except ValueError as error:
        raise _Odd(word, str(error)) from None


def _text(word: str) -> str:
    if not word:
        raise ValueError("it is empty")
    return word


def _listed(kind: Callable[[str], Any], metavar: str, each: str, example: str) -> PrimitiveConstructorSpec[Any]:
    def read(part: str, words: Sequence[str]) -> Any:
        try:
            return kind(part)
        except ValueError as error:
            why = f", {each} is {part}; {error}" if isinstance(error, OutOfRange) else ""
            raise AstraError(f"{','.join(words)!r} is no list here{why}: write something like {example}") from None

    def parse(words: Sequence[str]) -> tuple[Any, ...]:
        return tuple(read(part.strip(), words) for word in words for part in word.split(","))

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"{metavar},{metavar},...",
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(map(str, value))] if value else [],
    )


Texts = Annotated[tuple[str, ...], _listed(_text, "TEXT", "text", "10mbit,20mbit")]
Integers = Annotated[tuple[int, ...], _listed(whole, "N", "number", "1,16,32")]
Numbers = Annotated[tuple[float, ...], _listed(number, "X", "speed", "1,1,0.5")]

_KINDS: dict[Any, Callable[[str], Any]] = {int: whole, float: number}
_rules = ConstructorRegistry()


@_rules.primitive_rule
def _numbers(about: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    kind = _KINDS.get(about.type)
    if kind is None:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=about.type.__name__.upper(),
        instance_from_str=lambda words: _read(kind, words[0]),
        is_instance=lambda value: isinstance(value, int | about.type) and not isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
    )


def parse(kind: type[T], args: Sequence[str] | None = None, **about: Any) -> T:
    """The options of a command, as an instance of a dataclass.

    Args:
      kind: the dataclass.
      args: the words; by default those that this program was started with.
      about: what `tyro.cli` is told of the program: prog, description.

    Raises:
      AstraError: a number or a list is none.
      SystemExit: the words are not understood, or ask for help; what is to be said is printed.
    """
    words = list(sys.argv[1:] if args is None else args)
    try:
        return tyro.cli(kind, args=words, registry=_rules, **about)
    except _Odd as odd:
        word = odd.word if len(odd.word) <= 40 else f"{odd.word[:40]}..."
        raise AstraError(f"{_option_of(odd.word, words)} is {word}; {odd.why}") from None


def _option_of(word: str, words: Sequence[str]) -> str:
    """The option that a word was given to."""
    option = "an option"
    for each in words:
        name, _, value = each.partition("=")
        if each.startswith("--"):
            option = name
        if word in (each, value):
            break
    return option
