"""Image data sets: what is found, how labels are matched, exact resume of training, and errors a user can act on."""

import json
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from astra_jax.errors import AstraError
from astra_jax.inputs.images import ImageProcessor
from eval.datasets.labelled import batches, load_images
from eval.datasets.labels import match
from train import data as train_data
from train.data import Augment, Decoded, DigitsData, decode, train_batches, write_digits

PROCESSOR = ImageProcessor(size=(8, 8))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def picture(value: int) -> Image.Image:
    """One colour, so that a picture can be told from its pixels."""
    return Image.new("RGB", (8, 8), (value, 255 - value, 7))


def write_folder(folder: Path, files: dict[str, int]) -> Path:
    for name, value in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(value).save(folder / name)
    return folder


def write_parquet(path: Path, count: int = 6, **columns) -> Path:
    """Images of value 0, 10, 20, ..., and one column per keyword: (feature, values)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    features = {"picture": datasets.Image()} | {name: feature for name, (feature, _) in columns.items()}
    rows = {"picture": [picture(10 * i) for i in range(count)]} | {
        name: values for name, (_, values) in columns.items()
    }
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(path)
    return path


def classes(*names: str, values=(0, 1, 2, 0, 1, 2)) -> tuple:
    return datasets.ClassLabel(names=list(names)), list(values)


def content(data) -> list[tuple[int, str]]:
    """(value of the picture, name of its class) of all rows."""
    return [
        (np.asarray(row["image"])[0, 0, 0], data.names[row["label"]]) for row in (data[i] for i in range(len(data)))
    ]


def message(*args, **options) -> str:
    with pytest.raises(AstraError) as error:
        load_images(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- sources ------------------------------------------------------------------------------------------------------


def test_folder_of_classes_is_one_split(tmp_path):
    # as class names, `train` and `test_tube` are no splits
    folder = write_folder(tmp_path / "a [1]", {"train/1.png": 1, "test_tube/2.png": 2, "cat/3.png": 3, "cat/4.png": 4})
    (folder / "cat" / "notes.txt").write_text("not a picture")
    data = load_images(str(folder), "train")
    assert data.names == ("cat", "test_tube", "train")
    assert sorted(content(data)) == [(1, "train"), (2, "test_tube"), (3, "cat"), (4, "cat")]
    assert "has no split 'test'; it has train" in message(str(folder), "test")


def test_folder_of_splits_shares_its_classes(tmp_path):
    files = {
        "train/cat/1.png": 1,
        "train/dog/2.png": 2,
        "train/train/3.png": 3,
        "val/dog/4.png": 4,
        "extra/dog/5.png": 5,
    }
    folder = str(write_folder(tmp_path / "pets", files))
    assert sorted(content(load_images(folder, "train"))) == [(1, "cat"), (2, "dog"), (3, "train")]
    validation = load_images(folder, "validation")  # holds one class, but knows them all
    assert validation.names == ("cat", "dog", "train") and content(validation) == [(4, "dog")]
    assert "has no split 'test'; it has train, validation" in message(folder, "test")
    assert len(load_images(folder, "train+validation")) == 4


def test_folder_without_classes(tmp_path):
    assert "FOLDER/CLASS/PICTURE" in message(str(write_folder(tmp_path / "flat", {"1.png": 1, "2.png": 2})), "train")
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in message(str(tmp_path / "empty"), "train")


def test_folder_with_metadata(tmp_path):
    folder = write_folder(tmp_path / "meta", {"train/1.png": 1, "train/2.png": 2, "test/3.png": 3})
    (folder / "train" / "metadata.csv").write_text("file_name,kind\n1.png,dog\n2.png,cat\n")
    (folder / "test" / "metadata.csv").write_text("file_name,kind\n3.png,dog\n")
    assert "--label-column" in message(str(folder), "train")
    assert sorted(content(load_images(str(folder), "train", label_column="kind"))) == [(1, "dog"), (2, "cat")]
    data = load_images(str(folder), "test", label_column="kind", classes=("cat", "dog"))
    assert content(data) == [(3, "dog")] and data[0]["label"] == 1


@pytest.mark.parametrize("card", [True, False])
def test_folder_of_parquet_files(tmp_path, card):
    folder = tmp_path / "set"
    write_parquet(folder / "train-00000-of-00001.parquet", label=classes("a", "b", "c"))
    write_parquet(folder / "test-00000-of-00001.parquet", 3, label=classes("a", "b", "c", values=(2, 1, 0)))
    if card:
        (folder / "README.md").write_text(
            "---\nconfigs:\n- config_name: own\n  data_files:\n  - split: train\n    path: train-*\n"
            "  - split: test\n    path: test-*\n---\n# set\n"
        )
    assert content(load_images(str(folder), "test")) == [(0, "c"), (10, "b"), (20, "a")]
    assert len(load_images(str(folder), "train[:4]")) == 4
    assert content(load_images(str(folder), "train[50%:]")) == [(30, "a"), (40, "b"), (50, "c")]
    assert "has no split 'validation'; it has train, test" in message(str(folder), "validation")


def test_parquet_file_is_the_split_of_its_name(tmp_path):
    path = write_parquet(tmp_path / "test-00000-of-00001.parquet", label=classes("a", "b", "c"))
    assert len(load_images(str(path), "test")) == 6
    assert "has no split 'train'; it has test" in message(str(path), "train")
    plain = write_parquet(tmp_path / "latest.parquet", label=classes("a", "b", "c"))
    for split in ("train", "test"):  # its name does not say, so it is what is asked for
        assert len(load_images(str(plain), split)) == 6
    assert len(load_images(str(plain), "validation[:2]")) == 2


def test_progress_bars_stay_as_they_were(tmp_path, capsys):
    path = str(write_parquet(tmp_path / "train.parquet", label=classes("a", "b", "c")))
    capsys.readouterr()
    load_images(path, "train")
    assert capsys.readouterr().err == "" and not datasets.are_progress_bars_disabled()


@pytest.mark.parametrize(
    "split",
    [
        "test[",
        "test[abc]",
        "",
        "test[:1000]]",
        "test[:200%]",
        "test[5:5]",
        "test[:1_0]",
        "test[:\uff12]",
        "test[:2](x)",
    ],
)
def test_bad_slices(tmp_path, split):
    path = str(write_parquet(tmp_path / "test.parquet", label=classes("a", "b", "c")))
    assert split in message(path, split)


@pytest.mark.parametrize(
    "source", ["./no/such/folder", "no/such/folder", "none.parquet", "~/none/at/all", "not a name"]
)
def test_missing_source(source):
    assert message(source, "test").startswith(f"{source}: ")


@pytest.mark.parametrize(
    "error",
    [
        datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed."),
        ConnectionError("Couldn't reach 'a/b' on the Hub (LocalEntryNotFoundError)"),
        RuntimeError("Dataset scripts are no longer supported, but found b.py"),
        ValueError("Config name is missing.\nPlease pick one among the available configs: ['x', 'y']"),
        TimeoutError(),
    ],
)
def test_hub_failures_are_one_line(monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    said = message("a/b", "test")
    assert said.startswith("a/b, split test: cannot be read (") and "network" in said
    assert (str(error) or "TimeoutError").splitlines()[0].rstrip(".") in said


def test_not_a_parquet_file(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    assert "not a .parquet file" in message(str(tmp_path / "notes.txt"), "train")
    (tmp_path / "bad.parquet").write_text("hello")
    assert "bad.parquet, split train: cannot be read" in message(str(tmp_path / "bad.parquet"), "train")


# --- columns and labels -------------------------------------------------------------------------------------------


def test_a_choice_of_label_columns_is_not_made_silently(tmp_path):
    path = str(write_parquet(tmp_path / "train.parquet", fine=classes("a", "b", "c"), coarse=classes("x", "y", "z")))
    said = message(path, "train")
    assert "fine, coarse" in said and "--label-column" in said
    assert load_images(path, "train", label_column="coarse").names == ("x", "y", "z")
    assert "has no such column; it has picture, fine, coarse" in message(path, "train", label_column="medium")
    assert "--image-column" in message(path, "train", image_column="fine", label_column="fine")


def test_columns_of_text_and_numbers_work_when_named(tmp_path):
    columns = {
        "text": (datasets.Value("string"), ["b", "a", "b", "c", "a", "a"]),
        "number": (datasets.Value("int64"), [0, 2, 1, 0, 2, 1]),
        "real": (datasets.Value("float32"), [0.0] * 6),
    }
    path = str(write_parquet(tmp_path / "train.parquet", **columns))
    assert "has no label column among picture, text, number, real" in message(path, "train")
    assert [name for _, name in content(load_images(path, "train", label_column="text"))] == list("babcaa")
    assert load_images(path, "train", label_column="number").names == ("0", "1", "2")
    assert load_images(path, "train", label_column="number", classes=("x", "y", "z")).names == ("x", "y", "z")
    assert "float32" in message(path, "train", label_column="real")
    assert "has 3 classes and the model 2" in message(path, "train", label_column="number", classes=("x", "y"))


@given(st.permutations(["ant", "bee", "cat", "dog"]), st.integers(2, 4))
def test_labels_are_matched_by_name(order, kept):
    """The name of every row stays the same, whatever the order of the checkpoint's classes."""
    names = ("ant", "bee", "cat", "dog")[:kept]
    indices, how = match(names, tuple(order), "set")
    assert how == "by name"
    assert [order[i] for i in indices] == list(names)


def test_labels_end_to_end(tmp_path):
    path = str(write_parquet(tmp_path / "train.parquet", label=classes("a", "b", "c")))
    before = content(load_images(path, "train"))
    data = load_images(path, "train", classes=("c", "a", "x", "b"))
    assert data.names == ("c", "a", "x", "b") and content(data) == before
    assert [data[i]["label"] for i in range(3)] == [1, 3, 0]


@pytest.mark.parametrize(
    "labels",
    [
        ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"),
        ("class 0", "class 1", "class 2"),
        ("0", "1", "2"),
    ],
)
def test_labels_that_keep_their_numbers(tmp_path, labels):
    path = str(write_parquet(tmp_path / "train.parquet", label=classes("a", "b", "c")))
    data = load_images(path, "train", classes=labels)
    assert [data[i]["label"] for i in range(6)] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    "labels, problem",
    [
        (("a", "b"), "has 3 classes and the model 2"),
        (("b", "a", "sea"), "the data's are a, b, c; the model's are b, a, sea"),
        (("w", "x", "y", "z"), "do not match"),
        (("a", "b", "d", "c", "c"), "do not match"),
        # as many, and even some of the same at the same places: that says nothing
        (("n01", "n02", "n03"), "do not match"),
        (("a", "b", "sea"), "do not match"),
    ],
)
def test_labels_that_do_not_match(tmp_path, labels, problem):
    path = str(write_parquet(tmp_path / "train.parquet", label=classes("a", "b", "c")))
    assert problem in message(path, "train", classes=labels)


def test_unlabelled_rows_are_named(tmp_path):
    hidden = write_parquet(tmp_path / "test.parquet", label=classes("a", "b", "c", values=(0, 1, 2, 0, -1, -1)))
    assert "row 4: the label -1 is outside the classes 0..2" in message(str(hidden), "test")
    missing = write_parquet(tmp_path / "train.parquet", label=classes("a", "b", "c", values=(0, 1, None, 0, 1, 2)))
    assert "row 2: has no label" in message(str(missing), "train")


def test_damaged_pictures_are_named(tmp_path):
    folder = write_folder(tmp_path / "set", {"cat/1.png": 1, "dog/2.png": 2, "dog/3.png": 3})
    (folder / "dog" / "2.png").write_bytes((folder / "dog" / "2.png").read_bytes()[:50])
    data = load_images(str(folder), "train")
    with pytest.raises(AstraError, match=r"row 1 \(.*2\.png\): a damaged image"):
        list(batches(data, PROCESSOR, 2))
    with pytest.raises(AstraError, match=r"row 1 \(.*2\.png\): a damaged image"):
        train_batches(data, PROCESSOR, 2, 0)


# --- batches in order ---------------------------------------------------------------------------------------------


def coloured(count: int) -> Decoded:
    pixels = np.stack([np.asarray(picture(i)) for i in range(count)])
    return Decoded(pixels, np.arange(count, dtype=np.int32), tuple(map(str, range(count))))


@given(count=st.integers(1, 12), size=st.integers(1, 15), limit=st.none() | st.integers(1, 15))
def test_batches_hold_every_row_once_and_in_order(count, size, limit):
    found = list(batches(coloured(count), PROCESSOR, size, limit=limit))
    total = min(count, limit or count)
    assert [len(labels) for _, labels in found] == [size] * (total // size) + [total % size] * (total % size > 0)
    labels = np.concatenate([labels for _, labels in found])
    assert labels.dtype == np.int32 and labels.tolist() == list(range(total))
    np.testing.assert_array_equal(np.concatenate([i for i, _ in found]), PROCESSOR([picture(i) for i in range(total)]))


@pytest.mark.parametrize("size, limit", [(0, None), (4, 0)])
def test_batches_of_nothing(size, limit):
    with pytest.raises(AstraError, match="must be at least 1"):
        batches(coloured(3), PROCESSOR, size, limit=limit)


# --- training -----------------------------------------------------------------------------------------------------


def take(iterator, count: int) -> list[dict]:
    return [next(iterator) for _ in range(count)]


def equal(a: list[dict], b: list[dict]) -> bool:
    return all(np.array_equal(x[key], y[key]) for x, y in zip(a, b, strict=True) for key in ("input", "label"))


def test_every_epoch_holds_every_image_once_in_its_own_order():
    rows = take(train_batches(coloured(20), PROCESSOR, 8, seed=3), 5)
    assert rows[0]["input"].shape == (8, 8, 8, 3) and rows[0]["input"].dtype == np.float32
    assert rows[0]["label"].dtype == np.int32
    order = np.concatenate([row["label"] for row in rows])
    assert sorted(order[:20]) == sorted(order[20:]) == list(range(20))
    assert order[:20].tolist() != order[20:].tolist() != list(range(20))
    for row in rows:
        np.testing.assert_array_equal(row["input"], PROCESSOR([picture(i) for i in row["label"]]))


def test_batch_larger_than_the_data():
    assert np.bincount(next(train_batches(coloured(3), PROCESSOR, 9, 0))["label"]).tolist() == [3, 3, 3]


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("steps", [0, 1, 7])
def test_resume_is_exact(monkeypatch, cached, steps):
    monkeypatch.setattr(train_data, "CACHE_BYTES", 2**30 if cached else 0)

    def start():
        return train_batches(coloured(20), PROCESSOR, 8, seed=5, augment=Augment())

    whole = start()
    take(whole, steps)
    state = json.dumps(whole.get_state())
    expected = take(whole, 4)

    resumed = start()
    resumed.set_state(json.loads(state))
    assert equal(take(resumed, 4), expected)

    late = start()  # also where other batches were read, and prefetched, before
    take(late, 3)
    late.set_state(json.loads(state))
    assert equal(take(late, 4), expected)


def test_seeds_differ_and_repeat():
    first, again, other = (take(train_batches(coloured(20), PROCESSOR, 8, s, Augment()), 2) for s in (1, 1, 2))
    assert equal(first, again) and not equal(first, other)


def test_cached_and_decoded_on_demand_are_the_same(tmp_path, monkeypatch):
    folder = str(write_folder(tmp_path / "set", {f"{'ab'[i % 2]}/{i}.png": 10 * i for i in range(10)}))
    data = load_images(folder, "train")
    cached = take(train_batches(data, PROCESSOR, 4, 0, Augment()), 4)
    monkeypatch.setattr(train_data, "CACHE_BYTES", 0)
    assert equal(take(train_batches(data, PROCESSOR, 4, 0, Augment()), 4), cached)


def test_decode_keeps_what_fits_already():
    data = coloured(70)
    assert decode(data, PROCESSOR) is data
    larger = decode(data, ImageProcessor(size=(6, 10)))
    assert larger.pixels.shape == (70, 6, 10, 3) and larger.labels.tolist() == list(range(70))
    # `crop_size` cuts even what has the final size
    cropped = decode(data, ImageProcessor(size=(10, 10), crop_size=(8, 8)))
    assert cropped.pixels.shape == data.pixels.shape and cropped is not data


@given(
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    c=st.sampled_from([1, 3]),
    crop=st.floats(0, 0.5),
    flip=st.booleans(),
    seed=st.integers(0, 99),
)
def test_augmentation_is_a_shift_of_the_padded_image(h, w, c, crop, flip, seed):
    images = np.random.default_rng(seed).integers(0, 256, (3, h, w, c), dtype=np.uint8)
    varied = Augment(flip=flip, crop=crop)(images, np.random.default_rng(seed))
    assert varied.dtype == np.uint8 and varied.shape == images.shape
    down, right = round(crop * h), round(crop * w)
    for image, result in zip(images, varied, strict=False):
        padded = np.pad(image, ((down, down), (right, right), (0, 0)), mode="edge")
        windows = [padded[y : y + h, x : x + w] for y in range(2 * down + 1) for x in range(2 * right + 1)]
        windows += [window[:, ::-1] for window in windows] if flip else []
        assert any(np.array_equal(result, window) for window in windows)


def test_augmentation_varies_images_and_epochs():
    column = np.arange(64, dtype=np.uint8)
    image = np.broadcast_to(column[:, None, None] + column[None, :, None] * 2, (64, 64, 3))
    data = Decoded(np.stack([image] * 8), np.zeros(8, np.int32), ("a",))
    batch, epoch = take(train_batches(data, ImageProcessor(size=(64, 64)), 8, 0, Augment()), 2)
    assert len(np.unique(batch["input"], axis=0)) > 4
    assert not np.array_equal(batch["input"], epoch["input"])
    left = batch["input"][:, 32, 0, 0] < batch["input"][:, 32, -1, 0]
    assert 0 < left.sum() < 8  # some are mirrored, some are not


@pytest.mark.parametrize(
    "count, size, seed, problem",
    [(3, 0, 0, "batch size is 0"), (3, 2, -1, "seed is -1"), (3, 2, 2**32, "seed is"), (0, 2, 0, "no images")],
)
def test_training_errors(count, size, seed, problem):
    data = Decoded(np.zeros((count, 8, 8, 3), np.uint8), np.zeros(count, np.int32), ("a",))
    with pytest.raises(AstraError, match=problem):
        train_batches(data, PROCESSOR, size, seed)


@pytest.mark.parametrize("crop", [-0.1, 0.6, float("nan")])
def test_augment_errors(crop):
    with pytest.raises(AstraError, match="crop is"):
        Augment(crop=crop)


# --- digits -------------------------------------------------------------------------------------------------------


def test_digits():
    train, test = DigitsData(True), DigitsData(False)
    assert (len(train), len(test)) == (1197, 600)
    assert sorted([*train.numbers, *test.numbers]) == list(range(1797))
    assert train.pixels.shape == (1197, 32, 32, 3) and train.pixels.dtype == np.uint8
    assert train.pixels.min() == 0 and train.pixels.max() == 255
    shares = np.bincount(train.labels) / 1197 - np.bincount(test.labels) / 600
    assert np.abs(shares).max() < 2e-3
    np.testing.assert_array_equal(DigitsData(True).pixels, train.pixels)


def test_digits_as_a_folder_of_pictures(tmp_path):
    write_digits(tmp_path / "digits")
    digits, data = DigitsData(False), load_images(str(tmp_path / "digits"), "test")
    assert data.names == digits.names and len(data) == 600
    rows = decode(data, ImageProcessor(size=(32, 32)))
    files = sorted((tmp_path / "digits" / "test").glob("*/*.png"))
    assert len(files) == 600 and all(re.fullmatch(r"\d{4}", file.stem) for file in files)
    order = np.argsort([int(Path(file).stem) for file in data._files])
    np.testing.assert_array_equal(rows.pixels[order], digits.pixels)
    np.testing.assert_array_equal(rows.labels[order], digits.labels)
    assert len(load_images(str(tmp_path / "digits"), "train")) == 1197


def test_digits_where_a_file_is_in_the_way(tmp_path):
    (tmp_path / "digits").write_text("")
    with pytest.raises(AstraError, match="cannot be written"):
        write_digits(tmp_path / "digits")
