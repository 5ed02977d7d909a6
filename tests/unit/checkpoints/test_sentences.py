"""What sentence-transformers writes beside a model: read in the words of every version, kept by export, or refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import checkpoints
from astra_jax.cli.main import main
from astra_jax.errors import AstraError
from astra_jax.inputs.token_batches import longest
from astra_jax.models.bert import BertConfig
from checkpoints import huggingface
from checkpoints.sentences import Sentences, check_width, read_sentences, sentence_names, sentence_notes
from checkpoints.tensor_maps import build, flat_state, with_state
from eval.quality.similarity import correlations
from eval.service.service import similarity_rows
from tests.helpers import folders

BERT = BertConfig(
    vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
    max_position_embeddings=16,
)  # fmt: skip
OLD = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ],
    "1_Pooling/config.json": {
        "word_embedding_dimension": 8, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False,
        "pooling_mode_max_tokens": False, "pooling_mode_mean_sqrt_len_tokens": False,
        "pooling_mode_weightedmean_tokens": False, "pooling_mode_lasttoken": False, "include_prompt": True,
    },
    "sentence_bert_config.json": {"max_seq_length": 12, "do_lower_case": True},
    "config_sentence_transformers.json": {
        "__version__": {"sentence_transformers": "2.0.0"}, "prompts": {"query": "query: ", "passage": ""},
        "default_prompt_name": "query", "similarity_fn_name": "dot",
    },
}  # fmt: skip
# As version 6.2 writes them.
NEW = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"},
        {
            "idx": 1,
            "name": "1",
            "path": "1_Pooling",
            "type": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
        },
        {
            "idx": 2,
            "name": "2",
            "path": "2_Normalize",
            "type": "sentence_transformers.base.modules.normalize.Normalize",
        },
    ],
    "1_Pooling/config.json": {"embedding_dimension": 8, "pooling_mode": "lasttoken", "include_prompt": True},
    "2_Normalize/config.json": {
        "module_input_name": "sentence_embedding",
        "module_output_name": "sentence_embedding",
    },
    "sentence_bert_config.json": {
        "transformer_task": "feature-extraction",
        "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        "module_output_name": "token_embeddings",
    },
    "config_sentence_transformers.json": {
        "model_type": "SentenceTransformer", "__version__": {"sentence_transformers": "6.2.0"},
        "prompts": {"query": "", "document": ""}, "default_prompt_name": None, "similarity_fn_name": "cosine",
    },
    "tokenizer_config.json": {"model_max_length": 12},
}  # fmt: skip


def write(folder: Path, files: dict[str, Any], **changes: dict[str, Any]) -> Path:
    """Writes JSON files; `changes` are of fields, by the first word of a file's name."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        more = next((more for word, more in changes.items() if name.startswith(word)), {})
        (folder / name).write_text(json.dumps(content | more if more else content))
    return folder


def read_both(folder: Path) -> None:
    read_sentences(folder)
    check_width(folder, 8)


def fault(folder: Path) -> str:
    with pytest.raises(AstraError) as raised:
        read_both(folder)
    assert "\n" not in str(raised.value) and str(folder) in str(raised.value)
    return str(raised.value)


def test_every_version_is_read(tmp_path: Path) -> None:
    assert read_sentences(tmp_path) == Sentences()  # as sentence-transformers reads a folder of none of its files
    old = read_sentences(write(tmp_path / "old", OLD))
    assert old == Sentences("class", False, 12, True, "query: ", "dot")
    assert read_sentences(write(tmp_path / "new", NEW)) == Sentences("last", True, 12, False, "", "cosine")
    assert set(sentence_names(tmp_path / "new")) == set(NEW) - {"tokenizer_config.json"}
    assert sentence_notes(tmp_path / "new") == [] and "prompts (query): only" in sentence_notes(tmp_path / "old")[0]


@pytest.mark.parametrize(("spelling", "ours"), [("mean", "mean"), ("cls", "class"), (["lasttoken"], "last")])
def test_a_pooling_in_the_words_of_today(spelling: Any, ours: str, tmp_path: Path) -> None:
    write(tmp_path, NEW, **{"1_Pooling": {"pooling_mode": spelling}})
    assert read_sentences(tmp_path).pooling == ours


@pytest.mark.parametrize(("said", "limit"), [(None, 16), (12, 12), (16, 16), (512, 16)])
def test_no_text_is_longer_than_the_model_has_positions(said: int | None, limit: int) -> None:
    assert longest(dataclasses.replace(BERT, max_seq_length=said)) == limit


@pytest.mark.parametrize("limit", [None, 10**30, True, "12"])
def test_a_tokenizer_without_a_limit(limit: Any, tmp_path: Path) -> None:
    assert read_sentences(write(tmp_path, NEW, tokenizer_config={"model_max_length": limit})).max_seq_length is None


def test_the_old_name_of_a_file(tmp_path: Path) -> None:
    files = {name: content for name, content in OLD.items() if not name.startswith("sentence")}
    write(tmp_path, files | {"sentence_roberta_config.json": {"max_seq_length": 7}})
    assert read_sentences(tmp_path).max_seq_length == 7


REFUSED = [
    ("1_Pooling", {"pooling_mode": "max"}, "has 'max'; supported is one of mean, cls, lasttoken"),
    ("1_Pooling", {"pooling_mode": ["cls", "mean"]}, "has 'cls' and 'mean'; supported is one of"),
    ("1_Pooling", {"pooling_mode": {}}, "has {}; supported is one of"),
    ("1_Pooling", {"embedding_dimension": 16}, "embedding_dimension is 16, but hidden_size in config.json is 8"),
    ("1_Pooling", {"include_prompt": "no"}, "include_prompt is 'no'; it must be of type bool"),
    ("1_Pooling", {"weights": 3}, "has weights 3, which is not known here"),
    ("2_Normalize", {"module_input_name": "token_embeddings"}, "module_input_name is 'token_embeddings'; only"),
    ("sentence", {"max_seq_length": "12"}, "max_seq_length is '12'; it must be of type int"),
    ("sentence", {"do_lower_case": 1}, "do_lower_case is 1; it must be of type bool"),
    ("sentence", {"transformer_task": "fill-mask"}, "transformer_task is 'fill-mask'; only 'feature-extraction'"),
    ("sentence", {"modality_config": {"image": {}}}, "modality_config is {'image': {}}; only"),
    ("sentence", {"processing_kwargs": {"text": {}}}, "processing_kwargs is {'text': {}}; it must be empty"),
    ("sentence", {"model_args": {"add_pooling_layer": True}}, "model_args is {'add_pooling_layer': True}; it must be"),
    ("sentence", {"special": 1}, "has special 1, which is not known here"),
    ("config_sentence", {"truncate_dim": 4}, "has truncate_dim 4, which is not known here"),
    ("config_sentence", {"model_type": "SparseEncoder"}, "model_type is 'SparseEncoder'; only 'SentenceTransformer'"),
    ("config_sentence", {"default_prompt_name": "code"}, "default_prompt_name is 'code', which is not among"),
    ("config_sentence", {"prompts": {"query": 3}, "default_prompt_name": "query"}, "'query' is 3; it must be text"),
    ("config_sentence", {"prompts": ["query: "]}, "prompts is ['query: ']; it must be of type dict"),
]


@pytest.mark.parametrize(("file", "change", "expected"), REFUSED)
def test_what_is_not_computed_here_is_refused(file: str, change: dict, expected: str, tmp_path: Path) -> None:
    assert expected in fault(write(tmp_path, NEW, **{file: change}))


def test_a_prompt_that_is_not_pooled_is_refused(tmp_path: Path) -> None:
    write(tmp_path, OLD, **{"1_Pooling": {"include_prompt": False}})
    assert "a prompt that include_prompt keeps out of the pooling" in fault(tmp_path)
    write(tmp_path, OLD, **{"1_Pooling": {"include_prompt": False}, "config_sentence": {"default_prompt_name": None}})
    assert read_sentences(tmp_path).prompt == ""


@pytest.mark.parametrize("change", [{"type": "a\nb"}, {"path": "a\nb"}])
def test_names_that_a_line_cannot_show(change: dict[str, str], tmp_path: Path) -> None:
    first, second = OLD["modules.json"]
    assert "a\\nb" in fault(write(tmp_path, OLD | {"modules.json": [first, second | change]}))


def test_modules_with_arguments_are_refused(tmp_path: Path) -> None:
    first, *rest = OLD["modules.json"]
    assert "has kwargs ['task'], which is not" in fault(
        write(tmp_path, OLD | {"modules.json": [first | {"kwargs": ["task"]}, *rest]})
    )


@pytest.fixture
def encoder(tmp_path: Path, word_tokenizer: Any) -> Path:
    """A Hugging Face folder of a tiny sentence encoder, with `OLD` beside it."""
    rng, model = np.random.default_rng(0), build("bert", BERT)
    drawn = {path: rng.normal(size=a.shape).astype(np.float32) for path, a in flat_state(model).items()}
    checkpoint = checkpoints.Checkpoint(
        "bert", BERT, None, None, None, {}, "float32", (), with_state(model, drawn), None, word_tokenizer(28)
    )
    huggingface.write_folder(checkpoint, tmp_path / "hf")
    return write(tmp_path / "hf", OLD)


def test_texts_become_what_sentence_transformers_makes_of_them(encoder: Path, tmp_path: Path) -> None:
    tokenizer = huggingface.open_folder(str(encoder)).checkpoint.tokenizer
    assert tokenizer.encode("W3 w4") == [0, 0, 7, 8]  # "query" and ":" are no words of this tokenizer
    write(encoder, OLD, sentence={"do_lower_case": False}, config_sentence={"default_prompt_name": "passage"})
    assert huggingface.open_folder(str(encoder)).checkpoint.tokenizer.encode("W3 w4") == [0, 8]


def test_an_export_keeps_every_file(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = {"chat_template.jinja": "{{ messages }}", "additional_chat_templates/rag.jinja": "{{ documents }}"}
    for name, text in more.items():
        (encoder / name).parent.mkdir(exist_ok=True)
        (encoder / name).write_text(text)
    (encoder / "1_Pooling" / "code.py").write_text("raise SystemExit")
    assert main(["convert", str(encoder), str(tmp_path / "out")]) == 0
    assert "note: config_sentence_transformers.json has prompts (query)" in capsys.readouterr().out.replace("\n", " ")
    checkpoints.save(tmp_path / "copy", checkpoints.load(tmp_path / "out"))
    assert main(["export", str(tmp_path / "copy"), str(tmp_path / "back")]) == 0
    names = {path.relative_to(encoder) for path in encoder.rglob("*") if path.is_file()}
    back = {path.relative_to(tmp_path / "back") for path in (tmp_path / "back").rglob("*") if path.is_file()}
    assert names - back == {Path("1_Pooling/code.py")} and back <= names
    for name in (*OLD, *more, "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (encoder / name).read_bytes(), name
    again = huggingface.open_folder(str(tmp_path / "back")).checkpoint.config
    assert again == checkpoints.read_meta(tmp_path / "out").config
    # An export over it, of a model without these files, leaves none of them behind.
    huggingface.write_folder(
        checkpoints.Checkpoint(
            "bert", BERT, None, None, None, {}, "float32", (), checkpoints.load(tmp_path / "out").model
        ),
        tmp_path / "back",
    )
    assert read_sentences(tmp_path / "back") == Sentences()


@pytest.mark.parametrize(
    ("by", "expected"),
    [("cosine", 11 / np.sqrt(5 * 25)), ("dot", 11), ("euclidean", -np.sqrt(8)), ("manhattan", -4)],
)
def test_embeddings_are_compared_as_the_model_is_made_for(by: Any, expected: float) -> None:
    rows = np.asarray([[1.0, 2.0], [3.0, 4.0]])
    (row,) = similarity_rows(rows, ("a", "b"), by)
    assert row[by] == pytest.approx(expected)
    scale = np.asarray([[1.0], [5.0]])
    assert correlations(rows, scale * rows, np.asarray([1.0, 2.0]), by if by != "cosine" else "dot")["Pearson"]


# The modules of a folder

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]


def write_modules(folder: Path, modules: Any, **pooling: Any) -> None:
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


@pytest.mark.parametrize(
    ("changes", "pooling", "expected"),
    [
        ({}, {"pooling_mode_max_tokens": True}, "has pooling_mode_max_tokens; supported is one of"),
        ({}, {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "supported is one of"),
        ({}, {"pooling_mode_mean_tokens": False}, "has no pooling_mode"),
        ({1: {"path": "../1_Pooling"}}, {}, "must be the name of a folder"),
        ({1: {"path": "/etc"}}, {}, "must be the name of a folder"),
        ({1: {"path": None}}, {}, "must be the name of a folder"),
        ({1: {"path": "2_Pooling"}}, {}, "2_Pooling: has no config.json"),
        ({0: {"path": "0_Transformer"}}, {}, "must be the folder itself"),
        ({1: {"type": "sentence_transformers.models.Dense"}}, {}, "modules Transformer, Dense; supported"),
        ({1: {"type": "custom.Pooling"}}, {}, "modules Transformer, custom.Pooling; supported"),
        ({1: {"type": 3}}, {}, "must be an object with a type"),
    ],
)
def test_sentence_transformers_that_are_not_supported(
    changes: dict[int, dict], pooling: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    folders.write(tmp_path, "bert")
    write_modules(tmp_path, [m | changes.get(i, {}) for i, m in enumerate(MODULES)], **pooling)
    assert expected in folders.fault(tmp_path)


def test_a_list_of_modules_that_is_none(tmp_path: Path) -> None:
    folders.write(tmp_path, "bert")
    write_modules(tmp_path, {"0": MODULES[0]})
    assert "must be a JSON array" in folders.fault(tmp_path)
    write_modules(tmp_path, [*MODULES, MODULES[1]])
    assert "Transformer, Pooling, Pooling; supported" in folders.fault(tmp_path)


def test_how_sentences_are_pooled_is_exported(tmp_path: Path) -> None:
    folders.write(tmp_path, "bert, no pooler")
    assert [m["type"].split(".")[-1] for m in json.loads((tmp_path / "modules.json").read_text())][1:] == [
        "Pooling",
        "Normalize",
    ]
    config = huggingface.read(str(tmp_path)).config
    assert config.pooling == "last" and config.normalize and not config.pooler
    (tmp_path / "modules.json").unlink()
    assert huggingface.read(str(tmp_path)).config.pooling == "mean"
