"""The engine: typed results of pictures and texts, and what it refuses."""

import dataclasses
import inspect
import textwrap
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

import checkpoints
from astra_jax import AstraError, Engine, make_mesh, parallelize
from astra_jax.codecs.config import VQConfig
from astra_jax.serving.engine import Event, TextOptions
from astra_jax.serving.sampling import Sampling

ASTRA = VQConfig(groups=4, codewords=16)


def loaded(model, tokenizer_files=None, **fields):
    """A checkpoint of a model."""
    size = {"height": 20, "width": 20}
    values = {
        "family": type(model).__name__.lower(),
        "config": model.config,
        "astra": model.astra,
        "labels": None,
        "preprocessing": {"size": size},
        "hf_config": {},
        "dtype": "float32",
        "history": (),
        "model": model,
        "tokenizer_files": tokenizer_files,
    }
    return checkpoints.Checkpoint(**values | fields)


@pytest.fixture(scope="module")
def words(word_tokenizer):
    return word_tokenizer(46)


@pytest.fixture(scope="module")
def language(tiny_llama, words):
    """A language model on two devices, whose token 7 ends a text."""
    return Engine(loaded(tiny_llama(ASTRA), words, generation={"eos_token_id": 7}), make_mesh(2))


def pictures(*sizes):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)) for size in sizes]


def test_pictures_are_classified(tiny_vit):
    model = tiny_vit(ASTRA, num_channels=3, num_labels=3)
    checkpoint, mesh = loaded(model, labels=("a", "b", "c")), make_mesh(2)
    engine, images = Engine(checkpoint, mesh), pictures((30, 20), (20, 20))
    found = engine.classify(iter(images), top=2)
    expected = np.asarray(jax.nn.softmax(parallelize(model, mesh)(checkpoint.processor(images))))
    assert [classes.called for classes in found] == ["probability"] * 2
    for classes, row in zip(found, expected, strict=True):
        order = np.argsort(-row)[:2]
        assert [score.label for score in classes.best] == ["abc"[c] for c in order]
        np.testing.assert_allclose([score.value for score in classes.best], row[order], rtol=1e-6)
    assert engine.classify(engine.encode(images), top=2) == found
    with pytest.raises(AstraError, match="there is no picture: give at least one"):
        engine.classify([])


def test_texts_are_embedded(tiny_bert, words):
    engine = Engine(loaded(tiny_bert(ASTRA), words), make_mesh(2))
    together = engine.embed(["w1 w2 w3", "w4"])
    assert together.shape == (2, 16)
    np.testing.assert_allclose(engine.embed(["w4"]), together[1:], rtol=1e-5, atol=1e-5)
    with pytest.raises(AstraError, match="pairs of texts are for classifiers, and this checkpoint is for embedding"):
        engine.embed([("w1", "w4")])


def texts(events, count):
    """Of every prompt its tokens, its text and its end, which is that of its last event alone."""
    found = [([], [], []) for _ in range(count)]
    for event in events:
        tokens, pieces, ends = found[event.row]
        assert isinstance(event, Event) and not any(ends), "nothing comes after an end"
        tokens.append(event.token)
        pieces.append(event.text)
        ends.append(event.end)
    return [(tokens, "".join(pieces), ends[-1]) for tokens, pieces, ends in found]


PROMPTS = ["w1 w2 w3 w4 w5", "w6", "w1 w2 w3 w4 w5"]


def test_every_prompt_has_its_own_sampling_length_and_stop(language):
    """And goes on as it does alone."""
    options = [
        TextOptions(9),
        TextOptions(4, Sampling(1.5, seed=3)),
        TextOptions(20, Sampling(2.0, top_k=9, seed=4)),
    ]
    together = texts(language.generate(PROMPTS, options), 3)
    for prompt, one, found in zip(PROMPTS, options, together, strict=True):
        assert texts(language.generate([prompt], one), 1) == [found]
        tokens, _, end = found
        assert end == ("eos" if tokens[-1] == 7 else "length")
        assert end == "eos" or len(tokens) == one.max_new_tokens
        assert 7 not in tokens[:-1]


def test_a_stop_string_ends_its_text_alone(language):
    free = texts(language.generate(PROMPTS[:2], TextOptions(8, Sampling(3.0, seed=1))), 2)
    word = free[0][1].split()[2]
    options = [TextOptions(8, Sampling(3.0, seed=1), (word,)), TextOptions(8, Sampling(3.0, seed=1))]
    stopped = texts(language.generate(PROMPTS[:2], options), 2)
    assert stopped[0][1] == free[0][1][: free[0][1].index(word)] and stopped[0][2] == "stop"
    assert stopped[1] == free[1]


def test_an_end_of_text_token_ends_a_text(language):
    tokens, _, end = texts(language.generate(["w1"], TextOptions(60, Sampling(5.0, seed=0))), 1)[0]
    assert end == "eos" and tokens[-1] == 7 and 7 not in tokens[:-1]


def test_the_cache_is_accounted_for(language, tiny_llama, words):
    kept = language.generate(PROMPTS, TextOptions(2))
    assert kept.lengths == (5, 1, 5) and 0 < kept.memory.codes < kept.memory.key_value
    alone = Engine(loaded(tiny_llama(), words), make_mesh(1))
    assert alone.generate(PROMPTS, TextOptions(2)).memory == (0, 0)


def test_passes_are_run_by_who_measures_them(tiny_llama, words):
    """What has programs of its own is told beside the inputs."""
    seen = []

    def passing(inputs, call, compile_all=None, programs=None):
        compile_all()
        seen.append((inputs.lengths.tolist(), programs))
        return call()

    engine = Engine(loaded(tiny_llama(), words), make_mesh(1), passing=passing)
    list(engine.generate(["w1 w2"], TextOptions(3)))
    list(engine.generate(["w1"], TextOptions(1)))
    assert seen == [([2], (32, True)), ([1], (32, False))]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.classify(["w1"]), "this checkpoint is for causal-lm: call generate"),
        (lambda e: e.embed(["w1"]), "this checkpoint is for causal-lm: call generate"),
        (lambda e: e.generate("w1"), "the inputs are one text: give a list of them"),
        (lambda e: e.generate([""]), "the text is empty"),
        (lambda e: e.generate(["w1"], [TextOptions()] * 2), "there are 1 prompts and options for 2"),
        (lambda e: e.generate(["w1"], TextOptions(0)), "the number of new tokens is 0; it must be at least 1"),
        (lambda e: e.generate(["w1"], TextOptions(65)), "a prompt of 1 and 65 new tokens are more than the model"),
        (lambda e: TextOptions(1.5), "--max-new-tokens is 1.5"),
        (lambda e: TextOptions(stop=("",)), "--stop is an empty string"),
    ],
)
def test_what_is_refused(unchecked, language, call, message):
    with pytest.raises(AstraError, match=message):
        call(language)


def test_the_example_runs(tiny_gpt2, tiny_vit, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    gpt2, vit = loaded(tiny_gpt2(ASTRA), words), loaded(tiny_vit(ASTRA, num_channels=3, num_labels=3))
    for name, checkpoint in (("gpt2-astra", gpt2), ("vit-astra", vit)):
        checkpoints.save(tmp_path / name, dataclasses.replace(checkpoint, family=name.partition("-")[0]))
    pictures((20, 20))[0].save("cat.png")
    code = inspect.getdoc(Engine).split("several devices:\n\n")[1].partition("\n\nOn several hosts")[0]
    exec(textwrap.dedent(code), {"Image": SimpleNamespace(open=Image.open)})
    assert len(capsys.readouterr().out.split()) > 3
