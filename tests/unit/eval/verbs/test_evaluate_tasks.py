"""`astra eval` on text as a user calls it: perplexity, classification, similarity, on one device and on several."""

import json
import math
import re
from pathlib import Path

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import checkpoints
from astra_jax import make_mesh, parallelize
from astra_jax.cli.main import main
from astra_jax.codecs.config import VQConfig
from astra_jax.errors import AstraError
from astra_jax.inputs.token_batches import Text, pad
from astra_jax.strategies.coded import Astra
from eval.network.packet_loss import PacketLoss, arrived
from eval.quality.perplexity import NextTokenLoss, perplexity
from eval.quality.similarity import correlations

WORDS = [f"w{i}" for i in range(25)]
LIMIT, D, L = 32, 16, 2
CODES = VQConfig(groups=4, codewords=16)  # 16 bits per token and block


def sentence(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(WORDS, words))


@pytest.fixture(scope="module")
def place(tmp_path_factory, word_tokenizer, tiny_gpt2, tiny_bert, tiny_vit) -> Path:
    """Checkpoints `lm`, `lm-codes`, `classifier`, `encoder`, `vit`, and data for each."""
    place = tmp_path_factory.mktemp("eval")
    tokenizers = {name: word_tokenizer(len(WORDS), special=name == "special") for name in ("plain", "special")}

    def save(name: str, family: str, model, tokenizer: str | None, labels: tuple[str, ...] | None = None) -> None:
        checkpoint = checkpoints.Checkpoint(
            family=family,
            config=model.config,
            astra=model.astra,
            labels=labels,
            preprocessing=None,
            hf_config={},
            dtype="float32",
            history=(),
            model=model,
            tokenizer_files=tokenizers[tokenizer] if tokenizer else None,
        )
        checkpoints.save(place / name, checkpoint)

    lm, bert = {"n_positions": LIMIT}, {"max_position_embeddings": LIMIT}
    save("lm", "gpt2", tiny_gpt2(**lm), "plain")
    save("lm-codes", "gpt2", tiny_gpt2(CODES, **lm), "plain")
    classifier = tiny_bert(CODES, **bert, task="classification", pooling="class")
    save("classifier", "bert", classifier, "special", ("no", "yes"))
    save("encoder", "bert", tiny_bert(CODES, **bert), "special")
    save("vit", "vit", tiny_vit(num_labels=2), None, ("no", "yes"))

    rng = np.random.default_rng(0)
    (place / "test.txt").write_text("\n<end>\n".join(sentence(rng, n) for n in (70, 20, 2)))
    lengths = (5, 40, 1, 12, 30, 31, 7, 9)
    rows = {"text": [sentence(rng, n) for n in lengths], "label": ["yes", "no"] * 4}
    datasets.Dataset.from_dict(rows).to_csv(place / "test.csv", index=False)
    pairs = {
        "sentence1": [sentence(rng, n) for n in lengths],
        "sentence2": [sentence(rng, n) for n in reversed(lengths)],
        "score": rng.uniform(0, 5, len(lengths)).tolist(),
    }
    datasets.Dataset.from_dict(pairs).to_csv(place / "test.tsv", sep="\t", index=False)
    return place


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def evaluate(place: Path, arguments: str) -> dict:
    report = place / "eval.json"
    assert main(["eval", *arguments.format(place=place).split(), "--rates", "10mbit", "--json", str(report)]) == 0
    return json.loads(report.read_text())


def read(place: Path, name: str) -> dict[str, list]:
    return datasets.load_dataset("csv", data_files=str(place / name), sep="\t" if name.endswith("tsv") else ",")[
        "train"
    ][:]


def one_by_one(checkpoint, texts: list, N: int) -> np.ndarray:
    """The outputs for texts, each run on its own."""
    run = parallelize(checkpoint.model, make_mesh(N))
    encoded = [checkpoint.tokenizer.encode(text, LIMIT) for text in texts]
    return np.concatenate([np.asarray(run(pad([ids], LIMIT, LIMIT))) for ids in encoded])


# --- the three tasks ----------------------------------------------------------------------------------------------


def test_perplexity_on_one_device_and_on_four(place):
    options = "--data {place}/test.txt --separator <end> --length 24 --stride 12 --batch-size 3"
    found = evaluate(place, f"{{place}}/lm {{place}}/lm-codes {options} --plot {{place}}/plot.png")
    original, codes = found["rows"]
    assert (original["N"], codes["N"], original["T"], codes["T"]) == (1, 4, 24, 24)
    for row, N in ((original, 1), (codes, 4)):
        checkpoint = checkpoints.load(place / row["checkpoint"])
        documents = (place / "test.txt").read_text().split("<end>")
        encoded = [checkpoint.tokenizer.encode(text) for text in documents]
        run = parallelize(NextTokenLoss(checkpoint.model), make_mesh(N))
        expected = perplexity(run, encoded, 24, 12, 3)
        assert row["tokens"] == expected.tokens == 69 + 19 + 1
        assert row["nats per token"] == pytest.approx(expected.nll, abs=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(expected.nll), rel=1e-4)
    assert original["bytes"] == 0 and original["10mbit"] == pytest.approx(original["compute ms"])
    # Six tokens of a shard, 16 bits each, in two blocks; a language model sends nothing else.
    assert codes["bits"] == 16 and codes["ratio"] == D * 32 / 16 and codes["bytes"] == L * 6 * 16 // 8
    assert codes["10mbit"] == pytest.approx(codes["compute ms"] + 1e3 * 8 * codes["bytes"] / 10e6)
    assert "lm: 3 document(s) in windows of 24 tokens, stride 12" in found["notes"]
    assert any(n.startswith("lm-codes: 10 of 89 predictions count in the shorter last") for n in found["notes"])
    assert any(
        n == "lm-codes: 1 of 7 windows are too short for all 4 devices and use only some of them"
        for n in found["notes"]
    )
    assert not any(note.startswith("lm: 1 of") for note in found["notes"])
    assert (place / "plot.png").stat().st_size > 10_000

    virtual = evaluate(place, f"{{place}}/lm-codes {options} --virtual")["rows"][0]
    assert virtual["nats per token"] == pytest.approx(codes["nats per token"], abs=1e-5)
    assert all(virtual[column] == codes[column] for column in ("N", "T", "tokens", "bits", "bytes"))


def test_strategy_single_runs_codebooks_on_one_device(place, untimed):
    options = "--data {place}/test.txt --length 24 --limit 1 --batch-size 3"
    (row,) = evaluate(place, f"{{place}}/lm-codes {options} --strategy single")["rows"]
    (six,) = evaluate(place, f"{{place}}/lm-codes {options} --devices 2x3")["rows"]
    assert (row["N"], row["bytes"], row["bits"]) == (1, 0, None) and (six["N"], six["bytes"]) == (3, L * 8 * 16 // 8)
    assert row["nats per token"] != six["nats per token"]


def test_classification_counts_right_answers(place, untimed):
    found = evaluate(place, "{place}/classifier --data {place}/test.csv --batch-size 3 --length 9")
    (row,) = found["rows"]
    rows, checkpoint = read(place, "test.csv"), checkpoints.load(place / "classifier")
    predicted = np.argmax(one_by_one(checkpoint, rows["text"], 4), axis=-1)
    right = [checkpoint.labels[p] == label for p, label in zip(predicted, rows["label"], strict=True)]
    assert row["accuracy %"] == pytest.approx(100 * np.mean(right)) and 0 < sum(right) < 8
    # Two of eight tokens in every shard, and the class state at the end. Texts are as long as they are.
    assert row["T"] == 9 and row["bytes"] == L * 2 * 16 // 8 + 4 * D
    assert found["notes"] == [
        f"classifier: 2 of 8 texts were cut to {LIMIT} tokens",
        "classifier: 1 of 8 texts are too short for all 4 devices and use only some of them",
    ]
    virtual = evaluate(place, "{place}/classifier --data {place}/test.csv --batch-size 3 --virtual")["rows"][0]
    assert virtual["T"] == LIMIT and virtual["bytes"] == L * 8 * 16 // 8 + 4 * D
    assert virtual["accuracy %"] == row["accuracy %"]


def test_pairs_of_texts_are_classified_as_one(place, untimed):
    """By `eval`, and by `run`; a BERT tells them apart by the types of their tokens."""
    rng = np.random.default_rng(1)
    rows = {name: [sentence(rng, n) for n in (3, 30, 7, 12, 5, 9)] for name in ("premise", "hypothesis")}
    datasets.Dataset.from_dict(rows | {"label": ["yes", "no"] * 3}).to_csv(place / "pairs.csv", index=False)
    found = evaluate(place, "{place}/classifier --data {place}/pairs.csv --batch-size 6 --strategy single")
    checkpoint = checkpoints.load(place / "classifier")
    texts = list(zip(*rows.values(), strict=True))
    out = one_by_one(checkpoint, texts, 1)
    right = np.argmax(out, axis=-1) == [1, 0] * 3
    assert found["rows"][0]["accuracy %"] == pytest.approx(100 * right.mean())
    assert f"classifier: 1 of 6 texts were cut to {LIMIT} tokens" in found["notes"]
    assert "pairs of the columns premise and hypothesis" in json.dumps(found)
    options = ["--strategy", "sp", "--json", str(place / "run.json")]
    options += [*("--prompt", texts[0][0], texts[2][0]), *("--pair", texts[0][1], texts[2][1])]
    assert main(["run", str(place / "classifier"), *options]) == 0
    rows = json.loads((place / "run.json").read_text())["classes"]
    assert [row["input"] for row in rows[::2]] == [" | ".join(texts[0]), " | ".join(texts[2])]
    expected = jax.nn.softmax(out[[0, 2]])
    for number, row in enumerate(rows):
        its = expected[number // 2, checkpoint.labels.index(row["class"])]
        assert row["probability"] == pytest.approx(float(its), abs=1e-5)


@pytest.mark.slow
def test_similarity_is_what_scipy_says_of_the_embeddings(place, untimed):
    (row,) = evaluate(place, "{place}/encoder --data {place}/test.tsv --devices 3 --batch-size 5")["rows"]
    pairs, checkpoint = read(place, "test.tsv"), checkpoints.load(place / "encoder")
    first, second = (one_by_one(checkpoint, pairs[column], 3) for column in ("sentence1", "sentence2"))
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(first, second, strict=True)]
    assert row["Pearson"] == pytest.approx(stats.pearsonr(cosines, pairs["score"]).statistic, abs=1e-4)
    assert row["Spearman"] == pytest.approx(stats.spearmanr(cosines, pairs["score"]).statistic, abs=1e-4)
    assert row["bytes"] == L * 11 * 16 // 8 + 4 * D
    fewer = evaluate(place, "{place}/encoder --data {place}/test.tsv --devices 3 --limit 4")["rows"][0]
    assert fewer["Spearman"] == pytest.approx(stats.spearmanr(cosines[:4], pairs["score"][:4]).statistic, abs=1e-4)


def test_an_original_alone_takes_any_stride(place, untimed):
    """All of its context is exact."""
    options = "--data {place}/test.txt --separator <end> --length 24 --stride 10"
    (row,) = evaluate(place, f"{{place}}/lm {options}")["rows"]
    assert row["N"] == 1 and row["tokens"] == 69 + 19 + 1


# --- packet loss --------------------------------------------------------------------------------------------------


def test_perplexity_under_packet_loss(place, untimed):
    """Seed and batch decide what is lost: the same windows run here, with masks drawn for each."""
    options = "--data {place}/test.txt --separator <end> --length 24 --stride 12 --batch-size 3"
    found = evaluate(place, f"{{place}}/lm-codes {options} --packet-loss 0.4 --packet 4 --seeds 2")
    checkpoint = checkpoints.load(place / "lm-codes")
    model = NextTokenLoss(checkpoint.model)
    encoded = [checkpoint.tokenizer.encode(text) for text in (place / "test.txt").read_text().split("<end>")]

    @nnx.jit
    def lossy(model: NextTokenLoss, text: Text, there: jax.Array) -> jax.Array:
        shards = model.shards(4, text)
        out = model(shards.scatter(model.to_tokens(text)), Astra.virtual(shards, arrived=there))[0]
        return shards.gather(out, text.ids.shape[1])

    for seed, one in enumerate(found["seeds"]):
        drawn = []

        def run(text: Text, seed: int = seed, drawn: list = drawn) -> jax.Array:
            rng = np.random.default_rng([seed, len(drawn)])
            drawn.append(arrived(PacketLoss(0.4, packet=4), model.shards(4, text), 16, L, 3, rng))
            return lossy(model, text, jnp.asarray(drawn[-1]))

        expected = perplexity(run, encoded, 24, 12, 3)
        assert len(drawn) == 3 and not any(there.all() for there in drawn)
        assert one == {
            "checkpoint": "lm-codes",
            "seed": seed,
            "perplexity": pytest.approx(expected.perplexity, rel=1e-4),
            "nats per token": pytest.approx(expected.nll, abs=1e-5),
            "tokens": expected.tokens,
        }
    (row,), (first, second) = found["rows"], [one["perplexity"] for one in found["seeds"]]
    assert first != second and row["perplexity"] == pytest.approx((first + second) / 2)
    assert row["perplexity sd"] == pytest.approx(abs(first - second) / math.sqrt(2))
    assert row["tokens"] == 69 + 19 + 1 and "tokens sd" not in row


def test_texts_under_packet_loss_and_speeds(place, untimed):
    """With nothing lost they get what they get without, also where tokens are split for speeds."""
    options = "--devices 3 --speeds 1 2 4 --batch-size 5"
    (row,) = evaluate(place, f"{{place}}/encoder --data {{place}}/test.tsv {options}")["rows"]
    (same,) = evaluate(place, f"{{place}}/encoder --data {{place}}/test.tsv {options} --packet-loss 0 --seeds 1")[
        "rows"
    ]
    (lossy,) = evaluate(place, f"{{place}}/encoder --data {{place}}/test.tsv {options} --packet-loss 0.5 --packet 2")[
        "rows"
    ]
    for column in ("Pearson", "Spearman"):
        assert row[column] == pytest.approx(same[column], abs=1e-6) and same[f"{column} sd"] is None
        assert lossy[column] != row[column] and lossy[f"{column} sd"] > 0
    # Of 32 tokens the three get 4, 9 and 18, and the last the one that is left over.
    assert row["bytes"] == L * 19 * 16 // 8 + 4 * D


# --- correlations by hand -----------------------------------------------------------------------------------------


def at(*degrees: float, length: float = 1.0) -> np.ndarray:
    """Vectors of the plane at these angles."""
    angle = np.radians(degrees)
    return length * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def test_correlations_by_hand():
    first, second = at(0, 0, 0), at(0, 60, 90, length=7)  # cosines 1, 1/2, 0, whatever the lengths
    exact = correlations(first, second, np.asarray([4.0, 2.0, 0.0]))
    assert exact == {"Pearson": pytest.approx(1), "Spearman": pytest.approx(1)}
    bent = correlations(first, second, np.asarray([9.0, 1.0, 0.0]))
    assert bent["Spearman"] == pytest.approx(1) and bent["Pearson"] == pytest.approx(0.9122, abs=1e-4)
    assert correlations(first, second, np.asarray([0.0, 1.0, 2.0]))["Pearson"] == pytest.approx(-1)


@given(st.lists(st.tuples(st.integers(0, 180), st.integers(0, 9)), min_size=2, max_size=9))
def test_correlations_of_drawn_angles(rows):
    angles, scores = zip(*rows, strict=True)
    vectors = (at(*[0] * len(rows)), at(*angles), np.asarray(scores, float))
    if len(set(angles)) == 1 or len(set(scores)) == 1:
        with pytest.raises(AstraError, match="nothing correlates"):
            correlations(*vectors)
        return
    # The cosine falls with the angle, so that ranks are those of the angles turned round.
    found = correlations(*vectors)["Spearman"]
    assert found == pytest.approx(stats.spearmanr(-np.asarray(angles), scores).statistic, abs=1e-6)


# --- what a user can get wrong ------------------------------------------------------------------------------------

BAD = {
    "a task of another model": ("lm --task similarity --data {place}/test.tsv", "a model for perplexity, not for"),
    "checkpoints of two tasks": ("lm classifier --data {place}/test.txt", "classification, .*lm for perplexity"),
    "a window beyond the model": ("lm --length 33 --data {place}/test.txt", "--length is 33; .* from 2 to 32"),
    "a window of one token": ("lm --length 1 --data {place}/test.txt", "--length is 1; .* from 2 to 32"),
    "no stride": ("lm --stride 0 --data {place}/test.txt", "--stride is 0; windows of 32 tokens move by 1 to 32"),
    "a stride beyond the window": ("lm --length 8 --stride 9 --data {place}/test.txt", "--stride is 9; .* 1 to 8"),
    "a stride of part of a shard": (
        "lm lm-codes --length 24 --stride 10 --data {place}/test.txt",
        "use 6 or 12 or 18 or 24, or",
    ),
    "labels without classes": ("lm --labels a,b --data {place}/test.txt", "--labels a,b: no classes are read"),
    "a stride without windows": ("classifier --stride 9 --data {place}/test.csv", "--stride is for perplexity"),
    "a window for pictures": ("vit --length 9 --data {place}/test.csv", "--length is for text"),
    "no documents": ("lm --limit 0 --data {place}/test.txt", "limit is 0"),
    "no batch": ("lm --batch-size 0 --data {place}/test.txt", "batch size is 0"),
    "another split": ("lm --split train --data {place}/test.txt", "no split 'train'; it has test"),
    "no such column": ("classifier --text-column x --data {place}/test.csv", "--text-column x: .* text, label"),
    "texts without labels": ("classifier --data {place}/test.txt", "no label column among text"),
    "pairs without scores": ("encoder --label-column stars --data {place}/test.tsv", "stars: .* score"),
    "scores that are no numbers": ("encoder --label-column sentence1 --data {place}/test.tsv", "row 0: the score"),
    "one pair": ("encoder --limit 1 --data {place}/test.tsv", "of 1 pairs .*nothing correlates"),
    "pictures for a language model": ("lm --data {place}/none.png", "none.png"),
    "more devices than tokens": ("lm-codes --virtual --devices 33 --data {place}/test.txt", "use at most 32"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line(case, place, untimed, capsys):
    call, expected = BAD[case]
    names = [str(place / word) if (place / word / "astra.json").exists() else word for word in call.split()]
    capsys.readouterr()
    assert main(["eval", *" ".join(names).format(place=place).split()]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("astra: error: ") and re.search(expected, lines[0]), lines
