"""Mixed-precision attention: one online softmax over a list of sources. Collective-free.

Everything attention ever sees is a list of sources: local keys and values in full precision, remote ones from
codes. Attention on one device is the case of one source.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt16

from astra_jax.codecs.base import Groups, Quantizer
from astra_jax.codecs.config import AstraConfig
from astra_jax.codecs.registry import make_codec
from astra_jax.models.interface import Codes, Content, Estimates, Inputs, Kept, Remote, Report, Source, Strategy
from astra_jax.models.layers import ColumnLinear, RowLinear
from astra_jax.models.mask import Block, Windows
from astra_jax.models.rotary import Rotary, RotaryByBlock

FIRST = Block(0)
SCORES = 2**22  # that are held at once on a CPU: more leave the cache, and a head takes three times as long


class Folded(nnx.Variable):
    """What a codeword adds to key and value of a token, `C_g [Wk_g Wv_g]`, biases in the first group: [G,K,2JE].

    Made by `astra_jax.models.key_value_tables.fold`.
    """

    def of(self, codec: Quantizer, z: UInt16[Array, "B R G"], groups: Groups | None = None) -> Float[Array, "B R KV"]:
        """Keys and values: rows of the tables, added up."""
        return sum_of_rows(self[...], z, groups)


class Readout(nnx.Variable):
    """Keys and values of a step along every axis of a codec, and in the last row of its origin: [A+1,2JE].

    Made by `astra_jax.models.key_value_tables.fold`.
    """

    def of(self, codec: Quantizer, z: UInt16[Array, "B R G"], groups: Groups | None = None) -> Float[Array, "B R KV"]:
        """Keys and values: a product with few axes in place of the whole width."""
        table = self[...]
        return codec.coordinates(z, groups).astype(table.dtype) @ table[:-1] + table[-1]


class Partial(NamedTuple):
    """Softmax statistics of one source: `sum_r exp(s_r - max_score) v_r`, the same sum without v, and the maximum."""

    numerator: Float[Array, "B H S E"]
    denominator: Float[Array, "B H S 1"]
    max_score: Float[Array, "B H S 1"]


class Scores(NamedTuple):
    """How scores are made of products of queries and keys.

    Attributes:
      scale: what products are multiplied with; None for `1 / sqrt(E)`.
      softcap: where tanh bends them to, so that none is greater; None for no bound (Gemma 2).
    """

    scale: float | None = None
    softcap: float | None = None


PLAIN = Scores()


def attend(query: Float[Array, "B S H E"], source: Source, how: Scores = PLAIN) -> Partial:
    """Attention of queries to one source, left unnormalised. H may be a multiple of J (grouped-query attention)."""
    B, S, H, _ = query.shape
    all_heads = partial(_attend_all_heads, how=how)
    if B * H * S * source.key.shape[1] <= SCORES:
        return all_heads(query, source)
    return jax.lax.platform_dependent(query, source, cpu=partial(_attend_by_head, how=how), default=all_heads)


def _attend_by_head(query: Float[Array, "B S H E"], source: Source, how: Scores) -> Partial:
    """`attend` for a CPU: the queries of one key/value head at a time, whose scores stay in the cache. A backward pass
    computes them again, which takes less time than to have kept those of all heads and blocks."""
    B, S, H, E = query.shape
    J = source.key.shape[2]

    @jax.checkpoint
    def one_head(head: tuple[Any, ...]) -> Partial:
        q, k, v, table = head
        bias = source.bias and source.bias._replace(table=table)
        return _attend_all_heads(q, source._replace(key=k[:, :, None], value=v[:, :, None], bias=bias), how)

    q = query.reshape(B, S, J, H // J, E).transpose(2, 0, 1, 3, 4)
    k, v = (jnp.moveaxis(a, 2, 0) for a in (source.key, source.value))
    tables = source.bias and source.bias.table.reshape(-1, J, H // J).swapaxes(0, 1)
    by_head = jax.lax.map(one_head, (q, k, v, tables))
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(B, H, *a.shape[3:]), by_head)


def _attend_all_heads(query: Float[Array, "B S H E"], source: Source, how: Scores) -> Partial:
    B, S, H, E = query.shape
    R, J = source.key.shape[1:3]
    # Heads first and plain batched matmuls: about 1.7 times as fast on a CPU as einsums over [B,S,H,E], gradients too.
    q = (
        (query / math.sqrt(E) if how.scale is None else query * how.scale)
        .reshape(B, S, J, H // J, E)
        .transpose(0, 2, 3, 1, 4)
        .reshape(B, J, (H // J) * S, E)
    )
    k, v = source.key.transpose(0, 2, 1, 3), source.value.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bjme,bjre->bjmr", q, k, preferred_element_type=jnp.float32).reshape(B, H, S, R)
    if how.softcap is not None:
        scores = how.softcap * jnp.tanh(scores / how.softcap)
    if source.bias is not None:
        scores = scores + source.bias.scores()
    if source.mask is not None:
        scores = jnp.where(_for_heads(source.mask), scores, -jnp.inf)
    # A finite floor: where nothing is visible, exp(-inf - floor) is 0 instead of nan.
    floor = jnp.finfo(scores.dtype).min
    max_score = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True, initial=floor))
    weights = jnp.exp(scores - max_score)
    if source.times is not None:  # the same as log(count) added to the scores
        weights = weights * _for_heads(source.times)
    rows = weights.astype(v.dtype).reshape(B, J, (H // J) * S, R)
    numerator = jnp.matmul(rows, v, preferred_element_type=jnp.float32).reshape(B, H, S, E)
    return Partial(numerator, weights.sum(axis=-1, keepdims=True), max_score)


def _for_heads(table: Shaped[Array, "*#B #S R"]) -> Shaped[Array, "*#BH #S R"]:
    """A table of queries and keys, the same for every head."""
    return table if table.ndim == 2 else table[:, None]


def merge(partials: Sequence[Partial]) -> Float[Array, "B S H E"]:
    """The softmax over all sources together, exactly, from their statistics. A query that sees nothing gets 0."""
    top = partials[0].max_score
    for p in partials[1:]:
        top = jnp.maximum(top, p.max_score)
    scales = [jnp.exp(p.max_score - top) for p in partials]
    numerator = sum(p.numerator * scale for p, scale in zip(partials, scales, strict=True))
    denominator = sum(p.denominator * scale for p, scale in zip(partials, scales, strict=True))
    merged = numerator / jnp.maximum(denominator, jnp.finfo(jnp.float32).tiny)
    return merged.transpose(0, 2, 1, 3)


def sum_of_rows(
    tables: Float[Array, "G K width"], z: UInt16[Array, "B R G"], groups: Groups | None = None
) -> Float[Array, "B R width"]:
    """`sum_g tables[g, z_g]`, of the first `groups` alone, group by group, so that nothing of size [B,R,G,width] is
    held."""
    z = jnp.moveaxis(z.astype(jnp.int32), -1, 0)

    def add(total: Array, group: tuple[Array, Array, Array]) -> tuple[Array, None]:
        table, codes, number = group
        row = table[codes]
        return total + (row if groups is None else jnp.where((number < groups)[..., None], row, 0)), None

    if len(tables) == 1:
        return tables[0][z[0]]
    # From 0 on, and not from the first group: the rest of the tables would be copied. Made of `z` so that it varies
    # over a mesh as it does.
    start = jnp.zeros_like(z[0], jnp.float32)[..., None] * jnp.zeros(tables.shape[-1])
    return jax.lax.scan(add, start, (tables, z, jnp.arange(len(tables))))[0]


def count_codes(z: UInt16[Array, "B R"], mask: Bool[Array, "*#B 1 R"] | None, K: int) -> Int[Array, "B 1 K"]:
    """How often each of K codewords occurs among the tokens that can be seen."""
    seen = jnp.broadcast_to(True if mask is None else mask[..., 0, :], z.shape).astype(jnp.int32)
    return jax.vmap(lambda codes, ones: jnp.zeros(K, jnp.int32).at[codes].add(ones))(z, seen)[:, None]


def _biased(source: Source, block: Block, strategy: Strategy, remote: Remote | None) -> Source:
    """Local keys, or remote ones, with what their scores get by their places."""
    if block.relative is None:
        return source
    places = strategy.tokens().position
    return source._replace(bias=block.relative.bias(places, places if remote is None else remote.position))


class MixedPrecisionAttention(nnx.Module):
    """Attention of local queries to local tokens in full precision and to remote tokens through codes.

    Args:
      D, H, J, E: hidden width, query heads, key/value heads, head width.
      qkv_bias: whether the q, k and v projections have a bias.
      o_bias: whether the output projection has one.
      rotary: the rotary embedding of queries and keys; None where positions are in the input.
      norms: of queries and of keys, over the width of a head or over all heads; None for none.
      scores: how scores are made.
      windows: how far every block sees; None where all see all.
      astra: the codec's configuration; None for a model that has no codebooks yet.
      dtype: what activations are computed in. Parameters are float32.
      rngs: initialisation.
    """

    def __init__(
        self,
        D: int,
        H: int,
        J: int,
        E: int,
        *,
        qkv_bias: bool,
        o_bias: bool = True,
        rotary: Rotary | RotaryByBlock | None = None,
        norms: tuple[Any, Any] | None = None,
        scores: Scores = PLAIN,
        windows: Windows | None = None,
        astra: AstraConfig | None,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.H, self.J, self.E, self.rotary, self.scores, self.windows = H, J, E, rotary, scores, windows
        self.q = ColumnLinear(D, H * E, use_bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.k = ColumnLinear(D, J * E, use_bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.v = ColumnLinear(D, J * E, use_bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.o = RowLinear(H * E, D, use_bias=o_bias, dtype=dtype, rngs=rngs)
        q_norm, k_norm = norms or (None, None)
        self.q_norm, self.k_norm = nnx.data(q_norm), nnx.data(k_norm)
        self.site = astra.site if astra else None
        self.codec = make_codec(astra, D if astra.site == "hidden" else 2 * J * E) if astra else None
        self.tables: Folded | Readout | None = nnx.data(None)

    def heads(self, x: Float[Array, "B R JE"]) -> Float[Array, "B R J E"]:
        """[B,R,J*E] -> [B,R,J,E], also for H query heads."""
        return x.reshape(*x.shape[:-1], -1, self.E)

    @property
    def norms_all_heads(self) -> bool:
        """Whether a norm is over all heads together."""
        return any(norm is not None and norm.scale.shape[-1] != self.E for norm in (self.q_norm, self.k_norm))

    def normed(self, x: Float[Array, "B R widths"], norm: Any) -> Float[Array, "B R heads E"]:
        """Queries or keys, normalised head by head or all heads together, where they are."""
        if norm is None:
            return self.heads(x)
        return norm(self.heads(x)) if norm.scale.shape[-1] == self.E else self.heads(norm(x))

    def codec_input(self, y: Float[Array, "*tokens D"]) -> Float[Array, "*tokens W"]:
        """What the codec quantizes of an input of the projections: itself, or at site `kv` its key and value."""
        return self.project(y) if self.site == "kv" else y

    def project(self, y: Float[Array, "*tokens D"]) -> Float[Array, "*tokens KV"]:
        """Keys and values side by side, all heads of each."""
        return jnp.concatenate([self.k(y), self.v(y)], axis=-1)

    def remote_key_value(self, content: Content) -> Float[Array, "B R KV"]:
        """K^ and V^ of remote tokens, `y^ Wk, y^ Wv` for the site `hidden`."""
        project = (lambda y: y) if self.site == "kv" else self.project
        match content:
            case Codes(z, groups):
                return self.codec.key_value(z, project, self.tables, groups)  # type: ignore[union-attr]  # codes are of a codec
            case Estimates(y):
                return project(y)
            case Inputs(y):
                return self.project(y)

    def remote_source(self, remote: Remote, dtype: Any, block: Block = FIRST) -> Source:
        """Remote tokens as attention sees them: one by one, or where that is less, as codewords with their counts.

        Without a rotary embedding or relative positions, tokens with the same code (G=1) are the same to a query,
        wherever they are. So attention to all of them is attention to K codewords that count as often as they were sent
        (the log-count bias of Transformer-VQ, 2309.16354): exact, and what it costs does not depend on R.
        """
        if isinstance(remote.content, Codes) and not block.relative and self._counts(remote.content.z, remote.mask):
            table = self.tables[...][0].astype(dtype)  # type: ignore[index]  # `_counts` says that there are tables
            count = count_codes(remote.content.z[..., 0], remote.mask, len(table))
            k, v = jnp.split(table[None], 2, axis=-1)
            return Source(self.normed(k, self.k_norm), self.heads(v), count > 0, count)
        k, v = jnp.split(self.remote_key_value(remote.content), 2, axis=-1)
        k = self.rotate(self.normed(k, self.k_norm), remote.position, block)
        return Source(k.astype(dtype), self.heads(v).astype(dtype), remote.mask)

    def _counts(self, z: UInt16[Array, "B R G"], mask: Any) -> bool:
        """Whether codewords are counted: there are fewer of them than tokens, and all queries see the same tokens."""
        alike = self.rotary is None and (mask is None or mask.shape[-2] == 1)
        return (
            alike
            and isinstance(self.tables, Folded)
            and len(self.tables[...]) == 1
            and (self.tables[...].shape[1] < z.shape[1])
        )

    def rotate(self, x: Float[Array, "B R heads E"], position: Any, block: Block) -> Float[Array, "B R heads E"]:
        """Queries or keys at their places in the sequence; as they are without a rotary embedding."""
        return self.rotary(x, position, block.number) if self.rotary else x

    def __call__(
        self, y: Float[Array, "B S D"], strategy: Strategy, estimate: Any, block: Block
    ) -> tuple[Float[Array, "B S D"], Any, Report]:
        """One block's attention (paper section 3).

        Args:
          y: the input of the projections, normalised.
          strategy: what exchanges codes and knows who sees whom.
          estimate: what devices expect of each other's tokens goes on from this; () without a predictor.
          block: which block this is.

        Returns:
          the attention output [B,S,D], the new estimate, and what the block reports.
        """
        block = block._replace(windows=self.windows)
        k, v = self.k(y), self.v(y)
        sent = jnp.concatenate([k, v], axis=-1) if strategy.coded and self.site == "kv" else y
        # Codes leave first, and are waited for last: they travel while local attention runs.
        underway = strategy.begin(self.codec, sent, estimate, block)
        y, k, v = underway.local((y, k, v))
        position = strategy.tokens().position if self.rotary else None
        q = self.rotate(self.normed(self.q(y), self.q_norm), position, block)
        q = self.rotary.of_query(q, position) if self.rotary else q
        k, v = self.rotate(self.normed(k, self.k_norm), position, block), self.heads(v)
        local = Source(k, v, strategy.local_mask(block))
        sources = [_biased(local, block, strategy, None), *strategy.cached(block)]
        partials = [attend(q, source, self.scores) for source in sources]
        remote, estimate, report = underway.finish(partials)
        if remote is not None:
            source = _biased(self.remote_source(remote, k.dtype, block), block, strategy, remote)
            partials.append(attend(q, source, self.scores))
        if strategy.keep:
            report = report._replace(kept=Kept(k, v, None if remote is None else remote.content))
        attended = merge(partials).astype(y.dtype)
        return self.o(attended.reshape(*y.shape[:2], -1), strategy), estimate, report
