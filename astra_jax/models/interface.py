"""What a model and a strategy ask of each other, and what attention gets: typed, and nearly without computation.

A model runs its blocks with a strategy, which knows the split of the tokens and what other devices say; no model
mentions a mesh axis. Strategies are in `astra_jax/strategies`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt16

from astra_jax.codecs.base import Quantizer
from astra_jax.codecs.config import AstraConfig, Kind
from astra_jax.mesh.sharding import Reading, Shards, Table, Tokens
from astra_jax.models.mask import Block


class Bias(NamedTuple):
    """What is added to scores: of every query and key a row of a table, which has a number for each head."""

    table: Float[Array, "buckets H"]
    bucket: Int[Array, "*B S R"]

    def scores(self) -> Float[Array, "*B H S R"]:
        """The numbers themselves."""
        return jnp.moveaxis(jnp.take(self.table.T, self.bucket, axis=1), 0, -3)


class Source(NamedTuple):
    """Keys and values of R tokens, and who may see them. The mask broadcasts to [B, S, R]; None where all see all.

    `times` says how many equal tokens each of them stands for; None for one.
    """

    key: Float[Array, "#B R J E"]
    value: Float[Array, "#B R J E"]
    mask: Bool[Array, "*#B #S R"] | None
    times: Int[Array, "*#B #S R"] | None = None
    bias: Bias | None = None


class Codes(NamedTuple):
    """Remote tokens as their codes, and how many groups of each arrived; None for all."""

    z: UInt16[Array, "*L B R G"]
    groups: Int[Array, "*L B R"] | None = None


class Estimates(NamedTuple):
    """Remote tokens as estimates of what the codec quantizes."""

    y: Float[Array, "*L B R W"]


class Inputs(NamedTuple):
    """Remote tokens as the exact inputs of the K and V projections."""

    y: Float[Array, "*L B R D"]


Content = Codes | Estimates | Inputs


class Remote(NamedTuple):
    """Remote tokens as attention gets them.

    Attributes:
      content: what is known of them.
      position: their places in the sequence, for rotary embeddings.
      mask: which query sees which remote token, broadcastable to [B,S,R]; None where all see all.
    """

    content: Content
    position: Int[Table, "*B R"]
    mask: Bool[Array, "*#B #S R"] | None


class Kept(NamedTuple):
    """What a block leaves for a cache: its local keys and values, and what it received; None on one device."""

    key: Float[Array, "*L B S J E"]
    value: Float[Array, "*L B S J E"]
    content: Content | None


class Report(NamedTuple):
    """What a block tells who runs the model; a field that nobody asked for is None.

    Attributes:
      captured: the inputs of the projections (`Single.capture`).
      observed: what training learns of the codec's vectors (`codecs.base.Observation`).
      kept: what a cache is made of (`Strategy.keep`).
    """

    captured: Float[Array, "*L B S D"] | None = None
    observed: Any = None
    kept: Kept | None = None


class Exchanged(NamedTuple):
    """The result of one exchange.

    Attributes:
      remote: remote tokens; None where there are none.
      estimate: what devices now expect of each other's tokens goes on from this; () without a predictor.
      report: what the strategy tells of this block.
    """

    remote: Remote | None
    estimate: Any
    report: Report


@runtime_checkable
class Underway(Protocol):
    """An exchange that has begun: what this device says is on its way."""

    def local(self, inputs: Any) -> Any:
        """The inputs of local work, which waits with it until the codes have left."""

    def finish(self, done: Any) -> Exchanged:
        """What came of the exchange. It is not waited for before `done`, the results of local work, are there."""


class TokenIds(NamedTuple):
    """What devices can tell each other of a text besides codes: ids, from which the first block's input follows.

    Attributes:
      ids: of the slots that are here.
      vocabulary: how many ids there are, those of other types included.
      vectors_of: what the first block's codec sees of tokens with these ids [B,S] at these positions [*B,S]: [B,S,W].
    """

    ids: Int[Array, "B S"]
    vocabulary: int
    vectors_of: Callable[[Array, Any], Array]


@runtime_checkable
class Strategy(Protocol):
    """What a model asks of a strategy."""

    @property
    def coded(self) -> bool:
        """Whether `begin` takes what the codec quantizes, or else the input of the projections."""

    @property
    def keep(self) -> bool:
        """Whether every block reports what a cache is made of."""

    def tokens(self) -> Tokens:
        """Attributes of every slot that is here, class tokens included."""

    def positions(self) -> Int[Table, "*B S"]:
        """Place of every such slot in the sequence, class tokens not included."""

    def prepend_class(self, cls: Shaped[Array, "*B k D"], x: Shaped[Array, "B slots D"]) -> Shaped[Array, "B more D"]:
        """Puts the k class tokens at the head of every shard that is here."""

    def start(self, codec: Quantizer | None, x: Float[Array, "B S D"], known: TokenIds | None) -> Any:
        """The estimate before the first block; () without a predictor.

        Args:
          x: the input of the first block.
          known: where the schedule begins with a block that token ids say.
        """

    def begin(self, codec: Quantizer | None, y: Float[Array, "B S W"], estimate: Any, block: Block) -> Underway:
        """Begins to find out what one block's attention sees of other devices' tokens."""

    def cached(self, block: Block) -> list[Source]:
        """Further sources of a block: keys and values of earlier calls."""

    def local_mask(self, block: Block) -> Bool[Array, "*B queries keys"] | None:
        """Which local tokens a local query sees; None where all see all."""

    def reduce(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """A layer's output, from what the rows of its kernel that are here make of it."""

    def run_blocks(self, step: "Step", kinds: Sequence[Kind], carry: Any, xs: Any) -> Any:
        """Runs the stack: `step(strategy, kind, carry, xs)` of every block.

        Args:
          kinds: the schedule.
          xs: weights and numbers of all blocks.
        """

    def pool(self, x: Float[Array, "B S D"], *readings: Reading) -> Float[Array, "B states"]:
        """The states that a head reads (`Shards.weights`), side by side."""

    def attend(
        self, query: Float[Array, "B Q H E"], key: Float[Array, "B S J E"], value: Float[Array, "B S J E"]
    ) -> Float[Array, "B Q H E"]:
        """Attention of queries that all devices have to all tokens, of which these are here."""


Step = Callable[[Any, Kind, Any, Any], tuple[Any, Report]]


@runtime_checkable
class Model(Protocol):
    """What strategies, compilers and training ask of a model; N is the number of devices.

    Attributes:
      config: the architecture, under Hugging Face's names.
      astra: how it is compressed; None without codebooks.
      dtype: what activations are computed in.
      blocks: the stack; its `attention` has the sizes and the codec.
      per_token: whether the output has a row per token, or one per sequence.
    """

    config: Any
    astra: AstraConfig | None
    dtype: Any
    blocks: Any
    per_token: bool

    @property
    def reads(self) -> Sequence[Reading]:
        """What the head reads of a sequence where the output has one row for it: a state each."""

    @property
    def codec(self) -> Quantizer | None:
        """The quantizers of all blocks, stacked on a leading axis L; None without codebooks."""

    def shards(self, N: int, inputs: Any = None) -> Shards:
        """The split of every sequence of a batch over N devices; without a batch, of one of the greatest length."""

    def to_tokens(self, inputs: Any) -> Shaped[Array, "B T *feature"]:
        """What `features` takes of the model's inputs, token by token."""

    def features(self, tokens: Any, strategy: Strategy) -> tuple[Float[Array, "*rows D"], Report]:
        """Tokens of the shards that are here -> what the head reads, and the reports of all blocks."""

    def logits(self, features: Float[Array, "*rows D"]) -> Float[Array, "*rows _"]:
        """What the head makes of it, float32."""

    def __call__(self, tokens: Any, strategy: Strategy) -> tuple[Float[Array, "*rows _"], Report]:
        """Tokens of the shards that are here -> logits, and the reports of all blocks."""
