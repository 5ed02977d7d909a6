"""FLOPs of traced programs against products done by hand."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from astra_jax.codecs.config import VQConfig
from astra_jax.mesh.sharding import DATA, SEQ, Shards, make_mesh
from astra_jax.models.mask import Block
from astra_jax.models.vision import PreNormBlock
from astra_jax.models.vit import ViTConfig
from astra_jax.strategies.base import Single
from astra_jax.strategies.coded import Astra
from eval.cost.flops import flops

MATMUL = 2 * 5 * 7 * 3  # [5,7] @ [7,3]


def shape(*axes):
    return jax.ShapeDtypeStruct(axes, jnp.float32)


@pytest.mark.parametrize(
    ("spec", "a", "b", "expected"),
    [
        ("ij,jk->ik", (5, 7), (7, 3), MATMUL),
        ("bij,bjk->bik", (4, 5, 7), (4, 7, 3), 4 * MATMUL),
        ("bij,jk->bik", (4, 5, 7), (7, 3), 4 * MATMUL),
        ("ijk,jkl->il", (2, 3, 5), (3, 5, 7), 2 * 2 * 7 * 15),
        ("i,j->ij", (5,), (7,), 2 * 5 * 7),  # K is 1
    ],
)
def test_products_by_hand(spec, a, b, expected):
    assert flops(lambda a, b: jnp.einsum(spec, a, b), shape(*a), shape(*b)) == expected


def matmul(a, b):
    return a @ b


@jax.custom_jvp
def with_jvp(a, b):
    return a @ b


@jax.custom_vjp
def with_vjp(a, b):
    return a @ b


with_jvp.defjvp(lambda primals, tangents: (with_jvp(*primals), with_jvp(*primals)))
with_vjp.defvjp(lambda a, b: (a @ b, (a, b)), lambda kept, ct: kept)


@pytest.mark.parametrize(
    ("function", "times"),
    [
        (lambda a, b: jnp.tanh(a) * a + b.sum(), 0),
        (lambda a, b: jax.jit(matmul)(a, b) + a @ b, 2),
        (with_jvp, 1),
        (with_vjp, 1),
        (jax.checkpoint(matmul), 1),
        (lambda a, b: jax.lax.scan(lambda c, _: (c + a @ b, None), jnp.zeros((5, 3)), None, length=6)[0], 6),
        (lambda a, b: jax.lax.map(lambda _: jax.lax.map(lambda _: a @ b, jnp.arange(2)), jnp.arange(3)), 6),
        (lambda a, b: jax.lax.fori_loop(0, 6, lambda _, c: c + a @ b, jnp.zeros((5, 3))), 6),
        (lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: a @ b + a @ (2 * b)), 2),
        (lambda a, b: jax.lax.platform_dependent(a, b, cpu=matmul, default=lambda a, b: jnp.zeros((5, 3))), 1),
        (lambda a, b: jax.lax.while_loop(lambda c: c < 9, lambda c: c + 1, 0) + a @ b, 1),
        (lambda a, b: jax.vmap(matmul, (0, None))(jnp.stack([a, a]), b), 2),
    ],
)
def test_products_in_other_programs(function, times):
    assert flops(function, shape(5, 7), shape(7, 3)) == times * MATMUL


def test_a_loop_of_unknown_length_and_a_convolution_are_refused():
    def loop(a):
        return jax.lax.while_loop(lambda c: c[0, 0] < 9, lambda c: c @ c, a)

    with pytest.raises(NotImplementedError, match="while"):
        flops(loop, shape(3, 3))
    with pytest.raises(NotImplementedError, match="conv_general_dilated"):
        flops(lambda x, w: jnp.convolve(x, w), shape(9), shape(3))


def test_one_device_counts():
    """The batch of 8 over two and the rows of 12 over four devices: each multiplies [4,3,7] by [7,5]."""
    mesh = make_mesh(4, 2)
    run = jax.shard_map(matmul, mesh=mesh, in_specs=(P(DATA, SEQ), P()), out_specs=P(DATA, SEQ))
    assert flops(jax.jit(run), shape(8, 12, 7), shape(7, 5)) == 4 * 2 * 3 * 7 * 5


def block_flops(G, strategy, slots):
    """Of a ViT-Base block whose weights are shapes, for one sequence on this device."""
    astra = VQConfig(groups=G) if G else None
    block = nnx.eval_shape(lambda: PreNormBlock(ViTConfig(), astra, jnp.float32, nnx.Rngs(0)))
    graphdef, state = nnx.split(block)
    return flops(lambda state, x: nnx.merge(graphdef, state)(x, strategy, (), Block(0))[0], state, shape(1, slots, 768))


def test_a_block_of_vit_base_on_one_device():
    """q, k, v, o are 8 T D^2, the MLP 16 T D^2, attention 4 T^2 D: 17.72 GFLOP (ALGORITHMS 1.2)."""
    T, D = 1024, 768
    found = block_flops(None, Single(Shards.split(T, 1)), T)
    assert found == 24 * T * D**2 + 4 * T**2 * D
    assert round(found / 1e9, 2) == 17.72


@pytest.mark.parametrize("G", [1, 32])
def test_a_block_of_vit_base_on_one_device_of_four(G):
    """Without encoding 6.24 GFLOP (ALGORITHMS 1.2): K and V of R remote tokens are 4 R D^2. Encoding is 2 K D S."""
    T, S, D, K = 1024, 256, 768, 1024
    found = block_flops(G, Astra(Shards.split(T, 4)).alone(4), S)
    without_encoding = 24 * S * D**2 + 4 * (T - S) * D**2 + 4 * S * T * D
    assert found == without_encoding + 2 * K * D * S
    assert round(without_encoding / 1e9, 2) == 6.24
