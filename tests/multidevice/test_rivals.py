"""The other ways to split a model: sequence and tensor parallelism are exact, block parallelism is what it says."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from astra_jax.codecs.config import VQConfig
from astra_jax.errors import AstraError
from astra_jax.mesh.sharding import SEQ, make_mesh
from astra_jax.models.blocks import block_at
from astra_jax.models.interface import Report
from astra_jax.models.mask import Block
from astra_jax.serving.compile import STRATEGIES, parallelize
from astra_jax.strategies.base import Single
from astra_jax.strategies.rivals import BlockParallel, BlockSequenceParallel, SequenceParallel, TensorParallel
from checkpoints.tensor_maps import build
from eval.cost.traffic import messages
from tests.helpers.sharded import real

# Name -> fixture, and values of the configuration: heads, also those of keys and values, that four devices can share.
MODELS = {
    "vit": ("tiny_vit", {"num_attention_heads": 4}),
    "deit": ("tiny_deit", {"num_attention_heads": 4, "with_teacher": True}),
    "dinov2": ("tiny_dinov2", {"num_attention_heads": 4, "task": "classification"}),
    "siglip": ("tiny_siglip", {"num_attention_heads": 4}),
    "gpt2": ("tiny_gpt2", {"n_head": 4}),
    "gpt2 classifier": ("tiny_gpt2", {"n_head": 4, "task": "classification", "num_labels": 3}),
    "llama": ("tiny_llama", {"num_attention_heads": 8, "num_key_value_heads": 4}),
    "llama classifier": (
        "tiny_llama",
        {"num_attention_heads": 8, "num_key_value_heads": 4, "task": "classification", "num_labels": 3},
    ),
    "bert mean": ("tiny_bert", {"pooling": "mean", "normalize": True}),
    "mpnet": ("tiny_mpnet", {}),
    "bert class": ("tiny_bert", {"pooling": "class", "task": "classification", "num_labels": 3}),
}
PICTURES = ("vit", "deit", "dinov2", "siglip")
FAST = {
    ("vit", "sp", 4),
    ("vit", "tp", 2),
    ("gpt2", "tp", 4),
    ("llama", "sp", 2),
    ("llama", "tp", 4),
    ("bert class", "sp", 4),
    ("bert mean", "tp", 2),
    ("mpnet", "tp", 2),
}


def make_model(request, name, astra=None, **more):
    fixture, options = MODELS[name]
    return request.getfixturevalue(fixture)(astra, **{**options, **more})


@pytest.fixture
def inputs_for(rank_coded, random_text):
    """Images, or texts of different lengths, also of one token."""
    return lambda name: rank_coded(2) if name in PICTURES else random_text(23, 1, 7, 24)


@nnx.jit
def run_single(model, inputs):
    return model(model.to_tokens(inputs), Single.of(model, 1, inputs))[0]


def check_exact(model, inputs, N, make, data=1):
    out = parallelize(model, make_mesh(N, data), make)(inputs)
    expected = run_single(model, inputs)
    np.testing.assert_allclose(real(model, inputs, out), real(model, inputs, expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "strategy", "N"),
    [
        pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow)
        for case in itertools.product(MODELS, ("sp", "tp"), (2, 4))
    ],
)
def test_sequence_and_tensor_parallelism_are_exact(request, inputs_for, name, strategy, N):
    check_exact(make_model(request, name), inputs_for(name), N, STRATEGIES[strategy].of)


@pytest.mark.parametrize(("name", "site"), [("vit", "hidden"), ("llama", "kv")])
@pytest.mark.parametrize("strategy", ["sp", "tp"])
def test_codebooks_do_not_matter_to_them(request, inputs_for, name, site, strategy):
    """Also batches split over devices, and three devices, which divide nothing here but what they share."""
    astra = VQConfig(groups=4, codewords=8, site=site)
    model = make_model(request, name, astra)
    check_exact(model, inputs_for(name), 2, STRATEGIES[strategy].of, data=2)


def test_sequence_parallelism_takes_any_number_of_devices(request, inputs_for):
    check_exact(make_model(request, "vit"), inputs_for("vit"), 3, SequenceParallel.of)


@pytest.mark.parametrize("name", ["vit", "gpt2", pytest.param("llama", marks=pytest.mark.slow)])
@pytest.mark.parametrize("strategy", ["bp-ag", "bp-sp"])
def test_block_parallelism_that_decouples_nothing_is_exact(request, inputs_for, name, strategy):
    def make(model, N, inputs=None):
        return STRATEGIES[strategy].of(model, N, inputs, exchanges=2)

    check_exact(make_model(request, name), inputs_for(name), 4, make)


def sub_block(block, n, N):
    """Part n of N of a block as DeTransformer has it, cut from the block's weights by hand."""
    block = nnx.clone(block)
    D = block.norm1.scale.shape[0]
    mine = slice(n * D // N, (n + 1) * D // N)
    for norm in (block.norm1, block.norm2):
        norm.scale.set_value(norm.scale[mine])
        if getattr(norm, "bias", None) is not None:
            norm.bias.set_value(norm.bias[mine])
    for reader in (block.attention.q, block.attention.k, block.attention.v, block.mlp.up):
        reader.kernel.set_value(reader.kernel[mine])
    for writer in (block.attention.o, block.mlp.down):
        writer.kernel.set_value(writer.kernel[:, mine])
        writer.bias.set_value(writer.bias[mine])
    return block


@pytest.mark.parametrize("name", ["vit", pytest.param("bert mean", marks=pytest.mark.slow)])
@pytest.mark.parametrize("strategy", ["bp-ag", "bp-sp"])
def test_block_parallelism_is_sub_blocks_side_by_side(request, inputs_for, name, strategy):
    """One group of two blocks: four sub-blocks for the first, each on its part of the width, and the second whole."""
    model, inputs, N = make_model(request, name), inputs_for(name), 4
    out = parallelize(model, make_mesh(N), STRATEGIES[strategy].of)(inputs)

    class ByHand(Single):
        def run_blocks(self, step, kinds, carry, xs):
            x, numbers = carry[0], range(2)
            first, second = (block_at(model.blocks, number) for number in numbers)
            parts = jnp.split(x, N, axis=-1)
            parts = [sub_block(first, n, N)(part, self, (), Block(0))[0] for n, part in enumerate(parts)]
            return (second(jnp.concatenate(parts, axis=-1), self, (), Block(1))[0], ()), Report()

    by_hand = nnx.jit(lambda model: model(model.to_tokens(inputs), ByHand(model.shards(1, inputs)))[0])
    expected = by_hand(model)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(run_single(model, inputs) - expected).max() > 1e-2  # it is another model


# Strategy -> bits that a device of four gives to collectives of each kind, per block: two blocks of D=16 in float32.
# An image of 25 patches has a class token and 7 of them in every shard; a text has 6 of 24 tokens.
EXPECTED = {
    ("vit", "sp"): {"all-gather": 2 * 8 * 16 * 32, "all-reduce": 16 * 32},
    ("vit", "tp"): {"all-reduce": 4 * 26 * 16 * 32},
    ("vit", "bp-ag"): {"all-gather": 8 * 16 * 32},
    ("vit", "bp-sp"): {"all-gather": 2 * 8 * 16 * 32, "all-to-all": 8 * 16 * 32},
    ("deit", "sp"): {"all-gather": 2 * 9 * 16 * 32, "all-reduce": 2 * 16 * 32},
    ("siglip", "sp"): {"all-gather": 2 * 7 * 16 * 32 + (16 + 2 * 4) * 32},
    ("llama", "sp"): {"all-gather": 2 * 6 * 16 * 32},
    ("llama", "tp"): {"all-reduce": 4 * 24 * 16 * 32},
    ("llama", "bp-ag"): {"all-gather": 6 * 16 * 32},
}


def sent(model, inputs, strategy):
    totals: dict[str, int] = {}
    for message in messages(model, 4, inputs, STRATEGIES[strategy].of):  # raises where the program differs
        totals[message.kind] = totals.get(message.kind, 0) + message.bits * message.times
    return totals


@pytest.mark.parametrize(
    ("name", "strategy"),
    [pytest.param(*case, marks=[] if case[0] in PICTURES else pytest.mark.slow) for case in EXPECTED],
)
def test_the_compiled_program_sends_what_is_predicted(request, rank_coded, random_text, name, strategy):
    inputs = rank_coded(1) if name in PICTURES else random_text(24)
    assert sent(make_model(request, name), inputs, strategy) == EXPECTED[name, strategy]


@pytest.mark.parametrize("strategy", ["sp", "tp", "bp-ag", "bp-sp"])
def test_half_precision_is_half_the_bits(strategy, tiny_vit, rank_coded):
    """Also on a CPU, where XLA would send 16-bit floats as 32-bit ones, and adds them up as such."""
    model = build("vit", tiny_vit(num_attention_heads=4).config, None, jnp.bfloat16)
    full = EXPECTED["vit", strategy]
    assert sent(model, rank_coded(1), strategy) == {kind: bits // 2 for kind, bits in full.items()}


def test_tensor_parallel_weights_are_split_where_they_are_placed(request):
    """A device holds a quarter of every layer of the blocks, and all of embeddings and norms."""
    model = make_model(request, "llama")
    program = parallelize(model, make_mesh(4), TensorParallel.of)
    for path, array in jax.tree_util.tree_leaves_with_path(program.state):
        name = jax.tree_util.keystr(path)
        split = any(f"'{layer}'" in name for layer in ("q", "k", "v", "o", "gate", "up", "down"))
        shard = array.addressable_shards[0].data
        assert shard.size == array.size // (4 if split else 1), name
        assert (SEQ in jax.tree.leaves(tuple(array.sharding.spec))) == split


def test_what_cannot_be_split_is_said(request, tiny_vit, tiny_llama):
    vit = tiny_vit()  # 2 heads
    with pytest.raises(
        AstraError, match=r"strategy tp splits 2 heads, 2 key/value heads, 32 MLP columns evenly, which "
    ):
        TensorParallel.of(vit, 4)
    with pytest.raises(AstraError, match=r"4 devices cannot: use 2 devices, or strategy sp$"):
        TensorParallel.of(vit, 4)
    with pytest.raises(AstraError, match="2 key/value heads"):
        parallelize(tiny_llama(), make_mesh(4), TensorParallel.of)
    with pytest.raises(AstraError, match=r"splits 16 hidden units evenly, which 3 devices cannot: use 2, 4, 8, 16 dev"):
        BlockParallel.of(vit, 3)
    with pytest.raises(AstraError, match=r"3 exchanges do not divide 2 blocks into equal groups: use one of 1, 2"):
        BlockSequenceParallel.of(vit, 2, exchanges=3)
    with pytest.raises(AstraError, match="16 tokens cannot be split over 32 devices: use at most 16"):
        SequenceParallel.of(tiny_vit(patch_size=5), 32)
