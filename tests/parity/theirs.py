"""How a module of ours is compared with those of transformers."""

from typing import NamedTuple

V, T, PAD = 61, 24, 60


class Theirs(NamedTuple):
    """What a module of ours stands for: from the input of one of their modules to the output of one."""

    given: str
    expected: str
    third: int | None = None  # of the output, where it is several side by side


def same(name: str, third: int | None = None) -> Theirs:
    return Theirs(name, name, third)
