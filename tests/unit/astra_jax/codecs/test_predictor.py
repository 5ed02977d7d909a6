"""Prediction across blocks: least squares, the closed loop, and calibration."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import checkpoints
from astra_jax.cli.main import main
from astra_jax.codecs.config import NestedPQConfig, VQConfig
from astra_jax.codecs.predictor import Prediction, Predictor, around
from astra_jax.errors import AstraError
from astra_jax.inputs.token_batches import pad
from astra_jax.models.blocks import block_at
from astra_jax.strategies.base import Single
from astra_jax.strategies.coded import Astra
from train.calibrate import capture, choose
from train.fit_codecs import fit
from train.fit_predictor import regress, train_mlp
from train.loop import Training, make_step, start
from train.navq import NoiseAugmented

RNG = np.random.default_rng(0)


def predicted(x, y):
    predictor = Predictor(VQConfig(predictor="linear"), x.shape[1])
    for name, value in regress(x, y).items():
        getattr(predictor, name)[...] = jnp.asarray(value, jnp.float32)
    return np.asarray(predictor(jnp.asarray(x, jnp.float32), jnp.zeros_like))


def test_a_linear_predictor_is_least_squares():
    x, y = RNG.normal(size=(500, 6)) + 1, RNG.normal(size=(500, 6))
    y = y + x @ RNG.normal(size=(6, 6)) - 3
    ones = np.concatenate([x, np.ones((500, 1))], axis=1)
    best = ones @ np.linalg.lstsq(ones, y, rcond=None)[0]
    np.testing.assert_allclose(predicted(x, y), best, atol=0.05)  # but for the ridge


@pytest.mark.parametrize("causal", [False, True])
def test_what_is_around_a_token(causal):
    """Of 40 tokens, which is more than the running mean remembers."""
    x = RNG.normal(size=(2, 3, 40, 4)).astype(np.float32)
    there = np.arange(40) < np.array([[40], [7], [0]])
    found = np.asarray(jax.jit(around, static_argnums=2)(x, there, causal))
    for n, T in enumerate((40, 7)):
        expected, running = np.broadcast_to(x[:, n, :T].mean(1, keepdims=True), (2, T, 4)), np.zeros((2, 4))
        if causal:
            expected = np.stack([running := 0.8 * running + 0.2 * x[:, n, t] for t in range(T)], axis=1)
        np.testing.assert_allclose(found[:, n, :T], expected, atol=1e-6)
    assert np.isfinite(found).all()


def test_an_mlp_learns_what_is_not_linear_and_what_is_around():
    """Of a sum of both, and a linear part, on other vectors than it learned from."""
    x, near = RNG.normal(size=(2, 6000, 4)) + 1
    y = x @ RNG.normal(size=(4, 4)) + np.abs(x) + near[:, ::-1] - 2
    seen, metric = np.concatenate([x, near], axis=1), np.diag([1.0, 2.0, 3.0, 4.0])
    predictor = Predictor(VQConfig(predictor="mlp", hidden_units=32), 4)
    for name, value in train_mlp(32, seen[:5000], y[:5000], metric, jax.random.key(0)).items():
        getattr(predictor, name)[...] = jnp.asarray(value, jnp.float32)
    p = predictor(jnp.asarray(x[5000:], jnp.float32), lambda _: jnp.asarray(near[5000:], jnp.float32))
    assert np.mean((y[5000:] - p) ** 2) < 0.02 * np.var(y)
    assert np.mean((y[5000:] - predicted(x, y)[5000:]) ** 2) > 0.1 * np.var(y)


def test_neighbours_are_captured_together(tiny_gpt2, random_text):
    """In shards that follow each other in a text, none of them twice, and none of padding."""
    model, text, S = tiny_gpt2(), random_text(24, 20, 3), 5
    found = capture(model, [text], 30, 0, "distributed", S).reshape(2, -1, S, 16)
    shards = model.shards(1, text)
    run = nnx.jit(lambda model: model(shards.scatter(model.to_tokens(text)), Single(shards, capture=True))[1].captured)
    exact = np.asarray(run(model))
    places = [(b, s) for b, T in enumerate((24, 20)) for s in range(0, T - S + 1, S)]
    expected = np.stack([exact[:, b, s : s + S] for b, s in places], axis=1)
    assert found.shape[1] == 6 < len(places)
    distance = np.abs(found[:, :, None] - expected[:, None]).max((0, 3, 4))  # [found, expected]
    assert (distance.min(1) < 1e-5).all() and len(set(distance.argmin(1))) == 6


KNOWN = ("known", "coded", "coded")
FEW = VQConfig(groups=2, codewords=16, hidden_units=16)


def activations(L=3, M=2000, D=16):
    """Vectors that change from block to block by a little that is new, and by a linear map."""
    y = [RNG.normal(size=(M, D))]
    for _ in range(L - 1):
        y.append(y[-1] @ (np.eye(D) + 0.2 * RNG.normal(size=(D, D))) + 0.3 * RNG.normal(size=(M, D)))
    return np.stack(y).astype(np.float32)


@pytest.fixture(scope="module")
def errors(tiny_gpt2, random_text):
    """The errors of every block, given the codec and the kind of predictor."""
    y = activations()

    @functools.cache
    def calibrated(codec, kind):
        astra, base = dataclasses.replace(FEW, predictor=kind), tiny_gpt2(n_layer=3)
        source = checkpoints.Checkpoint("gpt2", base.config, None, None, None, {}, "float32", (), base)
        if codec == "nested-pq":
            astra = choose(source, [astra], codec, y, random_text(24), 0)
        return [e.vector for e in fit(tiny_gpt2(astra, n_layer=3), y, 8, 0)]

    return calibrated


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("codec", ["vq", pytest.param("nested-pq", marks=pytest.mark.slow)])
def test_codes_say_more_of_what_is_predicted(errors, codec, kind):
    without, with_it = errors(codec, "none"), errors(codec, kind)
    assert with_it[0] == pytest.approx(without[0], rel=0.2)  # nothing is known before the first block
    assert all(b < 0.95 * a for a, b in zip(without[1:], with_it[1:], strict=True))


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_calibration_makes_the_estimates_that_devices_make(tiny_gpt2, kind):
    """The errors that it reports are those of the closed loop over all blocks."""
    y, astra = activations(), dataclasses.replace(FEW, predictor=kind, schedule=KNOWN)
    model, S = tiny_gpt2(astra, n_layer=3), 8
    errors = fit(model, y, 8, 0, S)

    @nnx.jit
    def closed_loop(model, y):
        def near(x):
            shards = x.reshape(-1, S, x.shape[-1])
            return around(shards, jnp.ones(shards.shape[:2], bool), causal=True).reshape(x.shape)

        estimate, found = y[0], []
        for block in (1, 2):
            codec = block_at(model.blocks, block).attention.codec
            p = codec.expect(estimate, near)
            estimate = p + codec.decode(codec.encode((y[block] - p)[None]))[0]
            found.append(jnp.mean((y[block] - estimate) ** 2) / jnp.var(y[block], axis=0).mean())
        return found

    assert errors[0].vector == 0  # the first block is known
    np.testing.assert_allclose(closed_loop(model, y), [e.vector for e in errors[1:]], rtol=1e-4)


def test_before_the_first_block_only_the_mean_is_expected(tiny_gpt2):
    y, model = activations(), tiny_gpt2(dataclasses.replace(FEW, predictor="linear"), n_layer=3)
    fit(model, y, 8, 0)
    expected = block_at(model.blocks, 0).attention.codec.expect(jnp.zeros((2, 16)), jnp.zeros_like)
    np.testing.assert_allclose(expected, np.broadcast_to(y[0].mean(0), (2, 16)), atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", pytest.param("mlp", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "codec",
    [{}, pytest.param(dict(groups=2, widths=(8, 8), levels=(1, 1)), marks=pytest.mark.slow)],
    ids=["vq", "nested"],
)
def test_training_predicts_better(tiny_gpt2, random_text, codec, kind):
    """Weights of predictors learn from what they did not expect."""
    config = NestedPQConfig if codec else VQConfig
    astra = config(**{"groups": 4, "codewords": 16, "predictor": kind, "schedule": KNOWN, **codec})
    model, text = tiny_gpt2(astra, n_layer=3), random_text(24, 20)
    predictor = nnx.state(model.codec.predictor)
    nnx.update(model.codec.predictor, jax.tree.map(lambda weights: 0.1 * weights, predictor))
    training = Training(steps=20, batch_size=2, shards=(4,), learning_rate=1e-2, warmup=0.0, seed=0, noise=0.0)
    graphdef, frozen, state = start(model, training)
    step, first = make_step(graphdef, training, 4), None
    for _ in range(20):
        state, metrics = step(state, frozen, {"input": text})
        first = first or metrics["surprise"]
    assert metrics["surprise"] < 0.7 * first
    after = nnx.merge(graphdef, state.params, frozen, state.codecs)
    changed = [
        np.abs(a - b).max() > 0
        for a, b in zip(*(jax.tree.leaves(nnx.state(m, Prediction)) for m in (model, after)), strict=True)
    ]
    assert all(changed)


@pytest.mark.slow
def test_training_sees_noisy_estimates(tiny_gpt2, random_text):
    astra = VQConfig(groups=4, codewords=16, predictor="linear", schedule=KNOWN)
    model, text = tiny_gpt2(astra, n_layer=3), random_text(24, 20)
    shards = model.shards(4, text)

    graphdef, parameters, predictors, codecs = nnx.split(model, nnx.Param, Prediction, ...)

    @jax.jit
    def gradients(trained):
        def run(trained):
            noisy = NoiseAugmented.virtual(shards, key=jax.random.key(0))
            output, reports = nnx.merge(graphdef, *trained, codecs)(shards.scatter(model.to_tokens(text)), noisy)
            return output, reports.observed

        seen = run(trained)[1]
        of_task = jax.grad(lambda trained: jnp.mean(run(trained)[0] ** 2) + jnp.mean(run(trained)[1].commitment))(
            trained
        )
        return seen, of_task, jax.grad(lambda trained: jnp.mean(run(trained)[1].surprise))(trained)

    seen, of_task, of_surprise = gradients((parameters, predictors))
    assert seen.count.shape == (3, 4, 16) and np.allclose(seen.count.sum(-1), 44)
    sizes = [[np.abs(grad).max() for grad in jax.tree.leaves(part)] for part in (*of_task, *of_surprise)]
    assert np.isfinite(np.concatenate(sizes)).all()
    assert max(sizes[0]) > 0 == max(sizes[1])  # the task changes the model alone,
    assert max(sizes[2]) == 0 < max(sizes[3])  # and what was not expected predictors alone


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(schedule=("known",)), "schedule has a block that is known, which takes a predictor"),
        (dict(predictor="cubic"), "predictor is 'cubic'; it must be one of none, linear, mlp"),
        (dict(predictor="mlp", hidden_units=0), "hidden_units is 0; it must be a whole number of at least 1"),
    ],
)
def test_configurations_that_do_not_fit(unchecked, values, message):
    with pytest.raises(AstraError, match=message):
        VQConfig(**values)


@pytest.mark.slow
def test_the_verbs(tmp_path, tiny_gpt2, word_tokenizer, untimed, capsys):
    words = " ".join(f"w{n}" for n in np.random.default_rng(0).integers(0, 40, 3000))
    (tmp_path / "text.txt").write_text(words)
    model = tiny_gpt2()
    source = checkpoints.Checkpoint(
        "gpt2", model.config, None, None, None, {}, "float32", (), model, tokenizer_files=word_tokenizer(40)
    )
    checkpoints.save(tmp_path / "original", source)
    data, few = ["--data", str(tmp_path / "text.txt")], ["--groups", "4", "--codewords", "16"]

    def call(*arguments):
        assert main([*map(str, arguments), "--json", str(tmp_path / "out.json")]) == 0
        return json.loads((tmp_path / "out.json").read_text())

    codes, tuned = tmp_path / "codes", tmp_path / "tuned"
    rows = call(
        *("calibrate", tmp_path / "original", codes, *data, *few, "--codec", "nested-pq"),
        *("--predictor", "mlp", "--schedule", "known"),
    )["blocks"]
    assert rows[0]["of keys and values"] == 0 < rows[1]["of keys and values"] < 1
    call("finetune", codes, tuned, *data, "--steps", 2, "--groups", "1,4", "--batch-size", 4, "--length", 32)
    found = [
        call("eval", tuned, *data, *way, "--groups", "2,4", "--length", 32, "--limit", 1)["rows"]
        for way in (["--virtual"], ["--devices", "4"])
    ]
    for virtual, sharded in zip(*found, strict=True):
        assert virtual["perplexity"] == pytest.approx(sharded["perplexity"], rel=1e-4)
        assert virtual["bytes"] == sharded["bytes"]
    call("run", tuned, "--prompt", "w1 w2 w3 w4", "--devices", 2, "--groups", 2, "--max-new-tokens", 2)
    capsys.readouterr()
    assert main(["run", str(tuned), "--prompt", "w1 w2", "--devices", "2", "--groups", "5"]) == 2
    assert "these codes have 4" in capsys.readouterr().err
    assert main(["run", str(tmp_path / "original"), "--prompt", "w1 w2", "--groups", "1"]) == 2
    assert "astra calibrate --codec nested-pq" in capsys.readouterr().err
    # The first block sends no codes, so that it has no packets to lose.
    lossy = [
        call("eval", tuned, *data, "--length", 32, "--limit", 1, "--packet", 4, "--seeds", 2, *loss)["rows"][0]
        for loss in (["--packet-loss", 0], ["--packet-loss", 0.5], ["--packet-loss", 0.5, "--lost", "masked"])
    ]
    assert [row["lost"] for row in lossy] == ["predicted", "predicted", "masked"]
    nothing, predicted, masked = (row["perplexity"] for row in lossy)
    assert nothing == pytest.approx(found[0][-1]["perplexity"], rel=1e-5)
    assert len({nothing, predicted, masked}) == 3


@pytest.mark.slow
@pytest.mark.parametrize(("class_token", "predictor"), [("distributed", "mlp")])
def test_the_verbs_of_a_classifier(tmp_path, tiny_bert, word_tokenizer, untimed, class_token, predictor):
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{n}" for n in rng.integers(0, 40, rng.integers(3, 30))) for _ in range(48)]
    rows = "".join(f"{text},{('no', 'yes')[number % 2]}\n" for number, text in enumerate(texts))
    (tmp_path / "text.csv").write_text("text,label\n" + rows)
    model = tiny_bert(task="classification", pooling="class", num_labels=2)
    source = checkpoints.Checkpoint(
        *("bert", model.config, None, ("no", "yes"), None, {}, "float32", (), model),
        tokenizer_files=word_tokenizer(40, special=True),
    )
    checkpoints.save(tmp_path / "original", source)
    data, codes, tuned = ["--data", str(tmp_path / "text.csv")], tmp_path / "codes", tmp_path / "tuned"

    def call(*arguments):
        assert main([*map(str, arguments), "--json", str(tmp_path / "out.json")]) == 0
        return json.loads((tmp_path / "out.json").read_text())

    blocks = call(
        *("calibrate", tmp_path / "original", codes, *data, "--groups", "4", "--codewords", "16"),
        *("--predictor", predictor, "--schedule", "known", "--class-token", class_token),
    )["blocks"]
    assert blocks[0]["of keys and values"] == 0 < blocks[1]["of keys and values"] < 1
    call("finetune", codes, tuned, *data, "--steps", 2, "--batch-size", 4)
    virtual, sharded = (
        call("eval", tuned, *data, "--split", "train", "--devices", 4, *way)["rows"][0] for way in (["--virtual"], [])
    )
    assert virtual["accuracy %"] == sharded["accuracy %"] and virtual["bytes"] == sharded["bytes"]
    lossy = call("eval", tuned, *data, "--split", "train", "--packet", 4, "--seeds", 1, "--packet-loss", 0.5)["rows"][0]
    assert lossy["lost"] == "predicted"
    found = call("run", tuned, "--prompt", *texts[:3], "--devices", 4, "--dtype", "float32")["classes"]
    tuned = checkpoints.load(tuned)
    text = pad([tuned.tokenizer.encode(text) for text in texts[:3]], 64)

    @nnx.jit
    def run(model, text):
        shards = model.shards(4, text)
        return jax.nn.softmax(model(shards.scatter(model.to_tokens(text)), Astra.virtual(shards))[0])

    probabilities = dict(zip(texts, run(tuned.model, text).tolist(), strict=False))
    for row in found:
        expected = probabilities[row["input"]][("no", "yes").index(row["class"])]
        assert row["probability"] == pytest.approx(expected, rel=1e-5)


def test_pictures_have_no_token_ids(tmp_path, tiny_vit, capsys):
    model = tiny_vit()
    names = tuple(f"c{n}" for n in range(model.config.num_labels))
    source = checkpoints.Checkpoint("vit", model.config, None, names, {"size": 20}, {}, "float32", (), model)
    checkpoints.save(tmp_path / "vit", source)
    options = ["--data", str(tmp_path), "--predictor", "linear", "--schedule", "known"]
    assert main(["calibrate", str(tmp_path / "vit"), str(tmp_path / "codes"), *options]) == 2
    said = capsys.readouterr().err
    assert "--schedule known: token ids are of texts; this is a vit: use auto" in said and said.count("\n") == 1
