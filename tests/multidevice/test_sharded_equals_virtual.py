"""ASTRA on a mesh computes what virtual shards compute on one device, and one device what a plain model computes.

Images have 25 tokens, which no N but 1 divides, and every patch has a value of its own; texts have different lengths,
also of one token and of fewer than devices. Any misplaced shard shows.
"""

import dataclasses
import itertools

import numpy as np
import pytest
from flax import nnx

from astra_jax.codecs.config import NestedPQConfig, VQConfig
from astra_jax.errors import AstraError
from astra_jax.mesh.sharding import make_mesh
from astra_jax.serving.compile import parallelize
from astra_jax.strategies.base import Single
from tests.helpers.sharded import PICTURE_MODELS, TEXT_MODELS, as_pairs, cases, check, real

HIDDEN, KV, DISTRIBUTED, SINGLE = "hidden", "kv", "distributed", "single"


FAST = [(1, HIDDEN, SINGLE), (2, KV, DISTRIBUTED), (3, HIDDEN, SINGLE), (8, HIDDEN, DISTRIBUTED)]
# Every number of devices meets both sites and both class tokens.
OTHERS = [(1, KV, DISTRIBUTED), (2, HIDDEN, SINGLE), (3, KV, DISTRIBUTED), (8, KV, SINGLE)]
ALL = [*FAST, *OTHERS, (4, HIDDEN, DISTRIBUTED), (4, KV, SINGLE)]


@pytest.mark.parametrize(("N", "site", "class_token"), cases(ALL, FAST))
def test_tokens_over_n_devices(tiny_vit, rank_coded, N, site, class_token):
    check(tiny_vit(VQConfig(groups=4, codewords=16, site=site, class_token=class_token)), rank_coded(2), N)


FAST_PICTURES = [
    ("deit", 3, HIDDEN, DISTRIBUTED),
    ("deit", 2, KV, SINGLE),
    ("dinov2 classifier", 3, KV, DISTRIBUTED),
    ("siglip", 3, HIDDEN, SINGLE),
]
# Every model meets every number of devices, both class tokens, and both sites.
EVERY_PICTURE = [
    (name, N, (HIDDEN, KV)[n % 2], (DISTRIBUTED, SINGLE)[(n + m) % 2])
    for (n, name), (m, N) in itertools.product(enumerate(PICTURE_MODELS), enumerate((1, 2, 3, 4, 8)))
]
ALL_PICTURES = list(dict.fromkeys(FAST_PICTURES + EVERY_PICTURE))


@pytest.mark.parametrize(("name", "N", "site", "class_token"), cases(ALL_PICTURES, FAST_PICTURES))
def test_other_models_of_pictures(request, rank_coded, name, N, site, class_token):
    fixture, options = PICTURE_MODELS[name]
    astra = VQConfig(groups=4, codewords=16, site=site, class_token=class_token)
    check(request.getfixturevalue(fixture)(astra, **options), rank_coded(2), N)


ONE_LEVEL = NestedPQConfig(groups=3, codewords=16, widths=(1, 3, 4), levels=(3,))
NESTED = NestedPQConfig(groups=3, codewords=16, widths=(8, 2, 5), levels=(1, 2))


@pytest.mark.parametrize(
    ("family", "astra", "N", "site"),
    [
        ("tiny_vit", ONE_LEVEL, 4, HIDDEN),
        ("tiny_gpt2", NESTED, 3, HIDDEN),
        ("tiny_llama", NESTED, 4, KV),
        pytest.param("tiny_llama", ONE_LEVEL, 2, HIDDEN, marks=pytest.mark.slow),
        pytest.param("tiny_bert", NESTED, 8, HIDDEN, marks=pytest.mark.slow),
        pytest.param("tiny_vit", ONE_LEVEL, 2, KV, marks=pytest.mark.slow),
    ],
)
def test_codecs_with_axes_of_their_own(request, rank_coded, random_text, family, astra, N, site):
    inputs = rank_coded(2) if family == "tiny_vit" else random_text(23, 1, 2, 7, 24)
    check(request.getfixturevalue(family)(dataclasses.replace(astra, site=site)), inputs, N)


# Name -> fixture, class token, and values of the configuration.
MESHES = ((1, 2), (2, 1), (3, 2), (4, 2), (8, 1))  # N, and batches
FAST_TEXT = [
    ("gpt2", 4, 2, HIDDEN),
    ("gpt2", 8, 1, KV),
    ("llama", 3, 2, KV),
    ("llama classifier", 4, 2, KV),
    ("bert mean", 4, 2, KV),
    ("bert distributed", 3, 2, HIDDEN),
    ("roberta", 2, 1, KV),
    ("mpnet single", 4, 2, HIDDEN),
]
# Every model meets every other mesh and both sites, every mesh both sites.
PAIRS = [
    (name, *mesh, (HIDDEN, KV)[(n + m) // 2 % 2])
    for (n, name), (m, mesh) in itertools.product(enumerate(TEXT_MODELS), enumerate(MESHES))
    if (n + m) % 2 == 0
]
ALL_TEXT = list(dict.fromkeys(FAST_TEXT + PAIRS))


def make_text_model(request, name, site=HIDDEN):
    fixture, class_token, options = TEXT_MODELS[name]
    astra = VQConfig(groups=4, codewords=16, site=site, class_token=class_token)
    return request.getfixturevalue(fixture)(astra, **options)


@pytest.mark.parametrize(("name", "N", "data", "site"), cases(ALL_TEXT, FAST_TEXT))
def test_texts_of_different_lengths(request, random_text, name, N, data, site):
    model = make_text_model(request, name, site)
    check(model, as_pairs(model, random_text(23, 1, 2, 7, 24)), N, data)


@pytest.mark.parametrize("name", cases([(name,) for name in TEXT_MODELS], [("gpt2",)]))
def test_one_device_is_the_plain_model_bit_for_bit(request, random_text, name):
    model, text = make_text_model(request, name), random_text(23, 1, 2, 7, 24)

    @nnx.jit
    def plain(model, text):
        return model(model.to_tokens(text), Single(model.shards(1, text)))[0]

    on_mesh = parallelize(model, make_mesh(1))(text)
    np.testing.assert_array_equal(real(model, text, on_mesh), real(model, text, plain(model, text)))


@pytest.mark.parametrize(
    ("data", "N", "B"),
    [
        (2, 4, 3),
        pytest.param(2, 2, 4, marks=pytest.mark.slow),
        pytest.param(4, 2, 1, marks=pytest.mark.slow),
        pytest.param(8, 1, 5, marks=pytest.mark.slow),
    ],
)
def test_batch_and_tokens_at_once(tiny_vit, rank_coded, data, N, B):
    """Also batches that the data axis does not divide."""
    check(tiny_vit(VQConfig(groups=4, codewords=16)), rank_coded(B), N, data)


def test_a_shard_per_token(tiny_vit, rank_coded):
    """Four tokens: one on each of four devices, and too few for eight."""
    model = tiny_vit(VQConfig(groups=4, codewords=16), patch_size=10)
    check(model, rank_coded(1), 4)
    with pytest.raises(AstraError, match="4 tokens cannot be split over 8 devices"):
        parallelize(model, make_mesh(8))


def test_several_devices_need_codebooks(tiny_vit, tiny_llama, rank_coded):
    model = tiny_vit()
    for without in (model, tiny_llama()):
        with pytest.raises(AstraError, match="no codebooks"):
            parallelize(without, make_mesh(2))
    check(model, rank_coded(3), 1, data=2)
