"""The collectives of a compiled program, read from its optimized HLO: what really crosses the link."""

import re
from collections.abc import Iterator
from typing import NamedTuple

_KINDS = "all-gather|all-reduce|all-to-all|collective-broadcast|collective-permute|ragged-all-to-all|reduce-scatter"
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?[\w.-]+ = (.*)$")
_OPERATION = re.compile(r"\s*([\w-]+)\(")
_COLLECTIVE = re.compile(rf"({_KINDS})(-start)?$")
_CALLED = re.compile(
    r"(?:body|condition|to_apply|calls|branch_computations|true_computation|false_computation)=(\{[^}]*\}|[%\w.-]+)"
)
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_PROMOTED = re.compile(r"to_apply=%?[\w.-]+_promoted")
_ARRAY = re.compile(r"(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One array that a collective makes. A collective of several arrays gives several of these.

    Attributes:
      kind: `all-gather`, `all-reduce`, ...: asynchronous forms (`all-gather-start`) go under the same name.
      dtype, shape: of the result on one device, dtype as HLO writes it (`u8`, `f32`).
      bytes: of the result; for an all-gather over N devices that is N times what one device sends. Sums of 16-bit
        floats count with these, though XLA's CPU backend makes them, and only them, in 32 bits.
      in_loop: whether it is in a `while`, directly or in something that is called from there.
      trip_count: how often the loop runs (nested loops multiplied); None outside of loops and where it is not known.
      sometimes: whether it is in a branch, so that it runs in some turns alone.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    in_loop: bool
    trip_count: int | None
    sometimes: bool = False


class _Instruction(NamedTuple):
    type: str  # of the result
    operation: str
    operands: str
    attributes: str


def collectives_in(compiled_text: str) -> list[Collective]:
    """All collectives of `jitted.lower(...).compile().as_text()`, in the order of the program, callers inlined."""
    computations: dict[str, list[_Instruction]] = {}
    entry = ""
    for line in compiled_text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            current.append(_parse(instruction[1]))

    def walk(name: str, in_loop: bool, trips: int | None, sometimes: bool = False) -> Iterator[Collective]:
        for instruction in computations[name]:
            if match := _COLLECTIVE.match(instruction.operation):
                for dtype, shape, size in _results(instruction, match[1], bool(match[2])):
                    yield Collective(match[1], dtype, shape, size, in_loop, trips if in_loop else None, sometimes)
            loop = instruction.operation == "while"
            count = _TRIP_COUNT.search(instruction.attributes)
            inner = trips if not loop else trips * int(count[1]) if count and trips else None
            for called in _CALLED.findall(instruction.attributes):
                for callee in re.findall(r"[\w.-]+", called):
                    branch = sometimes or instruction.operation == "conditional"
                    yield from walk(callee, in_loop or loop, inner, branch)

    return list(walk(entry, False, 1))


def _parse(text: str) -> _Instruction:
    """`TYPE operation(operands), attributes`. A tuple's type, a tiled layout and operands may hold parentheses."""
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    operation = _OPERATION.match(text, end)
    assert operation, text
    close = _closing(text, operation.end() - 1)
    return _Instruction(text[:end], operation[1], text[operation.end() : close - 1], text[close:])


def _closing(text: str, start: int) -> int:
    """The place behind the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place + 1
    raise ValueError(f"unbalanced parentheses in HLO: {text}")


def _results(instruction: _Instruction, kind: str, start: bool) -> list[tuple[str, tuple[int, ...], int]]:
    """(dtype, shape, bytes) of what a collective makes."""
    arrays, promoted = [], _PROMOTED.search(instruction.attributes)
    for dtype, bits, dims in _ARRAY.findall(instruction.type):
        shape = tuple(int(n) for n in dims.split(",") if n)
        elements = 1
        for n in shape:
            elements *= n
        arrays.append((dtype, shape, -(-elements * int(bits or 8) // 8) // (2 if promoted else 1)))
    if start and kind in ("all-gather", "collective-permute"):
        # The type of these is (operands, results, contexts); that of all-reduce-start is the results alone.
        operands = len(re.findall(r"%[\w.-]+", instruction.operands)) or instruction.operands.count(",") + 1
        arrays = arrays[operands : 2 * operands]
    return arrays
