"""MPNet: a BERT without token types, whose blocks share a table of relative positions."""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from astra_jax.codecs.config import AstraConfig
from astra_jax.errors import AstraError
from astra_jax.mesh.sharding import Table
from astra_jax.models.bert import Bert
from astra_jax.models.encoder import EncoderConfig
from astra_jax.models.interface import Bias
from astra_jax.models.layers import INNER, check_activation, check_divides

BUCKETS, EXACT, FARTHEST = 32, 8, 128  # of both directions; distances of their own; whence all are alike


def _by_distance() -> Int[np.ndarray, "distances"]:
    """The bucket of every distance up to `FARTHEST`: its own below `EXACT`, from there on by its logarithm."""
    n = np.arange(FARTHEST + 1, dtype=np.float32)
    each = BUCKETS // 2 - EXACT
    logarithm = np.log(np.maximum(n, 1) / EXACT) / np.float32(math.log(FARTHEST / EXACT))
    return np.where(n < EXACT, n, np.minimum(EXACT + each * logarithm, BUCKETS // 2 - 1)).astype(np.int32)


BY_DISTANCE = _by_distance()


def bucket(away: Int[Array, "*places"]) -> Int[Array, "*places"]:
    """Of keys that are so many places before their query, or behind it where that is negative."""
    return jnp.asarray(BY_DISTANCE)[jnp.minimum(jnp.abs(away), FARTHEST)] + BUCKETS // 2 * (away < 0)


class RelativePositions(NamedTuple):
    """A table that all blocks share: what scores of every head get in every bucket."""

    table: Float[Array, "buckets H"]

    def bias(self, queries: Int[Table, "*B S"], keys: Int[Table, "*B R"]) -> Bias:
        """For queries and keys at these places in the sequence."""
        return Bias(self.table, bucket(jnp.asarray(queries)[..., :, None] - jnp.asarray(keys)[..., None, :]))


@dataclasses.dataclass(frozen=True)
class MPNetConfig(EncoderConfig):
    """The numbers of an MPNet under the names of Hugging Face's `MPNetConfig`.

    Attributes:
      relative_attention_num_buckets: rows of the table of relative positions, of which the first 32 are used.

    Raises:
      AstraError: a value does not fit the others; the message names value, range and fix.
    """

    head_activation: ClassVar[str | None] = "tanh"
    type_vocab_size: ClassVar[int] = 0

    vocab_size: int = 30527
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    relative_attention_num_buckets: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_divides(self, "hidden_size", "num_attention_heads")
        check_activation("hidden_act", self.hidden_act)
        if self.relative_attention_num_buckets < BUCKETS:
            raise AstraError(
                f"config.json: relative_attention_num_buckets is {self.relative_attention_num_buckets}; it must be at "
                f"least {BUCKETS}, which are used"
            )

    @property
    def position_offset(self) -> int:
        """The place of a text's first token in the table of positions: behind that of padding, which is always 1."""
        return 2


class MPNet(Bert):
    """MPNet as a sentence encoder or a classifier; the arguments are those of `Bert`."""

    def __init__(
        self, config: MPNetConfig, astra: AstraConfig | None = None, *, dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        super().__init__(config, astra, dtype=dtype, rngs=rngs)
        shape = config.relative_attention_num_buckets, config.num_attention_heads
        self.relative = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), shape), axes=("buckets", INNER))

    @property
    def relative_positions(self) -> RelativePositions:
        """What all blocks add to scores."""
        return RelativePositions(self.relative[...])
