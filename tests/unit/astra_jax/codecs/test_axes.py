"""The codec `nested-pq`: its axes against what they are for, groups that are a code by themselves, and the verbs."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import checkpoints
from astra_jax.codecs.axes import axis_bits, candidates, codeword_spread, pack, principal_axes
from astra_jax.codecs.config import NestedPQConfig, VQConfig, doubling
from astra_jax.codecs.nested import NestedQuantizer, padded, unpadded
from astra_jax.errors import AstraError
from astra_jax.models.blocks import block_at
from train.calibrate import axis_variances, choose, distance, head_input
from train.fit_codecs import fit, key_value_metric
from train.kmeans import kmeans

WIDTHS = (1, 2, 4)


def skewed(M=2000, W=8, seed=0):
    """Correlated vectors, some directions of which vary far more than others."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(M, W)) * 2.0 ** -np.arange(W)) @ rng.normal(size=(W, W)) + rng.normal(size=W)


def random_metric(W=8, rank=8):
    a = np.random.default_rng(1).normal(size=(W, rank))
    return a @ a.T


# Axes


@pytest.mark.parametrize("rank", [8, 3], ids=["all seen", "some not seen"])
def test_axes_are_uncorrelated_and_their_error_is_that_of_the_metric(rank):
    y, metric = skewed(), random_metric(rank=rank)
    axes = principal_axes(y, metric)
    u = (y - axes.mean) @ axes.analysis
    np.testing.assert_allclose(np.cov(u, rowvar=False, bias=True), np.diag(axes.variance), atol=1e-8)
    assert (np.diff(axes.variance) <= 1e-12).all()
    coarse = np.round(u)
    error = y - axes.mean - coarse @ axes.synthesis
    seen = slice(0, rank)  # what lies along the others costs nothing
    expected = ((u - coarse)[:, seen] ** 2).sum(1)
    np.testing.assert_allclose(np.einsum("mi,ij,mj->m", error, metric, error), expected, rtol=1e-6, atol=1e-6)


def test_all_axes_give_the_vector_back_and_the_first_ones_the_best_linear_estimate():
    y = skewed()
    axes = principal_axes(y, random_metric())
    u = (y - axes.mean) @ axes.analysis
    np.testing.assert_allclose(axes.mean + u @ axes.synthesis, y, atol=1e-6)
    best = np.linalg.lstsq(u[:, :3], y - axes.mean, rcond=None)[0]
    np.testing.assert_allclose(axes.synthesis[:3], best, atol=1e-6)


@pytest.mark.parametrize("site", ["hidden", "kv"])
def test_the_metric_is_the_error_of_keys_and_values(tiny_llama, site):
    attention = block_at(tiny_llama(VQConfig(groups=2, codewords=16, site=site)).blocks, 0).attention
    metric = key_value_metric(attention)
    e = np.random.default_rng(2).normal(size=len(metric)).astype(np.float32)
    key_value = [e] if site == "kv" else [e @ layer.kernel[...] for layer in (attention.k, attention.v)]
    np.testing.assert_allclose(e @ metric @ e, sum(float((x**2).sum()) for x in key_value), rtol=1e-5)


# Bits


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30), st.floats(0.5, 300.0))
def test_water_filling_gives_out_all_bits_and_more_where_more_varies(variance, total):
    variance = np.asarray(variance)
    bits = axis_bits(variance, total)
    np.testing.assert_allclose(bits.sum(), total, rtol=1e-6)
    assert (bits >= 0).all()
    order = np.argsort(variance)
    assert (np.diff(bits[order]) >= -1e-9).all()


@given(st.integers(1, 12), st.lists(st.floats(0, 10), min_size=12, max_size=40))
def test_every_group_gets_axes_and_no_axis_is_lost(G, bits):
    bits = np.sort(np.asarray(bits))[::-1]
    widths = pack(bits, G)
    assert len(widths) == G and min(widths) >= 1
    assert sum(widths) == max(G, (bits > 0).sum())


@given(st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=30), st.integers(1, 12))
def test_codewords_spread_as_far_as_their_bits_say(variance, bits):
    """Along an axis of b bits `sqrt(1 - 4^-b)` as far as vectors, so that the vectors' variance is what codewords have
    and what the code loses."""
    variance = np.asarray(variance, np.float32)
    spread = codeword_spread(variance, bits)
    assert np.all((spread >= 0) & (spread <= 1))
    if variance.min() > 0:
        lost = 1 - spread.astype(np.float64) ** 2
        np.testing.assert_allclose(-np.log2(np.maximum(lost, 1e-30)).sum() / 2, bits, rtol=1e-3)


def test_few_bits_for_many_axes():
    """K-means that starts from vectors as they are finds codewords that serve one vector each."""
    y = jnp.asarray(np.random.default_rng(3).normal(size=(2048, 1, 64)).astype(np.float32))
    shrink = jnp.asarray(codeword_spread(np.asarray(y[:, 0].var(0)), 7)[None], jnp.float32)
    as_they_are, shrunk = (kmeans(y, 128, 12, jax.random.key(0), by) for by in (None, shrink))
    assert int((as_they_are.count <= 1).sum()) > 40 and int((shrunk.count <= 1).sum()) < 20
    lost = [float(jnp.mean((found.estimate - y) ** 2)) for found in (as_they_are, shrunk)]
    assert lost[1] < 0.98 * lost[0]


def test_groups_have_about_as_many_bits():
    bits = axis_bits(2.0 ** -np.arange(40.0), 40.0)
    widths = pack(bits, 4)
    shares = [part.sum() for part in np.split(bits[: sum(widths)], np.cumsum(widths)[:-1])]
    assert max(shares) - min(shares) < 2 * bits.max() and widths[0] < widths[-1]


def test_more_groups_than_axes():
    with pytest.raises(AstraError, match="groups is 9, more than the quantized width 8: use at most 8"):
        pack(np.ones(8), 9)


def test_groups_are_padded_with_zeros():
    found = padded(jnp.arange(1.0, 17.0).reshape(2, 8), WIDTHS)
    assert found[0].tolist() == [1, 0, 0, 0, 2, 3, 0, 0, 4, 5, 6, 7]
    assert unpadded(found, WIDTHS, 8)[1].tolist() == [9, 10, 11, 12, 13, 14, 15, 0], "the last axis is in no group"


def test_levels_double():
    found = {G: doubling(G) for G in (1, 2, 4, 6, 32)}
    assert found == {1: (1,), 2: (1, 1), 4: (1, 1, 2), 6: (1, 1, 2, 2), 32: (1, 1, 2, 4, 8, 16)}


# The codec


@pytest.fixture(scope="module")
def fitted(tiny_gpt2, random_text):
    """Two tiny models with codes for the same activations: one level, and as the paper does; and their errors."""
    y = np.stack([skewed(W=16, seed=seed) for seed in range(2)]).astype(np.float32)
    y = y / y.std()
    plain = tiny_gpt2(VQConfig(groups=4, codewords=16))
    source = checkpoints.Checkpoint("gpt2", plain.config, None, None, None, {}, "float32", (), tiny_gpt2())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("astra_jax.codecs.axes.SPREADS", (1.0,))
        (widths,) = candidates(axis_variances(source, plain.astra, y), (4,), 16)
    astra = NestedPQConfig.of(plain.astra, widths, (4,))
    made = checkpoints.with_codebooks(source, astra)
    errors = [fit(model, y, 8, 0) for model in (made.model, plain)]
    return made, astra, y, errors


def test_keys_and_values_are_closer_than_with_equal_groups(fitted):
    ours, theirs = fitted[-1]
    assert all(a.key_value < 0.8 * b.key_value for a, b in zip(ours, theirs, strict=True))


def test_the_codec_is_as_its_configuration_says(fitted):
    made, astra, *_ = fitted
    assert astra.codec == "nested-pq" and astra.levels == (4,) and len(astra.widths) == 4 and sum(astra.widths) <= 16
    assert made.astra == astra and isinstance(made.model.codec, NestedQuantizer)
    assert made.model.codec.wire_bits(6) == 6 * 4 * 4


@pytest.mark.slow
def test_the_first_groups_are_a_coarser_code(fitted, tmp_path):
    made, astra, y, _ = fitted
    checkpoints.save(tmp_path / "all", made)
    errors = []
    for m in (1, 2, 4):
        few = checkpoints.load(tmp_path / "all", groups=m)
        assert few.astra.widths == astra.widths[:m] and few.model.astra == few.astra
        part, whole = (block_at(model.blocks, 1).attention.codec for model in (few.model, made.model))

        @nnx.jit
        def run(part, whole, x, m=m):
            codes, z = part.encode(x), whole.encode(x)
            inside = np.arange(whole.width) < sum(astra.widths[:m])
            same = (
                whole.decode(z, jnp.asarray(m)),
                whole.from_coordinates(jnp.where(inside, whole.coordinates(z), 0)),
                whole.straight_through(x, z, jax.random.key(0), 0.0, jnp.asarray(m)),
            )
            return codes, z, part.decode(codes), same

        codes, z, decoded, same = run(part, whole, y[1][None])
        np.testing.assert_array_equal(codes, z[..., :m])
        for found in same:
            np.testing.assert_allclose(found, decoded, atol=1e-5)
        errors.append(np.mean((np.asarray(decoded) - y[1]) ** 2))
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(groups=2), "widths is \\(\\); 2 groups have one for each"),
        (dict(groups=1, widths=(0,), levels=(1,)), "whole numbers of at least 1"),
        (dict(groups=2, widths=(1, 1), levels=(1,)), "levels is \\(1,\\); 2 groups have as many together"),
        (dict(groups=1, widths=1), "widths is 1; 1 groups have one for each"),
        (dict(groups=1, widths=(1,), levels="a"), "levels is 'a'; 1 groups have as many together"),
    ],
)
def test_configurations_that_do_not_fit(unchecked, values, message):
    with pytest.raises(AstraError, match=message):
        NestedPQConfig(**values)


def test_axes_that_do_not_fit_the_width():
    astra = NestedPQConfig(groups=2, widths=(8, 9), levels=(2,))
    with pytest.raises(AstraError, match="17 axes together, more than the quantized width 16"):
        NestedQuantizer(astra, 16)
    with pytest.raises(AstraError, match="groups is 3; these codes have 2"):
        astra.with_groups(3)


def test_training_leaves_axes_as_they_are_and_moves_codewords(fitted):
    made, _, y, _ = fitted
    codec = block_at(nnx.clone(made.model).blocks, 0).attention.codec
    (level,) = codec.levels
    before = level.codebook[...], codec.analysis[...]

    @nnx.jit
    def follow(codec, x):
        seen = codec.observe(x, codec.encode(x), jax.random.key(0), jnp.ones((1, x.shape[1]), bool))
        codec.follow(seen, 0.9, 0.0)

    follow(codec, y[0][None] + np.float32(0.1))
    assert not np.allclose(level.codebook[...], before[0])
    np.testing.assert_array_equal(codec.analysis[...], before[1])
    padding = np.asarray(level.codebook[...])[0, :, made.astra.widths[0] :]
    assert not padding.any()


def test_the_distance_to_one_device(tiny_gpt2, random_text):
    """Nothing where all codewords are exact, and more where they are further off."""
    text, model = random_text(24, 20), tiny_gpt2(VQConfig(groups=4, codewords=16))
    found = [distance(head_input(model, text, 1), head_input(model, text, N)) for N in (1, 4)]
    assert found[0] == 0 < found[1]


# Levels


@pytest.fixture(scope="module")
def nested(tiny_gpt2, random_text):
    """A tiny model whose codes of 4 groups have levels of 1, 1 and 2, and what it was calibrated with."""
    y = np.stack([skewed(W=16, seed=seed) for seed in range(2)]).astype(np.float32)
    y = y / y.std()
    source = checkpoints.Checkpoint("gpt2", tiny_gpt2().config, None, None, None, {}, "float32", (), tiny_gpt2())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("astra_jax.codecs.axes.SPREADS", (1.0,))
        astra = choose(source, [VQConfig(groups=4, codewords=16)], "nested-pq", y, random_text(24, 20), 0)
    made = checkpoints.with_codebooks(source, astra)
    fit(made.model, y, 8, 0)
    return made, y


def test_every_level_codes_what_those_before_it_left(nested):
    made, y = nested
    codec = block_at(made.model.blocks, 1).attention.codec
    assert made.astra.levels == (1, 1, 2) and [len(widths) for widths in codec.widths] == [1, 1, 2]
    assert sum(codec.widths[0]) == sum(codec.widths[1]) == sum(codec.widths[2]) == codec.width

    @nnx.jit
    def run(codec, x):
        z = codec.encode(x)
        return codec.axes(x), z, codec.coordinates(z)

    u, z, found = map(np.asarray, run(codec, y[1]))
    left, codes = u, []
    for level, widths, places in codec.each():
        C, ends, estimate = np.asarray(level.codebook[...]), np.cumsum((0, *widths)), np.zeros_like(left)
        for g, (start, end) in enumerate(itertools.pairwise(ends)):
            distances = ((left[:, None, start:end] - C[g, :, : end - start]) ** 2).sum(-1)
            codes.append(distances.argmin(-1))
            estimate[:, start:end] = C[g, codes[-1], : end - start]
        np.testing.assert_array_equal(z[:, places], np.stack(codes[places], axis=-1))
        left = left - estimate
    np.testing.assert_allclose(found, u - left, atol=1e-4)


@pytest.mark.slow
def test_the_first_level_is_as_good_as_a_codec_of_its_own(nested, tmp_path):
    """And more groups are better ones."""
    made, y = nested
    checkpoints.save(tmp_path / "all", made)
    alone = checkpoints.with_codebooks(made, dataclasses.replace(made.astra.with_groups(1), levels=(1,)))
    first = fit(alone.model, y, 8, 0)
    errors = []

    @nnx.jit
    def run(part, whole, x, m):
        codes, z = part.encode(x), whole.encode(x)
        return codes, z, part.decode(codes), whole.decode(z, m)

    for m in (1, 2, 3, 4):
        few = checkpoints.load(tmp_path / "all", groups=m)
        part, whole = (block_at(model.blocks, 1).attention.codec for model in (few.model, made.model))
        codes, z, decoded, expected = run(part, whole, y[1], m)
        np.testing.assert_array_equal(codes, z[..., :m])
        np.testing.assert_allclose(decoded, expected, atol=1e-5)
        errors.append(np.mean((np.asarray(decoded) - y[1]) ** 2) / y[1].var(0).mean())
    assert errors[0] == pytest.approx(first[1].vector, rel=0.05)
    assert errors == sorted(errors, reverse=True) and errors[3] < 0.7 * errors[0]


def test_noise_is_what_the_last_used_group_of_an_axis_leaves(nested):
    codec = block_at(nested[0].model.blocks, 0).attention.codec
    noise = nnx.jit(lambda codec, m: codec.noise(jax.random.key(0), (20_000, codec.width), m))
    for m, used in ((1, 0), (2, 1), (4, 2)):
        level, widths, _ = codec.each()[used]
        xi = np.asarray(noise(codec, m))
        std = unpadded(jnp.sqrt(level.residual_var[...]), widths, codec.width)
        np.testing.assert_allclose(xi.std(0), std, rtol=0.05)


def test_a_predictor_serves_all_numbers_of_levels(nested, monkeypatch):
    """It is found from estimates of one to all levels, and so is better for one than if it were found from all."""
    made, y = nested
    y = np.stack([y[0], (y[0] @ np.random.default_rng(0).normal(size=(16, 16))).astype(np.float32) + 0.1 * y[1]])
    astra = dataclasses.replace(made.astra, predictor="linear")

    @nnx.jit
    def second_estimate(model):
        estimate = jnp.zeros((1, 16))
        for number in (0, 1):
            codec = block_at(model.blocks, number).attention.codec
            p = codec.expect(estimate, jnp.asarray)
            estimate = p + codec.decode(codec.encode(y[number] - p), jnp.asarray(1))
        return estimate

    def error_of_one_group() -> float:
        model = checkpoints.with_codebooks(made, astra).model
        fit(model, y, 8, 0)
        return float(np.mean((np.asarray(second_estimate(model)) - y[1]) ** 2) / y[1].var())

    mixed = error_of_one_group()
    monkeypatch.setattr(jax.random, "randint", lambda key, shape, low, high: jnp.full(shape, high - 1))
    assert mixed < 0.95 * error_of_one_group()
