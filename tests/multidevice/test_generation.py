"""Generation on a mesh: decoding from the last shard's cache equals computing everything anew at every step."""

import itertools

import numpy as np
import pytest

from astra_jax.codecs.config import VQConfig
from astra_jax.inputs.token_batches import Text
from astra_jax.mesh.sharding import make_mesh
from astra_jax.serving.batch import Batch
from astra_jax.serving.generate import Generator
from astra_jax.serving.sampling import Sampling
from tests.helpers.sharded import STEPS, decode, recompute, tokens

MESHES = ((1, 1), (2, 1), (4, 1), (2, 2))
EVERY = [
    *itertools.product(("tiny_gpt2", "tiny_llama"), MESHES, ("hidden", "kv")),
    *(("tiny_gemma3", mesh, ("kv", "hidden")[n % 2]) for n, mesh in enumerate(MESHES)),
]
FAST = [
    ("tiny_gpt2", (4, 1), "kv"),
    ("tiny_llama", (2, 2), "hidden"),
    ("tiny_gemma3", (2, 1), "hidden"),
]


@pytest.mark.parametrize(
    ("family", "mesh", "site"),
    [
        pytest.param(*case, id="-".join(map(str, case)), marks=[] if case in FAST else pytest.mark.slow)
        for case in EVERY
    ],
)
def test_decoding_equals_recomputing_every_step(request, random_text, family, mesh, site):
    """For prompts of one token, of fewer than devices, and of different lengths in one batch."""
    astra = VQConfig(groups=4, codewords=16, site=site)
    model, text = request.getfixturevalue(family)(astra), random_text(23, 1, 2, 7)
    generator = Generator(model, make_mesh(*mesh))
    new = tokens(generator, text, Sampling(temperature=3.0))
    assert len(np.unique(new)) > STEPS  # it does not say the same all the time
    np.testing.assert_allclose(decode(generator, text, new), recompute(model, text, new, mesh[0]), rtol=1e-5, atol=1e-5)
    greedy = tokens(generator, text, Sampling())
    np.testing.assert_array_equal(greedy, recompute(model, text, greedy, mesh[0]).argmax(-1))


def test_a_batch_that_the_data_axis_does_not_divide(tiny_llama, random_text):
    generator = Generator(tiny_llama(VQConfig(groups=4, codewords=16)), make_mesh(2, 2))
    text = random_text(23, 1, 2, 7)
    four = tokens(generator, text, Sampling())
    three = tokens(generator, Text(text.ids[:3], text.lengths[:3]), Sampling())
    np.testing.assert_array_equal(three, four[:3])


def test_the_cache_keeps_remote_tokens_as_codes(tiny_llama, random_text):
    model, text = tiny_llama(VQConfig(groups=4, codewords=16)), random_text(23, 1)
    spread = Batch(Generator(model, make_mesh(4)), 2)
    spread.enter(text, [2, 2], [Sampling()] * 2)
    L, B, R, G, J, E = 2, 2, 3 * 6, 4, 2, 4  # 24 slots on 4 devices are 6 each, of which 3 devices are remote
    assert spread.memory.codes == L * B * R * G * 2
    assert spread.memory.key_value == 2 * L * B * R * J * E * 4

    alone = Batch(Generator(model, make_mesh(1)), 2)
    alone.enter(text, [2, 2], [Sampling()] * 2)
    assert alone.memory == (0, 0)
