"""Rotary embeddings: what holds for every type. Their numbers are compared in tests/parity."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from astra_jax.errors import AstraError
from astra_jax.models.llama import LlamaConfig
from astra_jax.models.rotary import ROPE_TYPES, Rotary, by_block

E = 8
ROTARIES = {
    "default": Rotary(),
    "dynamic": Rotary("dynamic", factor=2.0),
    "linear": Rotary("linear", factor=4.0),
    "llama3": Rotary("llama3", factor=8.0, original_max_position_embeddings=64),
    "longrope": Rotary("longrope", factor=4.0, original_max_position_embeddings=64, short_factor=(1.0, 1.5, 2.0, 4.0)),
    "yarn": Rotary("yarn", factor=4.0, original_max_position_embeddings=64),
}
turn = jax.jit(lambda rotary, x, position: rotary(x, position), static_argnums=0)


def test_there_is_a_case_of_every_type():
    assert set(ROTARIES) == set(ROPE_TYPES)


def random_heads(seed, R):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(1, R, 2, E)), jnp.float32)


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
@given(seed=st.integers(0, 99), positions=st.lists(st.integers(0, 200), min_size=3, max_size=3))
def test_turning_keeps_lengths(rope_type, seed, positions):
    """But for the one factor that YaRN and LongRoPE have for all."""
    rotary, x = ROTARIES[rope_type], random_heads(seed, 3)
    turned = turn(rotary, x, jnp.asarray(positions))
    expected = rotary.scale * jnp.linalg.norm(x, axis=-1)
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), expected, rtol=1e-5)
    assert (rotary.scale != 1) == (rope_type in ("longrope", "yarn"))


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
@given(seed=st.integers(0, 99), a=st.integers(0, 200), b=st.integers(0, 200), shift=st.integers(0, 200))
def test_a_score_depends_on_the_distance_alone(rope_type, seed, a, b, shift):
    rotary, x = ROTARIES[rope_type], random_heads(seed, 2)

    def scores(*positions):
        query, key = turn(rotary, x, jnp.asarray(positions))[0]
        return (query * key).sum(-1)

    np.testing.assert_allclose(scores(a, b), scores(a + shift, b + shift), atol=2e-4)
    if a != b:
        assert np.abs(scores(a, b) - scores(a, a)).max() > 1e-6


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_the_first_position_is_not_turned(rope_type):
    x = random_heads(0, 1)
    np.testing.assert_allclose(
        turn(ROTARIES[rope_type], x, jnp.zeros(1, int)), ROTARIES[rope_type].scale * x, rtol=1e-6
    )


def test_every_sequence_may_have_positions_of_its_own():
    x = random_heads(0, 3)
    positions = np.asarray([[0, 5, 9], [7, 7, 1]])
    both = turn(Rotary(), jnp.concatenate([x, x]), jnp.asarray(positions))
    for row, alone in zip(both, positions, strict=True):
        np.testing.assert_allclose(row, turn(Rotary(), x, jnp.asarray(alone))[0], atol=1e-6)


@given(st.integers(0, 200))
def test_linear_scaling_divides_positions(position):
    x = random_heads(0, 1)
    scaled = turn(ROTARIES["linear"], x, jnp.asarray([position], jnp.float32))
    np.testing.assert_allclose(scaled, turn(Rotary(), x, jnp.asarray([position / 4.0])), atol=1e-5)


@pytest.mark.parametrize("rope_type", ["llama3", "yarn"])
def test_fast_dimensions_are_kept_and_slow_ones_divided(rope_type):
    """A head wide enough to have both, and some between."""
    rotary = dataclasses.replace(ROTARIES[rope_type], original_max_position_embeddings=4096)
    plain, scaled = Rotary().frequencies(128), rotary.frequencies(128)
    ratio = plain / scaled
    np.testing.assert_allclose((ratio[0], ratio[-1]), (1, rotary.factor), rtol=1e-6)
    assert (np.diff(ratio) >= -1e-5).all()
    assert ((ratio > 1.01) & (ratio < rotary.factor - 0.01)).any()


def test_what_has_no_scaling_is_plain():
    plain = Rotary().frequencies(E)
    np.testing.assert_allclose(plain, 10_000.0 ** (-np.arange(0, E, 2) / E), rtol=1e-6)
    np.testing.assert_array_equal(Rotary("dynamic", factor=3.0).frequencies(E), plain)
    unscaled = Rotary("llama3", factor=1.0, original_max_position_embeddings=64).frequencies(E)
    np.testing.assert_allclose(unscaled, plain, rtol=1e-6)


def test_a_part_of_a_head_is_turned_as_a_head_of_that_width():
    x = random_heads(0, 3)
    turned = turn(Rotary(partial_rotary_factor=0.5), x, jnp.arange(3))
    np.testing.assert_array_equal(turned[..., E // 2 :], x[..., E // 2 :])
    np.testing.assert_allclose(turned[..., : E // 2], turn(Rotary(), x[..., : E // 2], jnp.arange(3)), atol=1e-6)


def test_every_block_may_have_one_of_its_own():
    kinds, x = (Rotary(), None, ROTARIES["yarn"]), random_heads(0, 3)
    for number, kind in enumerate(kinds):
        turned = by_block(kinds)(x, jnp.arange(3), jnp.int32(number))
        np.testing.assert_allclose(turned, x if kind is None else turn(kind, x, jnp.arange(3)), atol=1e-6)
    assert by_block((Rotary(),) * 3) == Rotary()


def test_bfloat16_stays_bfloat16():
    assert Rotary()(random_heads(0, 2).astype(jnp.bfloat16), jnp.arange(2)).dtype == jnp.bfloat16


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rope_type": "ntk"}, "rope_type is 'ntk'; known are default, dynamic, linear, llama3, longrope, yarn"),
        ({"rope_type": "longrope"}, "rope_type longrope needs original_max_position_embeddings"),
        (
            LONGROPE | {"short_factor": (1.0, float("nan"))},
            "a short_factor or long_factor of the rotary embedding is not",
        ),
        (LONGROPE | {"long_factor": (0.0,)}, "a short_factor or long_factor of the rotary embedding is not above 0"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor of the rotary embedding is 1.5; it must be above 0"),
        ({"rope_theta": 0.0}, "rope_theta of the rotary embedding is 0.0; it must be above 1 and at most 1e+15"),
        ({"rope_theta": float("nan")}, "rope_theta of the rotary embedding is nan; it must be above 1"),
        ({"rope_theta": float("inf")}, "rope_theta of the rotary embedding is inf; it must be above 1"),
        ({"rope_type": "linear", "factor": -2.0}, "factor of the rotary embedding is -2.0; it must be above 1e-06"),
        ({"rope_type": "linear", "factor": 1e-300}, "factor of the rotary embedding is 1e-300; it must be above"),
        (YARN | {"beta_fast": 0.0}, "beta_fast of the rotary embedding is 0.0; it must be above 1e-06"),
        (YARN | {"beta_slow": 1e-308}, "beta_slow of the rotary embedding is 1e-308; it must be above 1e-06"),
        (YARN | {"attention_factor": float("-inf")}, "attention_factor of the rotary embedding is -inf"),
        (YARN | {"mscale": float("nan")}, "mscale of the rotary embedding is nan"),
        (YARN | {"original_max_position_embeddings": 10**12}, "is 1000000000000; it must be above -1 and at most"),
        ({"rope_type": "llama3"}, "rope_type llama3 needs original_max_position_embeddings"),
        ({"rope_type": "yarn"}, "rope_type yarn needs original_max_position_embeddings"),
        (
            {"rope_type": "llama3", "original_max_position_embeddings": 64, "low_freq_factor": 4.0},
            "low_freq_factor is 4.0 and high_freq_factor 4.0; the second must be greater",
        ),
    ],
)
def test_a_rotary_embedding_that_cannot_be(wrong, message):
    with pytest.raises(AstraError) as raised:
        Rotary(**wrong)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@given(
    theta=st.floats(1.0, 1e15, exclude_min=True),
    factor=st.floats(1e-6, 1e9, exclude_min=True),
    rope_type=st.sampled_from(ROPE_TYPES),
)
def test_whatever_is_allowed_gives_numbers(theta, factor, rope_type):
    rotary = Rotary(rope_type, theta, factor, original_max_position_embeddings=64, short_factor=(factor,) * (E // 2))
    assert np.isfinite(rotary.frequencies(E)).all() and np.isfinite(rotary.scale)


def test_heads_of_an_odd_width_cannot_turn():
    with pytest.raises(AstraError, match="heads are 5 wide; rotary embeddings need an even width"):
        LlamaConfig(head_dim=5)
