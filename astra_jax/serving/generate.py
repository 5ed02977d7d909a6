"""Generation: prefill on all devices, then decoding on those that hold the end of the prompts, from their own cache.

The longer shards are last, so that the end of every prompt is in the last shard. After prefill its device already has
what decoding needs (paper section 3): keys and values of its own tokens in full precision, and the codes of all others,
which it received block by block. So nothing crosses the link after the first token. The cache keeps remote tokens as
codes; every step decodes them anew (DESIGN section 3).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from astra_jax.errors import AstraError
from astra_jax.inputs.token_batches import Text, bucket, check_text
from astra_jax.mesh.sharding import DATA, SEQ
from astra_jax.models.attention import Kept, Source
from astra_jax.serving.compile import Make, make_for, on_mesh, place
from astra_jax.strategies.base import Astra, Remote, Single, Strategy

TEMPERATURES = (1e-6, 1e6)  # beyond these, float32 makes infinities of logits, or nothing of their differences


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn, in this order.

    Raises:
      AstraError: a value is of another type, or outside its range.
    """

    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Draw among the k likeliest tokens only; 0 for all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have at least this probability."""
    seed: int = 0
    """Seed of the drawing."""

    def __post_init__(self) -> None:
        low, high = TEMPERATURES
        if not is_number(self.temperature) or not (self.temperature == 0 or low <= self.temperature <= high):
            raise AstraError(
                f"--temperature is {self.temperature}; it must be 0 (greedy), or from {low:f} to {high:,.0f}: try 0.8"
            )
        if not is_whole(self.top_k) or self.top_k < 0:
            raise AstraError(f"--top-k is {self.top_k}; it must be 0 (all tokens) or more: try 40")
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise AstraError(f"--top-p is {self.top_p}; it must be above 0 and at most 1: try 0.9")
        if not is_whole(self.seed) or not 0 <= self.seed < 2**32:
            raise AstraError(f"--seed is {self.seed}; it must be from 0 to {2**32 - 1}")

    @property
    def numbers(self) -> tuple[int | float, ...]:
        """What `sample` computes with: nothing (greedy), the temperature, or also top_k and top_p. How many they are
        takes a program of its own, and not what they are."""
        if self.temperature == 0:
            return ()
        if self.top_k == 0 and self.top_p == 1:
            return (float(self.temperature),)
        return (float(self.temperature), min(self.top_k, 2**31 - 1), float(self.top_p))


def is_whole(value: Any) -> bool:
    """Whether it is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a finite number, and no bool."""
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def restrict(
    logits: Float[Array, "B V"], top_k: int | Int[Array, ""], top_p: float | Float[Array, ""]
) -> Float[Array, "B V"]:
    """The logits of tokens that may be drawn, as in `Sampling`; -inf for all others."""
    ordered, place = jnp.sort(logits, axis=-1, descending=True), jnp.arange(logits.shape[-1])
    kept = (place < top_k) | (jnp.asarray(top_k) == 0)  # no `lax.top_k`, which would bring rows of all devices together
    p = jax.nn.softmax(jnp.where(kept, ordered, -jnp.inf), axis=-1)
    # A token stays if those before it have not reached top_p yet; the likeliest always does.
    kept = kept & ((p.cumsum(-1) - p < top_p) | (jnp.asarray(top_p) >= 1) | (place == 0))
    smallest = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < smallest, -jnp.inf, logits)


def sample(logits: Float[Array, "B V"], key: Key[Array, ""], numbers: Sequence[Any]) -> Int[Array, "B"]:
    """Draws the next token of every sequence. `numbers` are those of `Sampling`."""
    if not numbers:
        return jnp.argmax(logits, axis=-1)
    temperature, *restrictions = numbers
    logits = logits / temperature
    if restrictions:
        logits = restrict(logits, *restrictions)
    return jax.random.categorical(key, logits)


class Cache(NamedTuple):
    """A mixed-precision KV cache: own tokens exactly, remote ones as codes.

    Attributes:
      key, value: of own tokens, at their places in the sequence; M slots, of which the first `own` are in use.
      own: tokens in these slots.
      position: place of the next token in the sequence.
      codes: of remote tokens, or with a predictor the estimates that they led to; None where one device has seen the
        whole prompt.
      remote_position, remote_valid: place of every remote token, and whether there is one.
    """

    key: Float[Array, "L B M J E"]
    value: Float[Array, "L B M J E"]
    own: Int[Array, "B"]
    position: Int[Array, "B"]
    codes: Shaped[Array, "L B R _"] | None
    remote_position: Int[Array, "B R"] | None
    remote_valid: Bool[Array, "B R"] | None

    def append(self, kept: Kept) -> "Cache":
        """With one more own token in every sequence."""

        def put(slots: Float[Array, "L M J E"], new: Float[Array, "L J E"], at: Int[Array, ""]) -> Array:
            return slots.at[:, at].set(new, mode="drop")

        # Row by row, so that rows on different devices stay apart.
        in_rows = jax.vmap(put, in_axes=(1, 1, 0), out_axes=1)
        return self._replace(
            key=in_rows(self.key, kept.key[:, :, 0], self.own),
            value=in_rows(self.value, kept.value[:, :, 0], self.own),
            own=self.own + 1,
            position=self.position + 1,
        )


@dataclasses.dataclass(frozen=True)
class Decode(Strategy):
    """The strategy of one new token per sequence: it sees itself, the own tokens of the cache, and the remote ones."""

    cache: Cache
    keep = True

    def positions(self) -> Int[Array, "B 1"]:
        return self.cache.position[:, None]

    def exchange(self, codec: Any, y: Array, carry: Any, block: Any) -> tuple[Remote | None, Any, None]:
        cache = self.cache
        if cache.codes is None:
            return None, carry, None
        assert cache.remote_position is not None and cache.remote_valid is not None
        return Remote(cache.codes[block], cache.remote_position, cache.remote_valid[:, None, :]), carry, None

    def cached(self, block: Any) -> list[Source]:
        cache = self.cache
        mask = jnp.arange(cache.key.shape[2]) < cache.own[:, None, None]
        return [Source(cache.key[block], cache.value[block], mask)]

    def local_mask(self) -> Bool[Array, "1 1"]:
        return jnp.ones((1, 1), bool)


def check_stop(stop: Sequence[Any]) -> None:
    """Raises AstraError for a stop string that is empty, or no text."""
    for one in stop:
        check_text("--stop", one)
        if not one:
            raise AstraError("--stop is an empty string: give at least one character")


class Continuation:
    """The text that a prompt goes on with, up to an end-of-text token or a stop string.

    Args:
      stream: from `Tokenizer.stream`.
      eos: ids that end a text.
      stop: strings that end it; they are not part of it.
    """

    def __init__(self, stream: Callable[[int], str], eos: Sequence[int], stop: Sequence[str] = ()):
        check_stop(stop)
        self._stream, self._eos, self._stop = stream, frozenset(eos), tuple(stop)
        self._shown = 0
        self.text, self.count, self.done = "", 0, False

    def add(self, token: int) -> str:
        """Adds a token, if the text has not ended. Returns what can be shown now: no part of a stop string."""
        if self.done:
            return ""
        self.count += 1
        if token in self._eos:
            self.done = True
            return self.rest()
        self.text += self._stream(token)
        ends = [self.text.find(stop) for stop in self._stop if stop in self.text]
        if ends:
            self.text, self.done = self.text[: min(ends)], True
            return self.rest()
        # A tail that may become a stop string is held back.
        held = max((self._begun(stop) for stop in self._stop), default=0)
        return self._show(len(self.text) - held)

    def _begun(self, stop: str) -> int:
        """How many characters at the end of the text are the first of a stop string."""
        lengths = range(min(len(stop) - 1, len(self.text)), 0, -1)
        return next((n for n in lengths if self.text.endswith(stop[:n])), 0)

    def rest(self) -> str:
        """What has not been shown yet, when no token follows."""
        return self._show(len(self.text))

    def _show(self, end: int) -> str:
        piece, self._shown = self.text[self._shown : end], max(self._shown, end)
        return piece


class Memory(NamedTuple):
    """Bytes of the tokens of the prompts in a cache: as they are kept, and as full-precision keys and values."""

    kept: int
    full: int


def memory(cache: Cache) -> Memory:
    """What codes save: bytes of the remote tokens' codes, and of the keys and values that they stand for."""
    if cache.codes is None:
        return Memory(0, 0)
    L, B, R, _ = cache.codes.shape
    J, E = cache.key.shape[3:]
    return Memory(cache.codes.nbytes, 2 * L * B * R * J * E * cache.key.dtype.itemsize)


def ends_of(mesh: Mesh) -> Mesh:
    """The devices of the last shard, one per data row, where all prompts end.

    Raises:
      AstraError: they are on several hosts, of which none could go on with all prompts.
    """
    ends, (data, hosts) = mesh.devices[:, -1], (mesh.shape[DATA], len({d.process_index for d in mesh.devices.flat}))
    if len({device.process_index for device in ends}) > 1:
        raise AstraError(
            f"--devices {data}x{mesh.shape[SEQ]}: texts end on several of the {hosts} hosts, and one has to go on with "
            f"all of them: use --devices {hosts}, or at least {data}x{hosts}"
        )
    return Mesh(ends, (DATA,))


def prefill_program(model: Any, graphdef: Any, mesh: Mesh, make: Make = Astra.of) -> Any:
    """Prefill on a mesh, jitted: weights and `Text` -> on every device, what decoding from its shard's end needs.

    That is the logits of the last token [B,1,V], what every block kept (`Kept`), how many tokens are its own [B,1],
    and of the remote tokens position and validity [B,R] (None on one device). The weights may be shapes, to compile
    ahead of time.
    """
    N = mesh.shape[SEQ]

    def work(state: Any, ids: Array, strategy: Any) -> Any:
        model = nnx.merge(graphdef, state)
        states, kept = model.states(ids, dataclasses.replace(strategy, keep=True))
        own = strategy.tokens().valid.sum(-1)  # [B]
        last = jnp.take_along_axis(states, jnp.maximum(own - 1, 0)[:, None, None], axis=1)
        remote = None
        if not isinstance(strategy, Single):
            tokens = strategy.remote_tokens()
            remote = (tokens.position, tokens.valid)
        return model.logits(last), kept, own[:, None], remote

    by_block, by_row = P(None, DATA, SEQ), P(DATA, SEQ)
    specs: Any = (by_row, Kept(*cast(Any, [by_block] * 3)), by_row, by_row)
    if N == 1:  # nothing is remote
        specs = (by_row, specs[1]._replace(message=None), by_row, None)

    @jax.jit
    def prefill(state: Any, text: Text) -> Any:
        strategy = make_for(mesh, make)(model, N, text)
        return on_mesh(work, mesh, strategy, specs)(state, model.to_tokens(text))

    return prefill


class Generator:
    """A decoder that is compiled for a (data, seq) mesh: a prefill program and a decoding program per bucket.

    Args:
      model: a causal language model of `astra_jax.models`.
      mesh: from `make_mesh`. Prefill uses all of it; decoding the devices of the last shard, one per data row.
      fast_path: see `astra_jax.serving.compile.parallelize`.
      make: what makes the strategy of prefill, an `Astra`.

    Raises:
      AstraError: the model is no causal language model, there are several shards and it has no codebooks, or no host
        has the ends of all prompts.
    """

    def __init__(self, model: Any, mesh: Mesh, fast_path: bool = True, make: Make = Astra.of):
        if not model.per_token:
            raise AstraError("this checkpoint is no language model: it cannot generate text")
        self.model, self.mesh = model, mesh
        self.graphdef, self.state = place(model, mesh, make, fast_path)
        # Of several hosts only one has the ends of the prompts: the others take part in prefill and are done.
        self.ends = ends_of(mesh)
        self.here = self.ends.devices[0].process_index == jax.process_index()
        self.end_state = jax.tree.map(lambda a: self._at_the_end(a, P()), self.state) if self.here else None
        self._prefill = prefill_program(model, self.graphdef, mesh, make)
        self._cache = jax.jit(_make_cache, static_argnames="more")
        self._decode = jax.jit(self._run_decode, donate_argnames="cache")
        self._sample = jax.jit(sample)

    def _at_the_end(self, array: Array, spec: P) -> Array:
        """What the devices of the last shard hold of an array, as an array on them alone: nothing moves."""
        pieces = {shard.device: shard.data for shard in array.addressable_shards}
        local = [pieces[device] for device in self.ends.devices]
        shape = [
            n * len(local) if axis == DATA else n for n, axis in zip(local[0].shape, [*spec, *[None] * 9], strict=False)
        ]
        return jax.make_array_from_single_device_arrays(tuple(shape), NamedSharding(self.ends, spec), local)

    def prefill(self, text: Text, new_tokens: int) -> tuple[Float[Array, "B V"], Cache]:
        """Runs prompts through the model on all devices.

        Args:
          text: the prompts; B must be a multiple of the mesh's data axis.
          new_tokens: how many tokens the cache shall have room for.

        Returns:
          The logits of the next token of every prompt, and the cache, both on the devices of the last shard.
        """
        logits, kept, own, remote = self._prefill(self.state, text)
        by_block = P(None, DATA)
        kept = jax.tree.map(lambda a: self._at_the_end(a, by_block), kept)
        logits, own, remote = jax.tree.map(lambda a: self._at_the_end(a, P(DATA)), (logits, own, remote))
        lengths = jax.device_put(jnp.asarray(text.lengths), NamedSharding(self.ends, P(DATA)))
        cache = self._cache(kept, own[:, 0], lengths, remote, more=bucket(new_tokens, 1 << 30))
        return logits[:, 0], cache

    def _run_decode(
        self, state: Any, cache: Cache, ids: Int[Array, "B"], key: Key[Array, ""], numbers: Any
    ) -> tuple[Cache, Float[Array, "B V"], Int[Array, "B"]]:
        model = nnx.merge(self.graphdef, state)
        states, kept = model.states(ids[:, None], Decode(cache))
        logits = model.logits(states)[:, 0]
        return cache.append(kept), logits, sample(logits, key, numbers)

    def decode(
        self, cache: Cache, ids: Int[Array, "B"], key: Key[Array, ""], sampling: Sampling
    ) -> tuple[Cache, Float[Array, "B V"], Int[Array, "B"]]:
        """One token more: cache (which is used up) and the last tokens -> cache, logits and the next tokens."""
        return self._decode(self.end_state, cache, ids, key, sampling.numbers)

    def check(self, text: Text, new_tokens: int) -> None:
        """Raises AstraError if prompts and new tokens together are longer than the model's limit."""
        limit, longest = self.model.config.max_position_embeddings, int(np.max(text.lengths))
        if new_tokens < 1:
            raise AstraError(f"the number of new tokens is {new_tokens}; it must be at least 1")
        if longest + new_tokens > limit + 1:  # the last token drawn is not read
            raise AstraError(
                f"a prompt of {longest} and {new_tokens} new tokens are more than the model takes, {limit}: "
                "ask for fewer or shorten the prompt"
            )

    def tokens(self, text: Text, new_tokens: int, sampling: Sampling) -> Iterator[Int[np.ndarray, "B"]]:
        """Generates: yields the next token of every sequence, `new_tokens` times or until the caller stops.

        Any batch size goes; it is padded to a multiple of the mesh's data axis. `cache_memory` is known after the
        first token. Where the ends of the prompts are on another host (not `here`), nothing is yielded.

        Raises:
          AstraError: see `check`.
        """
        self.check(text, new_tokens)
        lengths = np.asarray(text.lengths)
        B = len(lengths)
        more = -B % self.mesh.shape[DATA]
        text = Text(np.pad(text.ids, [(0, more), (0, 0)]), np.pad(lengths, (0, more), constant_values=1))
        if not self.here:
            jax.block_until_ready(self._prefill(self.state, text))
            return
        key = jax.random.key(sampling.seed)
        logits, cache = self.prefill(text, new_tokens)
        self.cache_memory = memory(cache)
        ids = self._sample(logits, jax.random.fold_in(key, 0), sampling.numbers)
        yield np.asarray(ids)[:B]
        for step in range(1, new_tokens):
            cache, _, ids = self.decode(cache, ids, jax.random.fold_in(key, step), sampling)
            yield np.asarray(ids)[:B]


def _make_cache(kept: Kept, own: Array, lengths: Array, remote: Any, more: int) -> Cache:
    """The cache after prefill, with room for `more` own tokens."""
    room: Any = partial(jnp.pad, pad_width=[(0, 0), (0, 0), (0, more), (0, 0), (0, 0)])
    position, valid = remote if remote is not None else (None, None)
    return Cache(room(kept.key), room(kept.value), own, lengths, kept.message, position, valid)
