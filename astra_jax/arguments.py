"""Lists on a command line: `--rates 10mbit,20mbit` and `--rates 10mbit 20mbit` are the same."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

from tyro.constructors import PrimitiveConstructorSpec

from astra_jax.errors import AstraError


def _listed(kind: Callable[[str], Any], metavar: str, example: str) -> PrimitiveConstructorSpec[Any]:
    def parse(words: Sequence[str]) -> tuple[Any, ...]:
        parts = [part.strip() for word in words for part in word.split(",")]
        try:
            if not all(parts):
                raise ValueError
            return tuple(map(kind, parts))
        except ValueError:
            raise AstraError(f"{','.join(words)!r} is no list here: write something like {example}") from None

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"{metavar},{metavar},...",
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(map(str, value))] if value else [],
    )


Texts = Annotated[tuple[str, ...], _listed(str, "TEXT", "10mbit,20mbit")]
Integers = Annotated[tuple[int, ...], _listed(int, "N", "1,16,32")]
Numbers = Annotated[tuple[float, ...], _listed(float, "X", "1,1,0.5")]
