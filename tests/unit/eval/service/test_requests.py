"""How a request travels to workers."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astra_jax.errors import AstraError
from astra_jax.serving.sampling import Sampling
from eval.service.requests import Request, Wishes, packed, unpacked

SAMPLING = {"temperature": st.just(0.0) | st.floats(0.1, 2), "top_k": st.integers(0, 9), "seed": st.integers(0, 9)}
STOPS = st.lists(st.text(min_size=1), max_size=3)
PICTURES = st.lists(st.tuples(st.text(), st.binary()), max_size=4)


@given(PICTURES, st.lists(st.text(), max_size=4), st.fixed_dictionaries(SAMPLING), STOPS, st.none() | st.integers(0, 9))
def test_a_request_arrives_as_it_was(pictures, prompts, sampling, stop, new_tokens):
    """With any names, any contents (also with line ends in them), any texts."""
    wishes = Wishes(3, new_tokens, Sampling(**sampling), tuple(stop))
    names, files = (tuple(column) for column in zip(*pictures, strict=True)) if pictures else ((), ())
    request = Request(names, files, tuple(prompts), wishes)
    assert unpacked(packed(request)) == request


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b'{"files": [1], "wishes": {}}', b"\xff"], ids=repr)
def test_what_is_no_request(body):
    with pytest.raises(AstraError, match="is not understood"):
        unpacked(body)


GOOD = {"names": ["a"], "files": [1], "prompts": [], "pairs": [], "wishes": dataclasses.asdict(Wishes())}
SAMPLED = dataclasses.asdict(Sampling())


@pytest.mark.parametrize(
    "wrong",
    [
        {"names": "a"},
        {"names": [1]},
        {"names": ["a", "b"]},
        {"names": None},
        {"files": [2]},
        {"files": [-1]},
        {"files": [True]},
        {"files": [0]},
        {"files": [1.0]},
        {"files": 1},
        {"files": [1e400]},
        {"prompts": "text"},
        {"prompts": [1]},
        {"prompts": [["a"]]},
        {"prompts": ["\udce9"]},
        {"prompts": ["a" * 5_000_000]},
        {"prompts": ["a"] * 1025},
        {"prompts": ["a"], "pairs": ["a", "b"]},
        {"prompts": ["a"], "pairs": [1]},
        {"prompts": ["a"], "pairs": "b"},
        {"wishes": None},
        {"wishes": []},
        {"wishes": {"top": 1}},
        {"wishes": GOOD["wishes"] | {"top": 0}},
        {"wishes": GOOD["wishes"] | {"top": "5"}},
        {"wishes": GOOD["wishes"] | {"top": 1.5}},
        {"wishes": GOOD["wishes"] | {"max_new_tokens": "5"}},
        {"wishes": GOOD["wishes"] | {"max_new_tokens": True}},
        {"wishes": GOOD["wishes"] | {"stop": "word"}},
        {"wishes": GOOD["wishes"] | {"stop": [""]}},
        {"wishes": GOOD["wishes"] | {"stop": [5]}},
        {"wishes": GOOD["wishes"] | {"stop": ["\ud800"]}},
        {"wishes": GOOD["wishes"] | {"sampling": None}},
        {"wishes": GOOD["wishes"] | {"sampling": SAMPLED | {"heat": 1}}},
        {"wishes": GOOD["wishes"] | {"sampling": SAMPLED | {"temperature": float("nan")}}},
        {"wishes": GOOD["wishes"] | {"sampling": SAMPLED | {"temperature": [1]}}},
        {"wishes": GOOD["wishes"] | {"sampling": SAMPLED | {"top_k": 0.5}}},
        {"wishes": GOOD["wishes"] | {"sampling": SAMPLED | {"top_p": None}}},
        {"wishes": GOOD["wishes"] | {"sampling": SAMPLED | {"seed": 2**32}}},
    ],
    ids=lambda wrong: str(wrong)[:60],
)
def test_every_field_of_a_request_has_a_type_and_a_range(unchecked, wrong):
    """Before it comes to anything that all hosts do together."""
    assert unpacked(json.dumps(GOOD).encode() + b"\nx") == Request(("a",), (b"x",))
    with pytest.raises(AstraError):
        unpacked(json.dumps(GOOD | wrong).encode() + b"\nx")


@pytest.mark.parametrize(
    "deep", [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 100_000], ids=["lists", "objects", "digits"]
)
def test_a_request_that_is_deep(deep):
    with pytest.raises(AstraError, match="is not understood"):
        unpacked(deep)


def test_a_request_that_is_too_large_says_so_before_it_is_sent():
    half = bytes(150_000_000)
    with pytest.raises(
        AstraError, match=r"300,000,000 of them pictures; workers take at most 268,435,456: ask for fewer"
    ):
        packed(Request(("a", "b"), (half, half)))
    with pytest.raises(AstraError, match="1,025 inputs are more than workers take at once, 1,024"):
        packed(Request(prompts=("a",) * 1025))


def test_texts_of_pairs():
    request = Request(prompts=("a", "b"), pairs=("c", "d"))
    assert unpacked(packed(request)) == request
    assert (request.texts, request.called) == ((("a", "c"), ("b", "d")), ("a | c", "b | d"))
    with pytest.raises(AstraError, match="there are 2 texts with --prompt and 1 with --pair: give one of --pair"):
        Request(prompts=("a", "b"), pairs=("c",))


def test_a_prompt_that_is_no_utf_8():
    """As Python reads `--prompt caf\\xe9` where the terminal has latin-1."""
    with pytest.raises(
        AstraError, match=r"--prompt: its character 4 is '\\udce9', which is none: give the text in UTF-8"
    ):
        Request(prompts=("fine", b"caf\xe9".decode(errors="surrogateescape")))
