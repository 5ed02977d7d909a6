"""Documents that are nearly right: mutations of JSON trees, of bytes and of lines of text, as hypothesis draws them."""

import copy
import json
from collections.abc import Callable, Mapping
from typing import Any

from hypothesis import strategies as st

PAGE = 4096
DEEP, HUGE = "@deep@", "@1e999@"  # stand in for what Python's own values cannot say
_RAW = {DEEP: "[" * 20_000 + "]" * 20_000, HUGE: "1e999"}
_AGAIN = "@again@"  # at the end of a key that stands twice in its object

NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 255, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**30, 10**400),
    *(0.0, -0.0, 0.5, 1.5, -1.5, 1e-320, 1e-45, 1e308, -1e308, float("nan"), float("inf"), float("-inf"), HUGE),
)
TEXTS = (
    *(
        "",
        " ",
        "0",
        "1",
        "-1",
        "1_0",
        "\uff11\uff12",
        "nan",
        "inf",
        "1e5",
        "null",
        "true",
        "\0",
        "\ud800",
        "\ufeff",
        "é\u202e",
    ),
    *("a\nb", "../../etc/passwd", "/dev/zero", "..", "[red]x", "x" * 10_000, "https://example.org/x"),
)
OTHERS = (None, True, False, [], {}, [[]], {"": {}}, [1, 2], [None], ["a", 1], {"a": 1}, [0] * 1000, DEEP)


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every container of a tree with each of its keys or indices."""
    found: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            found.append((node, key))
            waiting.append(node[key])
    return found


def _near(value: Any) -> list[Any]:
    """Values that are nearly this one."""
    if isinstance(value, bool):
        return [not value, int(value), str(value)]
    if isinstance(value, int | float):
        return [-value, value + 1, value - 1, 2 * value, float(min(value, 1e9)), str(value), [value], [value, value]]
    if isinstance(value, str):
        return [value.upper(), value + " ", value[:-1], value + "x", [value], {value: value}]
    if isinstance(value, list):
        return [value[:-1], value + value, value[::-1], value[:1] * 50, dict(enumerate(value))]
    if isinstance(value, dict):
        return [dict(list(value.items())[:-1]), list(value.values()), dict.fromkeys(value)]
    return [0, "", {}]


def _drop(draw: Any, node: Any, key: Any, known: Mapping[str, Any]) -> None:
    del node[key]


def _replace(draw: Any, node: Any, key: Any, known: Mapping[str, Any]) -> None:
    node[key] = copy.deepcopy(draw(st.sampled_from(draw(st.sampled_from((NUMBERS, TEXTS, OTHERS))))))


def _nudge(draw: Any, node: Any, key: Any, known: Mapping[str, Any]) -> None:
    node[key] = copy.deepcopy(draw(st.sampled_from(_near(node[key]))))


def _wrap(draw: Any, node: Any, key: Any, known: Mapping[str, Any]) -> None:
    node[key] = draw(st.sampled_from((lambda v: [v], lambda v: {"value": v}, json.dumps)))(node[key])


def _again(draw: Any, node: Any, key: Any, known: Mapping[str, Any]) -> None:
    other = copy.deepcopy(draw(st.sampled_from((node[key], *NUMBERS, *TEXTS, *OTHERS))))
    if isinstance(node, dict):
        node[f"{key}{_AGAIN}"] = other
    else:
        node.insert(key, other)


def _rename(draw: Any, node: Any, key: Any, known: Mapping[str, Any]) -> None:
    if isinstance(node, dict):
        node[draw(st.sampled_from((*known, *TEXTS, f"{key}s")))] = node.pop(key)


def _add(draw: Any, node: Any, key: Any, known: Mapping[str, Any]) -> None:
    """A key that means something in such documents, and that this one may lack."""
    if known and isinstance(node, dict):
        name = draw(st.sampled_from(sorted(known)))
        node[name] = copy.deepcopy(draw(st.sampled_from((known[name], *_near(known[name]), *NUMBERS, *OTHERS))))


_WAYS: tuple[Callable[..., None], ...] = (_replace, _replace, _nudge, _nudge, _drop, _add, _add, _wrap, _again, _rename)


@st.composite
def trees(draw: Any, *documents: Any, known: Mapping[str, Any] | None = None) -> Any:
    """One of these JSON documents with one to three mutations. `known` are keys that may be added, and their values."""
    tree = copy.deepcopy(draw(st.sampled_from(documents)))
    for _ in range(draw(st.integers(1, 3))):
        if places := _places(tree):
            node, key = draw(st.sampled_from(places))
            draw(st.sampled_from(_WAYS))(draw, node, key, known or {})
    return tree


def written(tree: Any) -> bytes:
    """A tree of `trees` as JSON, with the keys that are there twice and the values that Python has no value for."""
    text = json.dumps(tree).replace(_AGAIN, "")
    for name, raw in _RAW.items():
        text = text.replace(json.dumps(name), raw)
    return text.encode()


def json_files(*documents: Any, known: Mapping[str, Any] | None = None) -> st.SearchStrategy[bytes]:
    """JSON files: mutated as trees, and one of eight as bytes."""
    whole = [written(document) for document in documents]
    bytewise = st.sampled_from(whole).flatmap(byte_strings)
    return st.integers(0, 7).flatmap(lambda n: trees(*documents, known=known).map(written) if n else bytewise)


@st.composite
def byte_strings(draw: Any, content: bytes) -> bytes:
    """A file's bytes with one to three mutations: flipped, cut, inserted, spliced, zeroed, overwritten by a number."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at, length = draw(st.integers(0, len(data))), draw(st.sampled_from((1, 2, 4, 8, 64, PAGE)))
        way = draw(st.sampled_from(("flip", "flip", "number", "cut", "drop", "insert", "splice", "zero", "page")))
        if way == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif way == "number":
            size = draw(st.sampled_from((1, 2, 4, 8)))
            value = draw(st.sampled_from((0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1), 2 ** (4 * size))))
            data[at : at + size] = value.to_bytes(size, draw(st.sampled_from(("little", "big"))))
        elif way == "cut":
            del data[at:]
        elif way == "drop":
            del data[at : at + length]
        elif way == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=8))
        elif way == "splice":
            source = draw(st.integers(0, len(data)))
            data[at:at] = data[source : source + length]
        elif way == "zero":
            data[at : at + length] = bytes(min(length, len(data) - at))
        elif way == "page":
            start = at // PAGE * PAGE
            data[start : start + PAGE] = bytes(min(PAGE, len(data) - start))
    return bytes(data)


# What has a meaning, or looks as if it had one, on command lines and in tables.
_PIECES = (
    *(*",;:/xX[]%+-._ \t\n\r\0\"'=\\@",),
    *("0", "1", "9", "00", "-1", "0.5", "1_0", "0x10", "1e9", "1e400", "1e-400", "9" * 5000, "e", "inf", "nan", "True"),
    *("\uff11", "\u0663", "\xb2", "\xbd", "\u2167", "\u2212" + "1", "\ufeff", "\u202e", "\u2028", "\xe9", "\U0001f600"),
    *("null", "NA", "mbit", "ms", "--json"),
)


@st.composite
def lines(draw: Any, *texts: str) -> str:
    """One of these texts with one to three mutations of characters or words."""
    text = draw(st.sampled_from(texts))
    for _ in range(draw(st.integers(1, 3))):
        at, length = draw(st.integers(0, len(text))), draw(st.sampled_from((0, 0, 1, 1, 2, 5)))
        way = draw(st.sampled_from(("put", "put", "put", "drop", "double", "swap", "any")))
        if way == "put":
            text = text[:at] + draw(st.sampled_from(_PIECES)) + text[at + length :]
        elif way == "drop":
            text = text[:at] + text[at + 1 + length :]
        elif way == "double":
            text = text[: at + length] + text[at:]
        elif way == "swap":
            text = text[at:] + text[:at]
        else:
            text = text[:at] + draw(st.text(max_size=3)) + text[at:]
    return text
