"""Data as people have them: classes are matched right or not at all, nothing vanishes unsaid, no path hangs."""

import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from astra_jax.errors import AstraError
from astra_jax.inputs.images import ImageProcessor
from astra_jax.models.bert import BertConfig
from astra_jax.report import Report
from checkpoints import Checkpoint
from eval.datasets.account import Account, telling
from eval.datasets.labelled import DataArgs
from eval.datasets.labels import in_order, match
from eval.quality.trial import Trial, image_accuracy
from eval.quality.ways import OnMesh
from train import calibrate, finetune
from train.data import sequences
from train.loop import Training

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
MOODS = ("positive", "negative", "neutral")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def draw(path: Path, value: int = 0) -> None:
    """A picture of one grey, which says what class of the model it is of."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, value, value)).save(path, "PNG")


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf8")
    return path


def args(data: object, split: str = "train", **options) -> DataArgs:
    return DataArgs(data=str(data), split=split, **options)


def message(read) -> str:
    with pytest.raises(AstraError) as error:
        read()
    assert "\n" not in str(error.value)
    return str(error.value)


def model_with(classes: tuple[str, ...]) -> Checkpoint:
    """A checkpoint without a model, for those who read data for it."""
    config = SimpleNamespace(num_labels=len(classes), input_kind="images")
    processor = ImageProcessor(size=(8, 8)).to_hf()
    return Checkpoint("vit", config, None, classes, processor, {}, "float32", (), None)


def greys(images: np.ndarray) -> np.ndarray:
    return np.round((images[:, 0, 0, 0] * 0.5 + 0.5) * 255).astype(int)


class Knowing(OnMesh):
    """A model that knows the class of every picture."""

    def runs(self, model):
        yield "", lambda images: np.eye(256)[greys(np.asarray(images))]


def evaluated(data: DataArgs, classes: tuple[str, ...]) -> tuple[float, Account]:
    """What `astra eval` finds of that model, and what it says of the data."""
    told: list[Account] = []
    (found,) = image_accuracy(Trial(model_with(classes), Knowing("single", 1), data, print, told.append))
    return found["accuracy %"], told[0]


def finetuned(data: DataArgs, classes: tuple[str, ...], tmp_path: Path) -> tuple[bool, Account]:
    """Whether `astra finetune` trains for the classes that the pictures are of, and what it says of the data."""
    told: list[Account] = []
    options = {f.name: getattr(data, f.name) for f in dataclasses.fields(data)}
    training = Training(batch_size=16)
    of_finetune = finetune.Args(checkpoint=tmp_path, out=tmp_path, training=training, augment=False, **options)
    batch = next(finetune.training_batches(model_with(classes), of_finetune, told.append))
    return greys(batch["input"]).tolist() == batch["label"].tolist(), told[0]


# --- classes ------------------------------------------------------------------------------------------------------

PICTURES = {  # folders of classes, each with the class that its picture is of; the model's classes; --labels
    "numbers of which 10 comes after 9": ({str(c): c for c in range(12)}, [f"LABEL_{c}" for c in range(12)], ()),
    "small letters": ({name: c for c, name in enumerate(DIGITS)}, [name.upper() for name in DIGITS], ()),
    "another order": ({"Positive": 0, "NEGATIVE": 1, "neutral": 2}, MOODS, ()),
    "punctuation": ({"golden_retriever": 1, "great-dane": 0}, ("Great Dane", "golden retriever"), ()),
    "a class that is missing": ({"b": 1, "d": 3}, tuple("abcd"), ()),
    "numbers behind words": ({"class 2": 2, "class 0": 0}, ("LABEL_0", "LABEL_1", "LABEL_2"), ()),
    "what the model calls them": ({"neg": 1, "neu": 2, "pos": 0}, MOODS, ("negative", "neutral", "positive")),
    "what the data call the model's": ({"neg": 1, "neu": 2, "pos": 0}, MOODS, ("pos", "neg", "neu")),
    "numbers of the model's": ({"neg": 1, "neu": 2, "pos": 0}, MOODS, ("1", "2", "0")),
    "no names of the model's": ({"cat": 1, "dog": 0}, ("LABEL_0", "LABEL_1"), ("LABEL_1", "LABEL_0")),
}


@pytest.mark.parametrize("case", PICTURES)
@pytest.mark.parametrize("split", ["train", "train[1:]"])
def test_classes_of_folders(tmp_path, case, split):
    """Every picture counts as what it is, in evaluation and training, whatever the alphabet says, and in a slice."""
    folders, classes, said = PICTURES[case]
    for name, value in folders.items():
        draw(tmp_path / "set" / name / "1.png", value)
    data = args(tmp_path / "set", split, labels=said)
    accuracy, account = evaluated(data, tuple(classes))
    right, same = finetuned(data, tuple(classes), tmp_path)
    assert accuracy == 100 and right and account == same
    count = len(folders) - (split != "train")
    assert f"read {count} of {len(folders)} pictures in {count} of {len(folders)} classes" in str(account)


@pytest.mark.parametrize("folders", [("neg", "neu", "pos"), ("a", "b"), tuple("abcd"), ("1", "2", "3")])
def test_classes_that_nobody_can_match(tmp_path, folders):
    for name in folders:
        draw(tmp_path / "set" / name / "1.png")
    data = args(tmp_path / "set")
    said = message(lambda: evaluated(data, MOODS))
    assert f"data's are {', '.join(folders)}; the model's are positive, negative, neutral: say with --labels" in said
    assert said == message(lambda: finetuned(data, MOODS, tmp_path))
    wrong = dataclasses.replace(data, labels=("positive", "bad"))
    assert "--labels positive, bad: give one of the model's" in message(lambda: evaluated(wrong, MOODS))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_classes_of_tables(tmp_path, suffix):
    """The label of every row; `--labels` counts the classes of all splits, of which a slice has some."""
    for split, labels in {"train": ["pos", "neg", "neu"], "test": ["pos", "neu"]}.items():
        rows = [{"text": f"w{i}", "label": label} for i, label in enumerate(labels)]
        path = tmp_path / "set" / f"{split}{suffix}"
        mark = "\t" if suffix == ".tsv" else ","
        if suffix == ".parquet":
            path.parent.mkdir(exist_ok=True)
            datasets.Dataset.from_list(rows).to_parquet(path)
        elif suffix == ".jsonl":
            write(path, "".join(json.dumps(row) + "\n" for row in rows))
        else:
            write(path, "\n".join(mark.join(row) for row in [["text", "label"], *(list(r.values()) for r in rows)]))
    data = args(tmp_path / "set", "test[1:]", labels=("negative", "neutral", "positive"))
    texts = data.open_labelled(MOODS)
    assert [texts[0]["text"], texts.names[texts[0]["label"]]] == ["w1", "neutral"]
    assert "read 1 of 2 texts in 1 of 3 classes" in str(texts.account) and "neg = negative" in str(texts.account)
    assert "data's are neg, neu, pos;" in message(lambda: args(tmp_path / "set", "test[1:]").open_labelled(MOODS))


@pytest.mark.parametrize(
    "labels, classes, expected",
    [
        ("0 2 1", "x y z", [0, 2, 1]),  # numbers of the model's own
        ("1.0 0.0", "x y", [1, 0]),  # as tables with gaps have them
        ("5 1", "1-star 2-star 3-star 4-star 5-star", [4, 0]),
        ("True False", "false true", [1, 0]),
        ("1 5", "1 2 3 4 5", [0, 4]),
    ],
)
def test_labels_that_are_numbers(tmp_path, labels, classes, expected):
    table = write(tmp_path / "train.csv", "text,label\n" + "".join(f"w,{label}\n" for label in labels.split()))
    assert args(table).open_labelled(classes.split()).labels.tolist() == expected


@pytest.mark.parametrize("labels", ["-1 0", "-1 -1"])
def test_rows_without_a_label(tmp_path, labels):
    table = write(tmp_path / "train.csv", "text,label\n" + "".join(f"w,{label}\n" for label in labels.split()))
    assert "row 0: the label -1 is outside" in message(lambda: args(table).open_labelled(("x", "y")))
    empty = write(tmp_path / "empty.csv", "text,label\nw,x\nw,\n")
    assert "row 1: has no label" in message(lambda: args(empty).open_labelled(("x", "y")))


def test_names_of_classes():
    assert in_order(["LABEL_10", "LABEL_9", "b", "a", "10", "9"]) == ["9", "10", "a", "b", "LABEL_9", "LABEL_10"]
    found, how = match(["cafe\u0301"], ["x", "caf\u00e9"], "set")  # an accent is one sign or two
    assert found.tolist() == [1] and how.startswith("by name")
    for names, classes in [
        (["Cat", "cat"], ["cat", "dog"]),  # of two spellings nobody knows whether they are one class
        (["a"], ["a", "a"]),
        (["-1", "1"], ["LABEL_0", "LABEL_1"]),
        (["0.5", "1.5"], ["LABEL_0", "LABEL_5"]),
        (["x1", "y1"], ["LABEL_0", "LABEL_1"]),
    ]:
        with pytest.raises(AstraError, match="do not match by name or by number"):
            match(names, classes, "set")


# --- folders of pictures ------------------------------------------------------------------------------------------


def test_training_and_testing_are_splits(tmp_path):
    for split, value in {"Training": 0, "Testing": 1}.items():
        for name in ("glioma", "none"):
            draw(tmp_path / "set" / split / name / "1.JPG", value)
    for split, value in {"train": 0, "test": 1}.items():
        images = args(tmp_path / "set", split).open()
        assert [np.asarray(images[i]["image"])[0, 0, 0] for i in range(len(images))] == [value, value]
    assert "no split 'validation'; it has" in message(args(tmp_path / "set", "validation").open)


@pytest.mark.parametrize(
    "files, problem",
    [
        (["left/a/1.png", "left/b/1.png", "right/a/1.png"], "folders left, right .* call them train and test"),
        (
            ["train/1.png", "test/1.png"],
            "folders test, train are splits by their names, and have no folders of classes",
        ),
        (["train/a/b/1.png", "train/a/c/1.png"], "pictures of 0 classes, and 2 pictures in other places"),
        (["1.png", "2.heic"], r"pictures of 0 classes, and 1 \.heic file\(s\), 1 pictures in other places"),
        (["a/1.png"], "pictures of 1 classes"),
    ],
)
def test_folders_that_are_no_classes(tmp_path, files, problem):
    for file in files:
        draw(tmp_path / "set" / file)
    with pytest.raises(AstraError, match=problem):
        args(tmp_path / "set").open()


def test_what_a_folder_has_beside_pictures_is_said(tmp_path):
    for file in ["a/1.png", "a/2.PNG", "b/1.jpg", "b/2.heic", "b/3.HEIC", "b/deep/4.png", "Thumbs.db", ".hidden.png"]:
        draw(tmp_path / "set" / file)
    account = args(tmp_path / "set").open().account
    assert (account.read, account.of, account.classes, account.of_classes) == (3, 3, 2, 2)
    assert account.left_out == {".db file(s)": 1, ".heic file(s)": 2, "pictures in other places": 1}
    assert "left out: 1 .db file(s), 2 .heic file(s), 1 pictures in other places" in str(account)


def test_names_of_other_bytes(tmp_path):
    """Not all names are UTF-8; pictures, tables and texts are read, and what is said of them can be printed."""
    folder = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"caf\xe9"))
    for name in (os.fsdecode(b"\xff"), "tea"):
        draw(Path(folder, name, os.fsdecode(b"\xfe.png")))
    images = args(folder).open()
    assert images.names == ("\\xff", "tea") and np.asarray(images[0]["image"]).shape == (8, 8, 3)
    str(images.account).encode()
    for suffix, text in {".csv": "text\nhello\n", ".TXT": "hello", ".jsonl": '{"text": "hello"}\n'}.items():
        path = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"\xfd")) + suffix
        Path(path).write_text(text)
        assert args(path).open_documents() == ["hello"]
        args(path).where.encode()


# --- paths that data name -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/dev/zero", "pipe.png", "../out.png", "{}/out.png", "https://a/b.png", "no.png", ".."]
)
def test_paths_that_are_not_opened(tmp_path, path):
    """A device has no end, a pipe hangs, and what lies elsewhere is not the data's."""
    folder = tmp_path / "set"
    draw(folder / "in.png")
    draw(tmp_path / "out.png")
    os.mkfifo(folder / "pipe.png")
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    paths = ["in.png", str(folder / "in.png"), path.format(tmp_path)]
    rows = {"image": [{"bytes": None, "path": path} for path in paths], "label": [0, 1, 0]}
    table = datasets.Dataset.from_dict(rows, features=features).data.table
    pyarrow.parquet.write_table(table, folder / "train.parquet")
    images = args(folder / "train.parquet").open()
    assert images[0]["image"].size == images[1]["image"].size == (8, 8)
    assert "is no regular file below" in message(lambda: images[2])


def test_pipes_in_folders(tmp_path):
    for name in ("a", "b"):
        draw(tmp_path / "pictures" / name / "1.png")
    os.mkfifo(tmp_path / "pictures" / "a" / "0.png")
    assert "0.png): is no regular file" in message(lambda: args(tmp_path / "pictures").open()[0])
    write(tmp_path / "texts" / "train.csv", "text\nw\n")
    os.mkfifo(tmp_path / "texts" / "test.csv")
    assert "test.csv: is no regular file" in message(args(tmp_path / "texts").open_documents)
    assert "test.csv: is no regular file" in message(args(tmp_path / "texts" / "test.csv").open_documents)


@pytest.mark.parametrize("path", ["../out.csv", "/dev/zero"])
def test_a_card_lists_files_of_its_folder(tmp_path, path):
    write(tmp_path / "out.csv", "text\nw\n")
    card = "---\nconfigs:\n- config_name: own\n  data_files:\n  - split: train\n    path: {}\n---\n"
    write(tmp_path / "set" / "README.md", card.format(path))
    said = message(args(tmp_path / "set").open_documents)
    assert "which is no file in the folder" in said or "cannot be read" in said
    write(tmp_path / "set" / "in.csv", "text\nnull\n")
    write(tmp_path / "set" / "README.md", card.format("in.csv"))
    assert args(tmp_path / "set").open_documents() == ["null"]


# --- tables -------------------------------------------------------------------------------------------------------


def test_values_that_other_readers_take_for_none(tmp_path):
    words = ["null", "NA", "nan", "None", "", "007", "1e5"]
    table = write(tmp_path / "train.csv", "text,other\n" + "".join(f"{word},x\n" for word in words))
    documents = args(table, text_column=("text",)).open_documents()
    assert documents == ["null", "NA", "nan", "None", "007", "1e5"]
    assert documents.account.left_out == {"rows without text": 1} and documents.account.of == 7


def test_quotes_that_do_not_match(tmp_path):
    rows = ['"Hello\tpos', "fine\tneg", 'Bye" she said\tpos', '5" disk\tneg']
    texts = args(write(tmp_path / "train.tsv", "\n".join(["text\tlabel", *rows]))).open_labelled()
    assert [texts[i]["text"] for i in range(len(texts))] == ['"Hello', "fine", 'Bye" she said', '5" disk']
    assert "quotes are text there" in str(texts.account)
    # so that a quote at the end of a value, too, would have joined two lines
    joined = args(write(tmp_path / "joined.csv", 'text,label\n"Hello,pos\nBye",neg\n')).open_labelled()
    assert [joined[i]["text"] for i in range(len(joined))] == ['"Hello', 'Bye"']


def test_quotes_that_match(tmp_path):
    rows = 'text,label\n"one\ntwo, ""three""",pos\nfour,neg\n'
    texts = args(write(tmp_path / "train.csv", rows)).open_labelled()
    assert [texts[i]["text"] for i in range(2)] == ['one\ntwo, "three"', "four"]
    assert "parts of values in quotes" in str(texts.account)
    assert args(write(tmp_path / "one.csv", 'text\n"a\nb"\n"c"\n')).open_documents() == ["a\nb", "c"]


@pytest.mark.parametrize(
    "content, problem",
    [
        ("text,label\na,b,pos\n", "row 0 has 3 values and the header 2"),
        ('text,label\n"a,b,pos\nc,neg\n', "row 0 has 3 values"),
        ("text,label\na\n", "row 0 has 1 values"),
        ("text,text\na,b\n", "two columns are called 'text'"),
        ("", "is empty"),
    ],
)
def test_tables_that_are_none(tmp_path, content, problem):
    assert problem in message(args(write(tmp_path / "train.csv", content)).open_labelled)


@pytest.mark.parametrize("column", ["text", "sentence"])
def test_texts_that_are_numbers(tmp_path, column):
    """The column of labels never stands in for the text."""
    texts = args(write(tmp_path / "train.csv", f"{column},label\n12,pos\n007,neg\n")).open_labelled()
    assert [texts[i]["text"] for i in range(2)] == ["12", "007"]
    rows = write(tmp_path / "train.jsonl", f'{{"{column}": 12, "label": "pos"}}\n')
    assert "text" in message(args(rows).open_labelled)


def test_suffixes_in_capitals_and_files_beside(tmp_path):
    write(tmp_path / "set" / "Train.CSV", "text,label\na,pos\n")
    write(tmp_path / "set" / "Test.CSV", "text,label\nb,neg\n")
    write(tmp_path / "set" / "extra.csv", "text,label\nc,neg\n")
    write(tmp_path / "set" / "notes.txt", "no data")
    texts = args(tmp_path / "set", "test").open_labelled(("neg", "pos"))
    assert texts[0] == {"text": "b", "label": 0}
    assert texts.account.left_out == {".csv file(s)": 1, ".txt file(s)": 1}
    assert args(write(tmp_path / "TRAIN.TXT", "hello")).open_documents() == ["hello"]


# --- the hub ------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A folder whose folders the hub seems to have, as `own/NAME`."""
    builder, load = datasets.load_dataset_builder, datasets.load_dataset

    def there(source: str) -> str:
        return str(tmp_path / source) if source.startswith("own/") else source

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda source, **given: builder(there(source), **given))
    monkeypatch.setattr(datasets, "load_dataset", lambda source, **given: load(there(source), **given))
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path))  # where it downloads to
    return tmp_path / "own"


def test_data_of_the_hub(hub):
    """They are read by the same rules as local files."""
    for split, text in {"train": "null", "test": "NA"}.items():
        write(hub / "csv" / f"{split}.csv", f"text,label\n{text},{split[1]}\n")
        write(hub / "json" / f"{split}.jsonl", f'{{"text": "{text}", "label": "{split[1]}"}}\n')
        write(hub / "txt" / f"{split}.txt", f"{text}|two")
        for name in "ab":
            draw(hub / "pictures" / split / name / "1.png", 9)
        columns = {"text": [text, "y"], "label": [0, 1]}
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
        )
        (hub / "parquet").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(columns, features).to_parquet(hub / "parquet" / f"{split}-00000-of-00001.parquet")
    for kind in ("csv", "json"):
        texts = args(f"own/{kind}", "test").open_labelled()
        assert texts[0]["text"] == "NA" and texts.names == ("e", "r") and texts[0]["label"] == 0
    texts = args("own/parquet", "test[:1]").open_labelled(("LABEL_0", "LABEL_1"))
    assert texts[0] == {"text": "NA", "label": 0} and "read 1 of 2 texts" in str(texts.account)
    assert args("own/txt", "test", separator="|").open_documents() == ["NA", "two"]
    images = args("own/pictures", "test").open(("b", "a"))
    assert [images[i]["label"] for i in range(2)] == [1, 0] and images[0]["image"].getpixel((0, 0)) == (9, 9, 9)


# --- what is said -------------------------------------------------------------------------------------------------


def test_calibrate_takes_both_sentences_of_a_pair(tmp_path, word_tokenizer):
    encoder = BertConfig(task="embedding", max_position_embeddings=8, vocab_size=13)
    table = write(tmp_path / "train.csv", "sentence1,sentence2,score\nw1,w2 w3 w4,1\nw5,w6,2\n")
    model = Checkpoint("bert", encoder, None, None, None, {}, "float32", (), None, None, word_tokenizer(9))
    told: list[Account] = []
    text, labels = sequences(model, args(table), 2, told.append)
    assert text.lengths.tolist() == [1, 1, 2, 1] and labels is None
    assert "4 of 4 documents" in str(told[0]) and "columns) sentence1, sentence2" in str(told[0]).replace("(s", "s")
    assert "1 of 4 texts were cut to 2 tokens" in str(told[0])
    assert args(table, text_column=("sentence1",)).open_documents(pairs=True) == ["w1", "w5"]


def test_calibrate_says_how_many_pictures_of_how_many_classes(tmp_path):
    for name in "abcd":
        draw(tmp_path / "set" / name / "1.png")
    told: list[Account] = []
    of_calibrate = calibrate.Args(checkpoint=tmp_path, out=tmp_path, data=str(tmp_path / "set"), samples=3)
    calibrate.inputs(model_with(("x", "y")), of_calibrate, told.append)  # whose classes they are is all the same
    assert "read 3 of 4 pictures in 3 of 4 classes" in str(told[0])
    with pytest.raises(AstraError, match="--labels x: give one"):
        calibrate.inputs(model_with(("x", "y")), dataclasses.replace(of_calibrate, labels=("x",)), told.append)


def test_an_account_is_said_once_and_kept_for_machines(tmp_path, capsys):
    report = Report("eval", tmp_path / "out.json")
    tell, account = telling(report), Account(where="set", what="pictures", read=3, of=9, left_out={"x": 1})
    for given in (account, account, account.first(2)):
        tell(given)
    report.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["set read 3 of 9 pictures; left out: 1 x", "set read 2 of 9 pictures; left out: 1 x"]
    kept = json.loads((tmp_path / "out.json").read_text())["data"]
    assert [row["read"] for row in kept] == [3, 2] and kept[0]["left_out"] == {"x": 1}


def test_tokens_that_fill_no_sequence_are_counted(tmp_path, word_tokenizer):
    config = SimpleNamespace(task="causal-lm", max_position_embeddings=8, vocab_size=13)
    model = Checkpoint("gpt2", config, None, None, None, {}, "float32", (), None, None, word_tokenizer(9))
    told: list[Account] = []
    text, _ = sequences(model, args(write(tmp_path / "train.txt", "w1 w2 w3 w4 w5")), 2, told.append)
    assert text.ids.shape == (2, 2) and "2 sequences of 2 of their 5 tokens" in str(told[0])
