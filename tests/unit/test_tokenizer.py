"""Tokenizers: what is read from a folder, and that text comes out piece by piece as it would in one go."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astra_jax.errors import AstraError
from astra_jax.tokenizer import Tokenizer

SHARED = Path(os.environ.get("ASTRA_SHARED", Path(__file__).parents[3] / "shared")) / "data"
REAL = {"gpt2_tokenizer": 50257, "stories260k": 512}
TEXTS = [
    "Once upon a time, there was a little girl named Lily.",
    "  two spaces,\n\na blank line\tand a tab ",
    "Grüße aus Köln, 東京 und 🙂👩‍👧 (emoji of several characters)",
    "a",
]


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory) -> Tokenizer:
    """Of bytes and a few pairs of bytes, as GPT-2's: most characters beyond ASCII are several tokens."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False),
    )
    folder = tmp_path_factory.mktemp("bytes")
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}'
    )
    return Tokenizer(folder, 280)


def streamed(tokenizer, ids, prompt=()):
    return "".join(map(tokenizer.stream(prompt), ids))


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=20))
def test_a_streamed_text_is_the_decoded_one(byte_tokenizer, text):
    ids = byte_tokenizer.encode(text)
    assert byte_tokenizer.decode(ids) == text
    assert streamed(byte_tokenizer, ids) == text


@given(ids=st.lists(st.integers(0, 279), max_size=20))
def test_a_stream_of_any_tokens_is_the_beginning_of_the_decoded_text(byte_tokenizer, ids):
    """A model may write what is no text; an incomplete character at the end stays unsaid."""
    assert byte_tokenizer.decode(ids).startswith(streamed(byte_tokenizer, ids))


def test_a_stream_goes_on_behind_a_prompt(byte_tokenizer):
    prompt, rest = byte_tokenizer.encode("東京 "), byte_tokenizer.encode("🙂!")
    pieces = list(map(byte_tokenizer.stream(prompt), rest))
    assert "".join(pieces) == "🙂!"
    assert pieces[0] == ""  # the first byte of four


def test_special_tokens_are_added_and_left_out(word_tokenizer):
    folder = word_tokenizer(5, special=True)
    tokenizer = Tokenizer(folder, 9)
    ids = tokenizer.encode("w0 w4 w2")
    assert ids == [1, 4, 8, 6, 2]
    assert tokenizer.encode("w0 w4 w2", limit=4) == [1, 4, 8, 2]
    assert tokenizer.size == 9
    plain = Tokenizer(word_tokenizer(5), 9)
    assert plain.encode("w0 w4 w2") == [4, 8, 6]
    assert plain.encode("") == []


def test_special_tokens_are_not_streamed(byte_tokenizer):
    a, end, b = byte_tokenizer.encode("a"), [0], byte_tokenizer.encode(" b")
    assert byte_tokenizer.decode([*a, *end, *b]) == streamed(byte_tokenizer, [*a, *end, *b]) == "a b"


def one_line(folder, vocab_size=100):
    with pytest.raises(AstraError) as raised:
        Tokenizer(folder, vocab_size)
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)
    return str(raised.value)


def test_no_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert "has no tokenizer.json or other tokenizer file: copy the model's into it" in one_line(tmp_path)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"version": "1.0"}', "\x00\xff"])
def test_a_damaged_tokenizer(word_tokenizer, tmp_path, damage):
    (tmp_path / "tokenizer.json").write_text(damage)
    assert "the tokenizer cannot be read" in one_line(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((word_tokenizer(5) / "tokenizer.json").read_bytes()[:200])
    assert "the tokenizer cannot be read" in one_line(tmp_path)


def test_no_code_of_the_folder_is_run(tmp_path, word_tokenizer):
    (tmp_path / "tokenizer.json").write_bytes((word_tokenizer(5) / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}'
    )
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    try:
        Tokenizer(tmp_path, 9)
    except AstraError as error:
        assert "cannot be read" in str(error)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_of_another_model(word_tokenizer):
    folder = word_tokenizer(5)
    Tokenizer(folder, 9)
    message = one_line(folder, vocab_size=8)
    assert (
        "the tokenizer has ids up to 8, but vocab_size in config.json is 8: is it the tokenizer of another" in message
    )


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the folder shared/ beside the repository")
@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers(name):
    tokenizer = Tokenizer(SHARED / name, REAL[name])
    assert tokenizer.size == REAL[name]
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert streamed(tokenizer, ids) == text
        for cut in range(1, len(ids)):
            prompt = tokenizer.decode(ids[:cut])
            if not prompt.endswith("\ufffd"):  # which ends within a character
                assert prompt + streamed(tokenizer, ids[cut:], prompt=ids[:cut]) == text


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the folder shared/ beside the repository")
def test_bytes_that_are_no_text_do_not_end_a_stream():
    """Llama's tokenizers write a run of bytes anew with every byte, so that what was shown may have been wrong."""
    tokenizer = Tokenizer(SHARED / "stories260k", 512)
    step = tokenizer.stream()
    assert [step(token) for token in (351, 85, 195, 453)][-1].endswith(tokenizer.decode([453]))
