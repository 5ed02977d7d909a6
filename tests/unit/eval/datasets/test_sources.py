"""Text data sets: documents, labelled texts and pairs of sentences, from every kind of file; clear errors."""

import json
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from astra_jax.errors import AstraError
from eval.datasets.labelled import DataArgs
from eval.datasets.sources import read


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write_table(path: Path, **columns: list) -> Path:
    """The same rows as .csv, .tsv, .jsonl or .parquet, by the name of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = datasets.Dataset.from_dict(columns)
    if path.suffix == ".parquet":
        rows.to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        rows.to_csv(path, sep="\t" if path.suffix == ".tsv" else ",", index=False)
    return path


def write_texts(folder: Path, **texts: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf8")
    return folder


def args(data: object, split: str = "train", **options) -> DataArgs:
    return DataArgs(data=str(data), split=split, **options)


def message(read) -> str:
    with pytest.raises(AstraError) as error:
        read()
    assert "\n" not in str(error.value)
    return str(error.value)


TABLES = [".csv", ".tsv", ".jsonl", ".parquet"]


# --- documents ----------------------------------------------------------------------------------------------------


def test_a_text_file_is_one_document_or_several(tmp_path):
    (tmp_path / "a [1].txt").write_text("\ufeff one\ntwo \n<|end|>\n\n<|end|> three <|end|>\n", encoding="utf8")
    assert args(tmp_path / "a [1].txt").open_documents() == ["one\ntwo \n<|end|>\n\n<|end|> three <|end|>"]
    assert args(tmp_path / "a [1].txt", separator="<|end|>").open_documents() == ["one\ntwo", "three"]
    assert args(tmp_path / "a [1].txt", separator="\n").open_documents()[0] == "one"


def test_slices_of_a_text_file_count_documents(tmp_path):
    folder = write_texts(tmp_path / "set", train="a|b||c", test="d| |e|f|g")

    def read(split: str) -> list[str]:
        return args(folder, split, separator="|").open_documents()

    assert read("test[1:3]") == ["e", "f"] and read("test[-1:]") == ["g"]
    assert read("test[50%:]") == ["f", "g"]
    assert read("train[:2]+test[:1]") == ["a", "b", "d"]
    assert read("test[:100]") == ["d", "e", "f", "g"]
    assert "holds no text" in message(lambda: read("test[4:]"))


def test_a_folder_of_text_files_has_splits(tmp_path, capfd):
    folder = write_texts(tmp_path / "set", train="first", valid="second", test="third")
    (folder / "README.md").write_text("# no data")
    assert [args(folder, split).open_documents() for split in ("train", "test")] == [["first"], ["third"]]
    assert all(args(folder, word).open_documents() == ["second"] for word in ("validation", "valid", "val", "dev"))
    assert "has no split 'other'; it has train, validation, test" in message(args(folder, "other").open_documents)
    assert capfd.readouterr().err == ""
    plain = write_texts(tmp_path / "plain", one="1", two="2")
    assert sorted(args(plain).open_documents()) == ["1", "2"]


@given(st.lists(st.text("ab \n", max_size=5), min_size=1, max_size=6))
def test_documents_are_stripped_and_never_empty(tmp_path_factory, parts):
    path = tmp_path_factory.mktemp("drawn") / "train.txt"
    path.write_text("|".join(parts), encoding="utf8", newline="")
    expected = [part.strip() for part in parts if part.strip()]
    if expected:
        assert args(path, separator="|").open_documents() == expected
    else:
        assert "holds no text" in message(args(path, separator="|").open_documents)


@pytest.mark.parametrize("suffix", TABLES)
def test_a_row_of_a_table_is_a_document(tmp_path, suffix):
    path = write_table(
        tmp_path / f"test{suffix}", text=["one, and two", " x ", "", None, "last"], number=[1, 2, 3, 4, 5]
    )
    assert args(path, "test").open_documents() == ["one, and two", "x", "last"]
    assert args(path, "test[1:]").open_documents() == ["x", "last"]
    assert args(path, "test", text_column=("text",)).open_documents() == ["one, and two", "x", "last"]


@pytest.mark.parametrize("suffix", TABLES)
def test_a_folder_of_tables_has_splits(tmp_path, suffix):
    for split in ("train", "dev"):
        write_table(tmp_path / "set" / f"{split}{suffix}", text=[split])
    assert args(tmp_path / "set", "validation").open_documents() == ["dev"]
    assert args(tmp_path / "set", "train").open_documents() == ["train"]


def test_a_choice_of_text_columns(tmp_path):
    path = write_table(tmp_path / "train.jsonl", title=["t"], body=["b"], number=[1])
    assert "several text columns, title, body: choose with --text-column" in message(args(path).open_documents)
    assert args(path, text_column=("body",)).open_documents() == ["b"]
    assert "number" in message(args(path, text_column=("number",)).open_documents)
    assert "no such column; it has title, body, number" in message(args(path, text_column=("x",)).open_documents)
    assert "only similarity" in message(args(path, text_column=("title", "body")).open_documents)
    named = write_table(tmp_path / "named.jsonl", title=["t"], text=["the text"])
    assert args(named).open_documents() == ["the text"]  # the usual name
    assert "no text column among number" in message(
        args(write_table(tmp_path / "numbers.csv", number=[1])).open_documents
    )


# --- labelled texts and pairs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", TABLES)
def test_labelled_texts(tmp_path, suffix):
    path = write_table(tmp_path / f"train{suffix}", text=["good", "bad", "fine"], label=["pos", "neg", "pos"])
    data = args(path).open_labelled(("pos", "neg"))
    assert len(data) == 3 and data.names == ("pos", "neg")
    assert [data[i] for i in range(3)] == [
        {"text": "good", "label": 0},
        {"text": "bad", "label": 1},
        {"text": "fine", "label": 0},
    ]
    assert args(path).open_labelled().names == ("neg", "pos")
    assert "do not match" in message(lambda: args(path).open_labelled(("up", "down", "pos")))


def test_labelled_pairs(tmp_path):
    columns = {"idx": [0, 1, 2], "Premise": ["a", "b", " "], "hypothesis": ["c", "d", "e"], "label": [0, 1, 0]}
    path = write_table(tmp_path / "train.jsonl", **columns)
    data = args(path).open_labelled(("x", "y"))
    assert [data[i] for i in range(2)] == [{"text": ("a", "c"), "label": 0}, {"text": ("b", "d"), "label": 1}]
    assert "pairs of the columns Premise and hypothesis" in str(data.account)
    assert "row 2: has no text" in message(lambda: data[2])
    assert args(path, text_column=("hypothesis",)).open_labelled()[0]["text"] == "c"
    assert args(path, text_column=("hypothesis", "Premise")).open_labelled()[0]["text"] == ("c", "a")
    assert "give one or two" in message(args(path, text_column=("idx", "Premise", "hypothesis")).open_labelled)
    assert args(path).open_texts() == [("a", "c"), ("b", "d")]  # what has no text is left out
    assert "read 2 of 3 documents; left out: 1 rows without text" in str(args(path).open_texts().account)
    named = write_table(tmp_path / "named.jsonl", text=["the text"], question1=["a"], question2=["b"], label=[0])
    assert args(named).open_labelled()[0]["text"] == args(named).open_texts()[0] == "the text"


def test_labels_of_other_columns(tmp_path):
    columns = {"sentence": ["a", "b", " "], "star": [0, 2, 1]}
    path = write_table(tmp_path / "train.csv", **columns)
    assert "no label column among sentence, star" in message(args(path).open_labelled)
    data = args(path, label_column="star").open_labelled(("x", "y", "z"))
    assert [data[i]["label"] for i in range(2)] == [0, 2]
    assert "row 2: has no text" in message(lambda: data[2])
    assert "3 classes and the model 2" in message(lambda: args(path, label_column="star").open_labelled(("x", "y")))
    text = write_texts(tmp_path / "texts", train="just text")
    assert "no label column among text" in message(args(text).open_labelled)


@pytest.mark.parametrize("suffix", TABLES)
def test_pairs(tmp_path, suffix):
    columns = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "score": [4.5, 0], "other": [1, 2]}
    path = write_table(tmp_path / f"test{suffix}", **columns)
    assert args(path, "test").open_pairs() == [("a", "c", 4.5), ("b", "d", 0.0)]
    assert args(path, "test[1:]").open_pairs() == [("b", "d", 0.0)]
    swapped = args(path, "test", text_column=("sentence2", "sentence1"), label_column="other")
    assert swapped.open_pairs() == [("c", "a", 1.0), ("d", "b", 2.0)]


def test_bad_pairs(tmp_path):
    columns = {"sentence1": ["a", "b", "c"], "sentence2": ["c", "", "d"], "score": ["1.5", "2", "much"]}
    path = write_table(tmp_path / "train.jsonl", **columns)
    assert args(path, "train[:1]").open_pairs() == [("a", "c", 1.5)]
    assert "row 1: has no text" in message(args(path).open_pairs)
    assert "row 0: the score 'much' is no number" in message(args(path, "train[2:]").open_pairs)
    assert "two columns" in message(args(path, text_column=("sentence1",)).open_pairs)
    assert "--label-column stars: " in message(args(path, label_column="stars").open_pairs)
    other = write_table(tmp_path / "other.jsonl", a=["x"], b=["y"], score=[1.0])
    assert "--text-column sentence1: " in message(args(other).open_pairs)
    missing = write_table(tmp_path / "missing.jsonl", sentence1=["x", "z"], sentence2=["y", "w"], score=[1.0, None])
    assert "row 1: the score None is no number" in message(args(missing).open_pairs)
    assert "int64" in message(
        args(write_table(tmp_path / "n.jsonl", sentence1=[1], sentence2=["y"], score=[1.0])).open_pairs
    )


# --- what cannot be read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".tsv", ".jsonl"])
def test_text_of_another_encoding_is_one_line(tmp_path, suffix, capfd):
    path = tmp_path / f"train{suffix}"
    path.write_bytes(b'{"text": "caf\xe9"}\ntext\n')
    said = message(args(path).open_documents)
    assert str(path) in said and "cannot be read" in said and capfd.readouterr().err == ""
    assert suffix == ".jsonl" or "save the file as UTF-8" in said


def test_broken_tables_are_one_line(tmp_path, capfd):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"text": \n')
    assert "train.jsonl" in message(args(tmp_path / "train.jsonl").open_documents)
    (tmp_path / "bad.parquet").write_text("hello")
    assert "bad.parquet" in message(args(tmp_path / "bad.parquet").open_documents)
    assert capfd.readouterr().err == ""


def test_sources_that_hold_no_text(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "the folder has no .parquet or .csv" in message(args(tmp_path / "empty").open_documents)
    assert "no such file" in message(args("missing.txt").open_documents)
    (tmp_path / "train.txt").write_text(" \n")
    assert "holds no text" in message(args(tmp_path / "train.txt").open_documents)
    (tmp_path / "page.html").write_text("x")
    assert "not a .parquet or .csv or .tsv or .jsonl or .txt file" in message(
        args(tmp_path / "page.html").open_documents
    )
    (tmp_path / "header.csv").write_text("text,label\n")
    assert "header.csv" in message(args(tmp_path / "header.csv").open_labelled)


def test_separators_that_do_not_fit(tmp_path):
    (tmp_path / "train.txt").write_text("a")
    assert "--separator is empty" in message(args(tmp_path / "train.txt", separator="").open_documents)
    table = write_table(tmp_path / "train.csv", text=["a"])
    assert "--separator: " in message(args(table, separator="|").open_documents)


@pytest.mark.parametrize(
    "deep", [20_000 * "[" + 20_000 * "]", 600 * "[\n" + 600 * "]\n", 600 * '{"a": [' + "1" + 600 * "]}"]
)
def test_jsonl_that_is_nested_too_deeply(tmp_path, deep):
    """pyarrow takes all of the stack for it, so that Python ends with a segmentation fault."""
    path = tmp_path / "deep.jsonl"
    path.write_text(f'{{"text": "[[[ {{{{ \\"[", "label": 1}}\n{{"text": "b", "label": {deep}}}\n')
    with pytest.raises(AstraError, match=r"deep.jsonl: line \d+ is nested more than 500 levels deep"):
        read(str(path), "train")
    path.write_text('{"text": "%s", "label": 1}\n' % (2_000 * "[{"))
    assert read(str(path), "train").table["text"] == [2_000 * "[{"]


def test_text_of_a_parquet_file_that_is_no_utf8(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "train.parquet"
    texts = pa.StringArray.from_buffers(2, *pa.array([b"good", b"\xe2ad"]).buffers()[1:])
    pq.write_table(pa.table({"text": texts, "label": [0, 1]}), path)
    with pytest.raises(AstraError, match="train.parquet, split train: cannot be read .*UTF"):
        read(str(path), "train")
