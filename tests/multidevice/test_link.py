"""What crosses the link, read from the optimized program: packed codes once per block, and the pooled class state."""

import numpy as np
import pytest

from astra_jax.codecs.config import VQConfig
from astra_jax.codecs.product import VectorQuantizer
from astra_jax.mesh.sharding import Shards, make_mesh
from astra_jax.serving.compile import parallelize
from astra_jax.serving.generate import Generator
from astra_jax.serving.sampling import Draws, Sampling
from eval.cost.hlo import collectives_in


@pytest.mark.parametrize(
    ("N", "data", "astra"),
    [
        (4, 1, VQConfig(groups=4, codewords=1024)),
        (4, 1, VQConfig(groups=1, codewords=8, class_token="single")),
        (4, 2, VQConfig(groups=16, codewords=2, site="kv")),
        pytest.param(8, 1, VQConfig(groups=8, codewords=512, class_token="single"), marks=pytest.mark.slow),
        pytest.param(3, 2, VQConfig(groups=2, codewords=4096), marks=pytest.mark.slow),
        pytest.param(2, 1, VQConfig(groups=1, codewords=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_only_codes_cross_the_link(tiny_vit, rank_coded, N, data, astra):
    model = tiny_vit(astra)
    images_per_device = 3
    program = parallelize(model, make_mesh(N, data)).lower(rank_coded(data * images_per_device))
    gather, reduce = collectives_in(program.compile().as_text())

    bits = model.codec.wire_bits(model.shards(N).sent_slots)
    assert (gather.kind, gather.dtype) == ("all-gather", "u8")
    assert gather.bytes == N * images_per_device * bits / 8
    assert gather.in_loop
    assert gather.trip_count == model.config.num_hidden_layers

    assert (reduce.kind, reduce.dtype) == ("all-reduce", "f32")
    assert reduce.shape == (images_per_device, model.config.hidden_size)
    assert not reduce.in_loop


def check_codes(gather, model, text, N, data):
    """An all-gather of packed codes in every block, of as many bytes as the strategy predicts."""
    bits = model.codec.wire_bits(model.shards(N, text).sent_slots)
    assert (gather.kind, gather.dtype) == ("all-gather", "u8")
    assert gather.bytes == N * len(text.lengths) // data * bits / 8
    assert gather.trip_count == model.config.num_hidden_layers


@pytest.mark.parametrize(
    ("family", "N", "data", "site"),
    [
        ("tiny_gpt2", 4, 1, "hidden"),
        pytest.param("tiny_gpt2", 2, 2, "kv", marks=pytest.mark.slow),
        ("tiny_llama", 3, 2, "kv"),
        pytest.param("tiny_llama", 8, 1, "hidden", marks=pytest.mark.slow),
    ],
)
def test_a_language_model_sends_codes_alone(request, random_text, family, N, data, site):
    """Not even its results: every device has the logits of its own tokens."""
    model, text = (
        request.getfixturevalue(family)(VQConfig(groups=4, codewords=8, site=site)),
        random_text(23, 2, 7, 1),
    )
    (gather,) = collectives_in(parallelize(model, make_mesh(N, data)).lower(text).compile().as_text())
    check_codes(gather, model, text, N, data)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("tiny_bert", {"pooling": "class"}),
        pytest.param("tiny_bert", {"pooling": "mean"}, marks=pytest.mark.slow),
        pytest.param("tiny_llama", {"task": "classification"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_text_is_pooled_once(request, random_text, family, options):
    model, text = (
        request.getfixturevalue(family)(VQConfig(groups=4, codewords=8), **options),
        random_text(23, 2, 7, 1),
    )
    gather, reduce = collectives_in(parallelize(model, make_mesh(4, 2)).lower(text).compile().as_text())
    check_codes(gather, model, text, N=4, data=2)
    assert (reduce.kind, reduce.dtype, reduce.shape, reduce.in_loop) == ("all-reduce", "f32", (2, 16), False)


def test_generation_sends_codes_in_prefill_and_nothing_after_it(tiny_llama, random_text):
    """Nor do devices of different rows of the mesh send each other anything."""
    model, text, data = tiny_llama(VQConfig(groups=4, codewords=8, site="kv")), random_text(23, 2, 7, 1), 2
    generator = Generator(model, make_mesh(4, data))
    prefill = generator._prefill.lower(generator.state, text).compile()
    (gather,) = collectives_in(prefill.as_text())
    check_codes(gather, model, text, 4, data)

    fresh = generator.prefill(text)
    sampling = Draws.of([Sampling(temperature=1.0, top_k=5, top_p=0.9)] * 4)
    slots = np.arange(4, dtype=np.int32) % (4 // data)
    M, R = fresh[1].room
    rows = generator.enter(None, fresh, sampling, slots, work=2, count=4, room=(M + 4, R))
    enter = generator._enter.lower(rows, fresh, sampling, slots, 2, count=4, room=(M + 4, R)).compile()
    decode = generator._decode.lower(generator.end_state, rows, 2).compile()
    assert collectives_in(enter.as_text()) == collectives_in(decode.as_text()) == []


@pytest.mark.parametrize(("N", "data"), [(1, 1), (1, 4)])
def test_nothing_crosses_the_link_where_tokens_stay_together(tiny_vit, rank_coded, N, data):
    program = parallelize(tiny_vit(VQConfig(groups=4, codewords=16)), make_mesh(N, data)).lower(rank_coded(4))
    assert collectives_in(program.compile().as_text()) == []


def test_vit_base_of_the_paper():
    """10 bits, G = 32: 49 tokens on each of 4 devices are 1960 bytes per block, 76.8 times less than float32."""
    codec = VectorQuantizer(VQConfig(groups=32, codewords=1024), 768)
    bits = codec.wire_bits(Shards.split(196, 4, "distributed").sent_slots)
    assert bits == 8 * 1960
    np.testing.assert_allclose(49 * 768 * 32 / bits, 76.8)
