"""Prediction across blocks: least squares, the closed loop, and calibration."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import checkpoints
from astra_jax.cli import main
from astra_jax.config import AstraConfig
from astra_jax.errors import AstraError
from astra_jax.models.blocks import block_at
from astra_jax.predictor import Known, Predictor
from astra_jax.strategies import Noise, Virtual
from train.calibrate import choose_widths, fit
from train.prediction import regress

RNG = np.random.default_rng(0)
KINDS = ["diagonal", "low-rank", "linear"]


def predicted(kind, x, y, rank=2):
    predictor = Predictor(AstraConfig(predictor=kind, rank=rank), x.shape[1])
    for name, value in regress(kind, rank, x, y).items():
        getattr(predictor, name)[...] = jnp.asarray(value, jnp.float32)
    return np.asarray(predictor(jnp.asarray(x, jnp.float32)))


def test_a_linear_predictor_is_least_squares():
    x, y = RNG.normal(size=(500, 6)) + 1, RNG.normal(size=(500, 6))
    y = y + x @ RNG.normal(size=(6, 6)) - 3
    ones = np.concatenate([x, np.ones((500, 1))], axis=1)
    best = ones @ np.linalg.lstsq(ones, y, rcond=None)[0]
    np.testing.assert_allclose(predicted("linear", x, y), best, atol=0.05)  # but for the ridge


def test_the_more_weights_the_better():
    x = RNG.normal(size=(800, 8)) @ RNG.normal(size=(8, 8))
    y = x @ (np.eye(8) + 0.3 * RNG.normal(size=(8, 8))) + 0.1 * RNG.normal(size=(800, 8)) + 2
    errors = [np.mean((y - predicted(kind, x, y)) ** 2) for kind in KINDS]
    assert np.var(y) > errors[0] > errors[1] > errors[2]
    np.testing.assert_allclose(np.mean((y - predicted("low-rank", x, y, 8)) ** 2), errors[2], rtol=0.05)


def activations(L=3, M=2000, D=16):
    """Vectors that change from block to block by a little that is new, and by a linear map."""
    y = [RNG.normal(size=(M, D))]
    for _ in range(L - 1):
        y.append(y[-1] @ (np.eye(D) + 0.2 * RNG.normal(size=(D, D))) + 0.3 * RNG.normal(size=(M, D)))
    return np.stack(y).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("codec", ["vq", pytest.param("rotated-pq", marks=pytest.mark.slow)])
def test_codes_say_more_of_what_is_predicted(tiny_gpt2, random_text, codec, kind):
    y, plain = activations(), AstraConfig(groups=2, codewords=16)

    def errors(astra):
        base = tiny_gpt2(n_layer=3)
        source = checkpoints.Checkpoint("gpt2", base.config, None, None, None, {}, "float32", (), base)
        if codec == "rotated-pq":
            astra = choose_widths(source, astra, (), y, [random_text(24)], 0)
        return [e.vector for e in fit(tiny_gpt2(astra, n_layer=3), y, 8, 0)]

    without, with_it = errors(plain), errors(dataclasses.replace(plain, predictor=kind))
    assert with_it[0] == pytest.approx(without[0], rel=0.2)  # nothing is known before the first block
    assert all(b < 0.95 * a for a, b in zip(without[1:], with_it[1:], strict=True))


def test_calibration_makes_the_estimates_that_devices_make(tiny_gpt2):
    """The errors that it reports are those of the closed loop over all blocks."""
    y, astra = activations(), AstraConfig(groups=2, codewords=16, predictor="linear", side_info="token-ids")
    model = tiny_gpt2(astra, n_layer=3)
    errors = fit(model, y, 8, 0)
    assert errors[0].vector == 0  # the first block is known
    estimate = jnp.asarray(y[0])
    for block in (1, 2):
        codec = block_at(model.blocks, block).attention.codec
        p = codec.predict(estimate)
        estimate = p + codec.decode(codec.encode((y[block] - p)[None]))[0]
        error = jnp.mean((y[block] - estimate) ** 2) / jnp.var(y[block], axis=0).mean()
        np.testing.assert_allclose(error, errors[block].vector, rtol=1e-4)


@pytest.mark.parametrize("known", [False, True])
def test_the_first_block(tiny_gpt2, known):
    astra = AstraConfig(groups=4, codewords=16, predictor="diagonal")
    codec = block_at(tiny_gpt2(astra).blocks, 0).attention.codec
    vectors = jnp.ones((2, 3, 16))
    expected = vectors if known else codec.predictor.bias[...]
    np.testing.assert_array_equal(codec.predict(Known(vectors if known else None)), expected)


def test_training_sees_noisy_estimates_and_leaves_predictors_alone(tiny_gpt2, random_text):
    astra = AstraConfig(groups=4, codewords=16, predictor="linear", side_info="token-ids")
    model, text = tiny_gpt2(astra, n_layer=3), random_text(24, 20)
    shards = model.shards(4, text)

    graphdef, parameters, codecs = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def loss(parameters):
        noisy = Virtual(shards, Noise(jax.random.key(0), 1.0))
        out, seen = nnx.merge(graphdef, parameters, codecs)(shards.scatter(model.to_tokens(text)), noisy)
        return jnp.mean(out**2), seen

    (_, seen), grads = jax.value_and_grad(loss, has_aux=True)(parameters)
    leaves = jax.tree.leaves(grads)
    assert all(np.isfinite(grad).all() for grad in leaves) and any(np.abs(grad).max() > 0 for grad in leaves)
    assert seen.count.shape == (3, 4, 16) and np.allclose(seen.count.sum(-1), 44)
    assert not any("predictor" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(grads))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(side_info="token-ids"), "side_info is token-ids, which only a predictor makes use of"),
        (dict(predictor="cubic"), "predictor is 'cubic'; it must be one of none, diagonal, low-rank, linear"),
        (dict(predictor="low-rank", rank=0), "rank is 0; it must be a whole number of at least 1"),
    ],
)
def test_configurations_that_do_not_fit(unchecked, values, message):
    with pytest.raises(AstraError, match=message):
        AstraConfig(**values)


@pytest.mark.slow
def test_the_verbs(tmp_path, tiny_gpt2, word_tokenizer):
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
        *("calibrate", tmp_path / "original", codes, *data, *few, "--codec", "rotated-pq"),
        *("--predictor", "linear", "--side-info", "token-ids"),
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
    call("run", tuned, "--prompt", "w1 w2 w3 w4", "--devices", 2, "--max-new-tokens", 2)
    # The first block sends no codes, so that it has no packets to lose.
    lossy = [
        call("eval", tuned, *data, "--length", 32, "--limit", 1, "--packet", 4, "--seeds", 2, *loss)["rows"][0]
        for loss in (["--loss", 0], ["--loss", 0.5], ["--loss", 0.5, "--lost", "masked"])
    ]
    assert [row["lost"] for row in lossy] == ["predicted", "predicted", "masked"]
    nothing, predicted, masked = (row["perplexity"] for row in lossy)
    assert nothing == pytest.approx(found[0][1]["perplexity"], rel=1e-5)
    assert len({nothing, predicted, masked}) == 3
