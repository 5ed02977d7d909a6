"""What ASTRA is compared with: strategies that are exact, or that split the hidden width, and send far more.

Sequence parallelism as in Voltage, tensor parallelism as in Megatron, and block parallelism as in DeTransformer.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Shaped

from astra_jax.codecs.base import Quantizer
from astra_jax.codecs.config import Kind
from astra_jax.errors import AstraError
from astra_jax.mesh.collectives import Alone, Peers
from astra_jax.mesh.sharding import SEQ
from astra_jax.models.interface import Exchanged, Inputs, Report, Step
from astra_jax.models.layers import HIDDEN, INNER, axis_of
from astra_jax.models.mask import Block
from astra_jax.strategies.base import Message, Sharded, SplitTokens, hidden_bits
from astra_jax.strategies.transport import Mesh


@dataclasses.dataclass(frozen=True)
class SequenceParallel(SplitTokens):
    """Voltage (ICDCS 2024): the devices gather the full-precision inputs of attention in every block. Exact.

    As in ASTRA, every device projects all remote tokens to keys and values itself, and in a block with a window tokens
    go only where a query can see them. The class token, where there is one, is a token of the first shard.

    Attributes:
      everything: whether all goes to all, whatever the windows.
    """

    everything: bool = False

    @classmethod
    def of(cls, model: Any, N: int, inputs: Any = None) -> "SequenceParallel":
        return cls(model.shards(N, inputs).without_replicas())

    def messages(self, model: Any) -> list[Message]:
        every = [True] * model.config.num_hidden_layers
        return [
            *self.hearing(model, lambda slots: slots * hidden_bits(model), every, self.everything),
            *self._pooled(model),
        ]

    def exchange(self, codec: Quantizer | None, y: Float[Array, "B S D"], estimate: Any, block: Block) -> Exchanged:
        remote = self.remote(Inputs(self.hear(self.sent(y), block, everything=self.everything)), block)
        return Exchanged(remote, estimate, Report())


def split_axes(state: Any, name: str) -> Any:
    """Which axis of every array in a state, counted from the last, is called that where its weight is made; 0 for none.

    What has length 1 there, as scales of quantized weights, is whole.
    """

    def one(weight: nnx.Variable) -> Any:
        axis = axis_of(weight, name)
        return jax.tree.map(lambda a: axis if axis and a.shape[axis] > 1 else 0, weight)

    return jax.tree.map(one, state, is_leaf=lambda a: isinstance(a, nnx.Variable))


def part_size(array: Any, axis: int, N: int) -> int:
    """How long one of N parts of an array along an axis is. Raises AstraError where the parts are not equal."""
    size, rest = divmod(array.shape[axis], N)
    if rest:  # what `of` checks are the layers; only scales of quantized weights are fewer
        raise AstraError(
            f"{array.shape[axis]} groups of quantized weights cannot be split over {N} devices: use fewer, or int8"
        )
    return size


def part(array: Shaped[Array, "*whole"], axis: int, n: Any, N: int) -> Shaped[Array, "*part"]:
    """Part n of N of an array along an axis, counted from the last; the array itself for axis 0."""
    if not axis:
        return array
    size = part_size(array, axis, N)
    return jax.lax.dynamic_slice_in_dim(array, n * size, size, array.ndim + axis)


def check_divides(strategy: str, N: int, sizes: dict[str, int]) -> None:
    """Raises AstraError unless all sizes (by their names) are multiples of N."""
    if any(size % N for size in sizes.values()):
        named = ", ".join(f"{size} {name}" for name, size in sizes.items())
        fitting = [str(n) for n in range(2, min(sizes.values()) + 1) if not any(size % n for size in sizes.values())]
        raise AstraError(
            f"strategy {strategy} splits {named} evenly, which {N} devices cannot: use "
            + (f"{', '.join(fitting)} devices, or strategy sp" if fitting else "strategy sp")
        )


@dataclasses.dataclass(frozen=True)
class TensorParallel(Sharded):
    """Megatron's tensor parallelism: heads and MLP columns are split, all tokens are everywhere. Exact.

    Two all-reduces per block: of the attention's output and of the MLP's. Embeddings, norms and heads are replicated.

    Attributes:
      shards: one shard.
      peers: the devices.
    """

    peers: Peers | Alone = dataclasses.field(default=Peers(SEQ), kw_only=True)

    @classmethod
    def of(cls, model: Any, N: int, inputs: Any = None) -> "TensorParallel":
        attention = model.blocks.attention
        sizes = {"heads": attention.H, "key/value heads": attention.J, "MLP columns": model.config.intermediate_size}
        check_divides("tp", N, sizes)
        if attention.norms_all_heads and N > 1:
            raise AstraError("strategy tp splits heads, whose norms need all of them in this family: use strategy sp")
        return cls(model.shards(1, inputs))

    def alone(self, N: int) -> Sharded:
        return dataclasses.replace(self, peers=Alone(N))

    def messages(self, model: Any) -> list[Message]:
        slots = self.shards.class_slots + self.shards.S
        return [Message("all-reduce", slots * hidden_bits(model), 2 * model.config.num_hidden_layers)]

    def weight_axes(self, state: Any) -> Any:
        return split_axes(state, INNER)

    def reduce(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return self.peers.total(x)


@dataclasses.dataclass(frozen=True)
class BlockParallel(Sharded):
    """DeTransformer's block parallelism (DATE 2024) with its all-gather plan: `bp-ag`.

    The L blocks form Nb groups. In all blocks of a group but the last, device n runs a sub-block of its own: it has
    D/N of the hidden width of all tokens, and of the weights what reads or writes that part; norms are over the part.
    Then the devices gather their parts, and each runs the group's last block whole. With Nb = L nothing is decoupled
    and the result is exact; otherwise a model has to be trained for it: the outputs of one that was not mean nothing.

    This is the structure of DeTransformer's public code; names and counts of the variants in the paper's comparison are
    not public, so that what `bp-ag` and `bp-sp` are is our choice.

    Attributes:
      shards: the split over N devices (only `bp-sp` uses that it is one).
      exchanges: Nb.
      peers: the devices.
    """

    exchanges: int = 1
    peers: Peers | Alone = dataclasses.field(default=Peers(SEQ), kw_only=True)

    unstacks = False

    @classmethod
    def of(cls, model: Any, N: int, inputs: Any = None, exchanges: int = 1) -> "BlockParallel":
        L = model.config.num_hidden_layers
        check_divides("bp", N, {"hidden units": model.config.hidden_size})
        if exchanges < 1 or L % exchanges:
            fitting = ", ".join(str(n) for n in range(1, L + 1) if L % n == 0)
            raise AstraError(f"{exchanges} exchanges do not divide {L} blocks into equal groups: use one of {fitting}")
        return cls(model.shards(N, inputs).without_replicas(), exchanges)

    def alone(self, N: int) -> Sharded:
        return dataclasses.replace(self, peers=Alone(N))

    @property
    def _slots(self) -> int:
        """Slots of one shard."""
        return self.shards.class_slots + self.shards.S

    def messages(self, model: Any) -> list[Message]:
        return [Message("all-gather", self._slots * hidden_bits(model), self.exchanges)]

    def run_blocks(self, step: Step, kinds: Sequence[Kind], carry: Any, xs: Any) -> Any:
        (weights, numbers), n, N = xs, self.peers.index(), self.peers.N

        def weights_of(number: Array) -> Any:
            # Taken from the stack one by one: a scan over slices of the stack would copy nearly all of it first.
            return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, number, keepdims=False), weights)

        def sub_block(x: Array, number: Array) -> tuple[Array, None]:
            whole = weights_of(number)
            mine = jax.tree.map(partial(part, n=n, N=N), whole, split_axes(whole, HIDDEN))
            return step(self, "coded", (x, ()), (mine, number))[0][0], None

        def group(carry: Any, numbers: Array) -> tuple[Any, Any]:
            x, remote = carry
            x, _ = jax.lax.scan(sub_block, part(x, -1, n, N), numbers[:-1])
            return self._whole_block(step, x, remote, (weights_of(numbers[-1]), numbers[-1]))

        return jax.lax.scan(group, carry, numbers.reshape(self.exchanges, -1))

    def _whole_block(self, step: Step, x: Float[Array, "B NS part"], remote: Any, xs: Any) -> Any:
        """A group's last block: parts of the width of all tokens -> all tokens, whole."""
        whole = jnp.concatenate([*self.peers.gather(x)], axis=-1)
        return step(self, "coded", (whole, remote), xs)


@dataclasses.dataclass(frozen=True)
class BlockSequenceParallel(BlockParallel):
    """`bp-sp`: block parallelism whose whole blocks are run as Voltage does, each device its own tokens (our choice).

    An all-to-all makes of all tokens' parts of the width a shard of whole tokens, attention gathers as in
    `SequenceParallel`, and then the devices gather the result.
    """

    def messages(self, model: Any) -> list[Message]:
        bits = self._slots * hidden_bits(model)
        return [Message("all-to-all", bits, self.exchanges), Message("all-gather", bits, 2 * self.exchanges)]

    def _whole_block(self, step: Step, x: Float[Array, "B NS part"], remote: Any, xs: Any) -> Any:
        mine = self.peers.transpose(x, split=1, join=2)
        (mine, remote), report = step(
            SequenceParallel(self.shards, Mesh(self.peers), everything=True), "coded", (mine, remote), xs
        )
        return (jnp.concatenate([*self.peers.gather(mine)], axis=1), remote), report
