"""Tokenizers: what is read from a folder, and that text comes out piece by piece as it would in one go."""

import io
import json
import shutil
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astra_jax.cli.main import main
from astra_jax.errors import AstraError
from astra_jax.inputs.tokenizer import Tokenizer
from tests.helpers import SHARED

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


def test_two_texts_are_one_with_types(word_tokenizer):
    folder = word_tokenizer(5, special=True)
    two, one, ids = Tokenizer(folder, 9, types=2), Tokenizer(folder, 9, types=1), [1, 4, 2, 8, 6, 2]
    assert one.encode(("w0", "w4 w2")) == ids
    assert two.encode(("w0", "w4 w2")) == ids[:3] + [9 + id for id in ids[3:]]
    assert two.encode("w0") == [1, 4, 2]
    # As in transformers, the longer one is cut until both are as long.
    assert two.encode(("w0 w1", "w4 w2 w3"), limit=5) == [1, 4, 2, 9 + 8, 9 + 2]
    other = json.loads((folder / "tokenizer.json").read_text())
    other["post_processor"]["pair"][-1]["SpecialToken"]["type_id"] = 2
    (folder / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(AstraError, match="gives a token the type 2; the model has types up to 1"):
        Tokenizer(folder, 9, types=2).encode(("w0", "w4"))


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


CODE = {"tokenizer_class": "XTok", "auto_map": {"AutoTokenizer": ["tokenization_x.XTok", "tokenization_x.XTok"]}}


@pytest.fixture
def with_code(monkeypatch):
    """Makes a tokenizer's folder ask for code of its own, which leaves a file where it was run; whoever asks on the
    terminal is answered yes."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 99))

    def change(folder, **settings):
        (folder / "tokenizer_config.json").write_text(json.dumps(CODE | settings))
        (folder / "tokenization_x.py").write_text(
            f"open({str(folder / 'ran')!r}, 'w')\n"
            "from transformers import PreTrainedTokenizerFast\nclass XTok(PreTrainedTokenizerFast): pass\n"
        )

    yield change
    assert sys.stdin.tell() == 0, "somebody asked a question on the terminal"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        {"tokenizer_class": None, "auto_map": ["tokenization_x.XTok", None]},
        {"auto_map": {"AutoTokenizer": [None, "some/repository--tokenization_x.XTok"]}},
        {"trust_remote_code": True},
    ],
)
@pytest.mark.parametrize(
    "config", ["{}", '{"model_type": "llama"}', '{"auto_map": {"AutoConfig": "tokenization_x.XTok"}}']
)
def test_a_tokenizer_of_its_own_code_is_read_without(with_code, tmp_path, word_tokenizer, config, settings):
    plain = word_tokenizer(5, special=True)
    shutil.copy(plain / "tokenizer.json", tmp_path)
    (tmp_path / "config.json").write_text(config)
    with_code(tmp_path, **settings)
    assert Tokenizer(tmp_path, 9).encode("w0 w4 nothing") == Tokenizer(plain, 9).encode("w0 w4 nothing")
    assert not (tmp_path / "ran").exists()


def test_a_configuration_of_its_own_code_is_not_run(with_code, tmp_path, word_tokenizer):
    shutil.copytree(word_tokenizer(5), tmp_path, dirs_exist_ok=True)
    with_code(tmp_path, auto_map={})
    (tmp_path / "config.json").write_text('{"model_type": "x", "auto_map": {"AutoConfig": "tokenization_x.XTok"}}')
    assert Tokenizer(tmp_path, 9).encode("w0") == [4]
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_that_is_nothing_but_code_is_refused(with_code, tmp_path):
    with_code(tmp_path)
    (tmp_path / "vocab.txt").write_text("[UNK]\nw0\n")
    assert "code of its own (tokenization_x.XTok), which is never run: save it as a tokenizer.json" in one_line(
        tmp_path
    )
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", ["[]", "3", "{", "\xff", "[" * 10**5])
def test_damaged_settings_of_a_tokenizer(tmp_path, word_tokenizer, content):
    shutil.copytree(word_tokenizer(5), tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_bytes(content.encode("latin1"))
    assert "tokenizer_config.json: is not valid JSON, or no object: is the file damaged?" in one_line(tmp_path)


def test_no_verb_runs_code_of_a_tokenizer(with_code, gpt2s, word_tokenizer, capsys):
    """Neither one that reads somebody's folder, nor one that reads a checkpoint which has got such files."""
    folder = gpt2s(plain=None)
    assert main(["export", str(folder / "plain"), str(folder / "hf")]) == 0
    with_code(folder / "hf")
    assert main(["convert", str(folder / "hf"), str(folder / "out")]) == 0
    assert not (folder / "hf" / "ran").exists()
    assert "tokenization_x.XTok" in capsys.readouterr().out
    (files,) = (folder / "plain").glob("tokenizer*")
    with_code(files)
    for name, code in (("out", 0), ("plain", 2)):  # a checkpoint that was changed is not even read
        for request in (
            ["run", "--prompt", "w1 w2", "--max-new-tokens", "1"],
            ["eval", "--data", str(folder / "text.txt")],
        ):
            assert main([request[0], str(folder / name), *request[1:], "--devices", "1"]) == code
    assert not (files / "ran").exists()


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


def test_a_tokenizer_that_fails_at_a_text_only(tmp_path):
    """Its files can be read, and the token for unknown words is not among its words."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import models, pre_tokenizers

    inner = Inner(models.WordPiece({"hello": 0}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    tokenizer = Tokenizer(tmp_path, 8)
    assert tokenizer.encode("hello") == [0]
    with pytest.raises(AstraError, match=r"the tokenizer cannot read a text \(Exception: .*\): are its files damaged"):
        tokenizer.encode("hello world")
