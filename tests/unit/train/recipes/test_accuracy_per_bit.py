"""Quality per bit: which rows and columns there are, what each of them is, and that nothing is done twice."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import checkpoints
from astra_jax.errors import AstraError
from astra_jax.inputs.token_batches import Text
from astra_jax.strategies.base import Single
from eval import plots
from eval.verbs import evaluate
from train.recipes.accuracy_per_bit import Args, main

WORDS = 46  # with the tokenizer's four special ones the vocabulary of the tiny models
LENGTH = 32
MARKS = "<!-- {0}{1} of `python -m train.recipes.accuracy_per_bit` -->\n"


def save(path: Path, family: str, model, **known) -> Path:
    described = {"labels": None, "preprocessing": None, "hf_config": {}, "dtype": "float32", "history": (), **known}
    checkpoints.save(
        path, checkpoints.Checkpoint(family=family, config=model.config, astra=None, model=model, **described)
    )
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_llama, word_tokenizer) -> Path:
    """A Llama, text to train on, a test text of documents of exactly one window, and a page."""
    place = tmp_path_factory.mktemp("per-bit")
    rng = np.random.default_rng(0)
    save(place / "llama", "llama", tiny_llama(), tokenizer_files=word_tokenizer(WORDS))

    def write(name: str, documents: int) -> None:
        texts = (" ".join(f"w{i}" for i in rng.integers(0, WORDS, LENGTH)) for _ in range(documents))
        (place / name).write_text("\n===\n".join(texts))

    write("train.txt", 24)
    write("test.txt", 5)
    (place / "page.md").write_text("# Page\n" + MARKS.format("", "llama") + "old\n" + MARKS.format("end of ", "llama"))
    return place


@pytest.fixture(scope="module")
def args(place) -> Args:
    return Args(
        original=place / "llama",
        out=place / "out",
        data=str(place / "train.txt"),
        separator="===",
        test=(str(place / "test.txt"),),
        groups=(2, 1),
        codecs=("vq", "nested-pq"),
        codewords=16,
        steps=2,
        batch_size=4,
        length=LENGTH,
        plot=place / "plot.svg",
        markdown=place / "page.md",
        json=place / "report.json",
    )


pytestmark = pytest.mark.slow  # all of them are about one run of the recipe, which takes a minute


@pytest.fixture(scope="module", autouse=True)
def untimed() -> Iterator[None]:
    """How long a pass takes is not in the table, and to measure it takes long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "compute_seconds", lambda *_, **__: 1.0)
        yield


@pytest.fixture(scope="module")
def rows(args) -> list[dict]:
    main(args)
    return json.loads(args.json.read_text())["rows"]


def test_every_codec_and_number_of_groups_has_its_rows(rows):
    found = [(row["codec"], row["made by"], row["G"]) for row in rows]
    assert found[:3] == [
        (None, "original", None),
        (None, "original, trained 2 steps more", None),
        (None, "nothing of other devices", None),
    ]
    own = [(made, G) for G in (2, 1) for made in ("calibrated", "finetuned")]
    nested = [(made, m) for made in ("calibrated", "finetuned") for m in (1, 2)]
    assert found[3:] == [("vq", *row) for row in own] + [("nested-pq", *row) for row in nested]
    for row in rows[3:]:
        assert row["N"] == 4 and row["bits"] == 4 * row["G"]
    assert [(row["N"], row["bits"]) for row in rows[:3]] == [(1, None), (1, None), (4, 0)]


def test_a_row_says_how_much_worse_than_the_original_it_is(rows):
    exact = rows[0]["perplexity"]
    for row in rows:
        assert list(row) == ["made by", "codec", "N", "G", "bits", "perplexity", "% above the original"]
        assert row["% above the original"] == pytest.approx(100 * (row["perplexity"] - exact) / exact, abs=1e-9)


def test_rows_are_what_eval_says_of_their_checkpoints(rows, args):
    """Other checkpoints or groups would give other numbers: all of them differ."""
    assert len({row["perplexity"] for row in rows}) == len(rows)
    by_name = {(row["codec"], row["made by"], row["G"]): row["perplexity"] for row in rows}
    for name, folder, groups in [
        ((None, "original", None), args.original, None),
        ((None, "original, trained 2 steps more", None), args.out / "control-2-steps", None),
        (("vq", "calibrated", 2), args.out / "calibrated-vq-G2", None),
        (("vq", "finetuned", 1), args.out / "finetuned-vq-G1-N4-2-steps", None),
        (("nested-pq", "calibrated", 1), args.out / "calibrated-nested-pq-G2", 1),
        (("nested-pq", "finetuned", 1), args.out / "finetuned-nested-pq-G1-2-N4-2-steps", 1),
        (("nested-pq", "finetuned", 2), args.out / "finetuned-nested-pq-G1-2-N4-2-steps", None),
    ]:
        options = evaluate.Args(
            checkpoints=(folder,), data=args.test[0], separator="===", virtual=True, length=LENGTH, rates=()
        )
        assert evaluate.measure(folder, options, print, groups)["perplexity"] == by_name[name], name


def test_finetuning_is_for_the_devices_and_groups_of_the_rows(rows, args):
    def last(name: str) -> dict:
        return checkpoints.read_meta(args.out / name).history[-1]

    assert last("control-2-steps")["shards"] == [1]
    assert last("finetuned-vq-G2-N4-2-steps")["shards"] == [4] == last("finetuned-nested-pq-G1-2-N4-2-steps")["shards"]
    assert last("finetuned-vq-G2-N4-2-steps")["groups"] == []
    assert last("finetuned-nested-pq-G1-2-N4-2-steps")["groups"] == [1, 2]
    assert last("calibrated-vq-G2")["verb"] == "calibrate"


def test_where_nothing_arrives_a_device_is_alone_with_its_tokens(rows, args):
    """A Llama knows only distances between tokens, so a shard is then the same as a text of its own."""
    checkpoint = checkpoints.load(args.original)
    model = checkpoint.model
    nats, count = 0.0, 0
    for document in Path(args.test[0]).read_text().split("==="):
        ids = np.asarray(checkpoint.tokenizer.encode(document), np.int32)
        assert len(ids) == LENGTH
        shards = Text(ids.reshape(4, -1), np.full(4, LENGTH // 4, np.int32))
        logits, _ = model(model.to_tokens(shards), Single(model.shards(1, shards)))
        log_p = np.asarray(jax.nn.log_softmax(logits, axis=-1)).reshape(LENGTH, -1)
        nats -= log_p[np.arange(LENGTH - 1), ids[1:]].sum()
        count += LENGTH - 1
    assert rows[2]["perplexity"] == pytest.approx(np.exp(nats / count), rel=1e-5)


def test_the_page_and_the_plot(rows, args, monkeypatch):
    page = args.markdown.read_text()
    assert page.startswith("# Page\n" + MARKS.format("", "llama") + "| made by | codec | N | G | bits | perplexity | ")
    assert page.endswith("</sub>\n" + MARKS.format("end of ", "llama")) and "old" not in page
    assert page.count("| nested-pq | 4 | 2 | 8 |") == 2 and "| nothing of other devices | - | 4 | - | 0 |" in page
    assert args.plot.stat().st_size > 10_000
    figures = []
    monkeypatch.setattr(plots, "FigureCanvasAgg", figures.append)
    metrics = ["perplexity", "% above the original"]
    plots.quality_over_bits(rows, metrics, args.plot.with_suffix(".png"))
    for axes, metric in zip(figures[0].axes, metrics, strict=True):
        lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
        assert list(lines)[:3] == [row["made by"] for row in rows[:3]]
        assert lines["nothing of other devices"][0][1] == rows[2][metric]
        expected = sorted(
            [row["bits"], row[metric]] for row in rows if row["codec"] == "vq" and row["made by"] == "finetuned"
        )
        assert lines["vq, finetuned"] == expected and len(lines) == 3 + 2 + 2
        assert axes.get_ylabel() == metric


def test_a_second_run_does_nothing_again(rows, args, monkeypatch):
    def never(*_: object) -> None:
        raise AssertionError("this was done before")

    for verb in ("calibrate", "finetune", "evaluate"):
        monkeypatch.setattr(f"train.recipes.resumable.{verb}.main", never)
    again = dataclasses.replace(args, json=args.out.parent / "again.json")
    main(again)
    assert json.loads(again.json.read_text())["rows"] == rows
    main(dataclasses.replace(again, groups=(1, 2), steps=0))
    fewer = json.loads(again.json.read_text())["rows"]
    # One device, nothing of others; two of vq; two of nested-pq.
    assert len(fewer) == 2 + 2 + 2 and all(row in rows for row in fewer)


def test_an_interrupted_run_goes_on(rows, args, monkeypatch):
    """What is missing, and only that, is evaluated again, and is the same."""
    done = []
    monkeypatch.setattr(
        "train.recipes.resumable.evaluate.main",
        lambda options, main=evaluate.main: (done.append((options.checkpoints[0].name, options.groups)), main(options)),
    )
    (missing,) = args.out.glob("calibrated-nested-pq-G2-N4-first1-*test.txt.json")
    missing.unlink()
    main(args)
    assert done == [("calibrated-nested-pq-G2", (1,))]
    assert json.loads(args.json.read_text())["rows"] == rows


def test_what_token_ids_say_without_any_codes(rows, args):
    """With a predictor, every device knows the ids of all tokens, and predicts from there on."""
    again = dataclasses.replace(args, codecs=("vq+linear",), groups=(1,), steps=0, plot=None, markdown=None)
    main(again)
    found = {row["made by"]: row for row in json.loads(args.json.read_text())["rows"]}
    assert list(found) == ["original", "nothing of other devices", "token ids alone, linear", "calibrated"]
    coded = args.out / "calibrated-vq+linear-G1"
    options = evaluate.Args(
        checkpoints=(coded,),
        data=args.test[0],
        separator="===",
        virtual=True,
        length=LENGTH,
        rates=(),
        losses=evaluate.Losses(1.0, seeds=1, lost="predicted"),
    )
    expected = evaluate.measure(coded, options, print)["perplexity"]
    assert found["token ids alone, linear"]["perplexity"] == pytest.approx(expected, rel=1e-6)
    assert found["token ids alone, linear"]["bits"] == 0 and expected != found["nothing of other devices"]["perplexity"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": 1}, "out was made otherwise .seed was 0, now 1.: .*another folder"),
        ({"codecs": ("vq", "pq")}, "try vq, nested-pq"),
        ({"groups": ()}, "--groups is an empty list"),
        ({"class_tokens": ("double",)}, "--class-tokens has 'double'; give distributed, single"),
        ({"noise": (-1.0,)}, "noise is -1"),
        ({"plot": Path("plot.jpg")}, "write a .png or a .svg"),
        ({"original": Path("nowhere")}, "nowhere"),
        ({"markdown": Path("none.md")}, "none.md: cannot be read"),
    ],
)
def test_what_does_not_fit_is_told_before_any_work(rows, args, values, message):
    with pytest.raises(AstraError, match=message):
        main(dataclasses.replace(args, **values))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, tiny_vit) -> Args:
    """A ViT, and pictures whose classes are what it says, so that it is always right."""
    model, rng, place = tiny_vit(), np.random.default_rng(0), tmp_path_factory.mktemp("pictures")
    pixels = (rng.integers(0, 256, (80, 20, 20, 1)) * rng.random((80, 1, 1, 1))).astype(np.uint8)
    images = jnp.asarray(pixels, jnp.float32) / 127.5 - 1
    shards = model.shards(1, images)
    logits, _ = model(shards.scatter(model.to_tokens(images)), Single(shards))
    model.head.bias[...] -= logits.mean(0)  # or a random model says the same of all
    for i, label in enumerate(np.argmax(np.asarray(logits - logits.mean(0)), axis=-1)):
        folder = place / "pictures" / ("train", "test")[i % 2] / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[i, ..., 0]).save(folder / f"{i}.png")
    grey = {"size": {"height": 20, "width": 20}, "image_mean": [0.5], "image_std": [0.5]}
    return Args(
        original=save(place / "vit", "vit", model, labels=tuple(f"class{i}" for i in range(5)), preprocessing=grey),
        out=place / "out",
        data=str(place / "pictures"),
        test=("test",),
        groups=(2,),
        codewords=16,
        json=place / "report.json",
    )


def test_a_classifier_loses_points(pictures, tmp_path):
    args = dataclasses.replace(
        pictures,
        out=tmp_path / "out",
        test=("test[:20]", "test[20:]"),
        codecs=("nested-pq",),
        plot=tmp_path / "plot.png",
    )
    main(args)
    rows = json.loads(args.json.read_text())["rows"]
    assert [(row["made by"], row["G"], row["bits"]) for row in rows] == [
        ("original", None, None),
        ("nothing of other devices", None, 0),
        ("calibrated", 2, 8),
    ]
    columns = [f"{column}, {test}" for test in args.test for column in ("accuracy %", "points below the original")]
    for row in rows:
        assert list(row)[5:] == columns
        for test in args.test:
            assert row[f"points below the original, {test}"] == 100 - row[f"accuracy %, {test}"]
    assert [rows[0][column] for column in columns] == [100, 0, 100, 0]
    coded = args.out / "calibrated-nested-pq-G2"
    for test in args.test:
        options = evaluate.Args(checkpoints=(coded,), data=args.data, split=test, virtual=True, rates=())
        found = evaluate.measure(coded, options, print)["accuracy %"]
        assert rows[2][f"accuracy %, {test}"] == found < 100
    assert args.plot.stat().st_size > 10_000


def test_with_and_without_noise_and_with_either_class_token(pictures):
    """The rows of the paper's Tables 1, 12 and 13, for two numbers of devices as in its Table 3."""
    args = dataclasses.replace(
        pictures,
        codecs=("nested-pq",),
        class_tokens=("distributed", "single"),
        devices=(2, 4),
        noise=(0.0, 1.0),
        steps=1,
        batch_size=4,
    )
    main(args)
    rows = json.loads(args.json.read_text())["rows"]
    made = ["calibrated", "finetuned, noise 0", "finetuned"]
    nested = ("nested-pq", "nested-pq, single class token")
    expected = [(codec, N, how) for codec in nested for how in made for N in (2, 4)]
    assert [(row["codec"], row["N"], row["made by"]) for row in rows if row["codec"]] == expected
    found = {(row["codec"], row["N"], row["made by"]): row["accuracy %"] for row in rows}
    for folder, codec, how, noise, class_token in [
        ("finetuned-nested-pq-G2-N2-4-noise0-1-steps", nested[0], "finetuned, noise 0", 0, "distributed"),
        ("finetuned-nested-pq-G2-N2-4-single-1-steps", nested[1], "finetuned", 1, "single"),
    ]:
        meta = checkpoints.read_meta(args.out / folder)
        made_by = meta.history[-1]
        assert (made_by["noise"], meta.astra.class_token, made_by["shards"]) == (noise, class_token, [2, 4])
        options = evaluate.Args(
            checkpoints=(args.out / folder,), data=args.data, split="test", devices="4", virtual=True, rates=()
        )
        assert evaluate.measure(args.out / folder, options, print)["accuracy %"] == found[codec, 4, how]


def test_a_sentence_encoder_is_refused(tmp_path, tiny_bert, word_tokenizer):
    encoder = save(tmp_path / "encoder", "bert", tiny_bert(), tokenizer_files=word_tokenizer(WORDS))
    with pytest.raises(AstraError, match="use a language model or a classifier"):
        main(Args(original=encoder, out=tmp_path / "out", data="x.csv", test=("y.csv",)))
    assert not (tmp_path / "out").exists()
