"""A batch that texts enter and leave while it runs (continuous batching): the rows of one compiled step."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from astra_jax.errors import AstraError
from astra_jax.inputs.token_batches import Text, bucket
from astra_jax.serving.cache import Memory, memory
from astra_jax.serving.generate import Generator, Rows
from astra_jax.serving.sampling import Draws, Sampling, seeded

NO_LIMIT = 1 << 30


class Token(NamedTuple):
    """A token of a row, and whether it is the last that was asked for: then the row is free again."""

    row: int
    id: int
    last: bool


class _Row(NamedTuple):
    """What is known of a row on the host: how many tokens are still to come, and what drawing one takes."""

    due: int
    work: int


class Batch:
    """Texts that are decoded together, each with its own sampling and length.

    What a text says does not depend on the others, nor on when it entered. The cache has one shape for all rows, which
    grows where a longer prompt enters; so a step has one program for each such shape.

    Args:
      generator: the compiled model.
      slots: texts that there is room for; rounded up to a multiple of the mesh's data axis.
    """

    def __init__(self, generator: Generator, slots: int):
        self.generator, self._devices = generator, generator.mesh.shape["data"]
        self._each = -(-slots // self._devices)
        self._rows: Rows | None = None
        self._in = dict[int, _Row]()
        self._drawn = list[Token]()  # first tokens, which nobody was told yet

    @property
    def free(self) -> int:
        """How many texts more can enter."""
        return self._each * self._devices - len(self._busy)

    @property
    def _busy(self) -> set[int]:
        """Rows that are in, or whose only token nobody was told yet."""
        return {*self._in, *(token.row for token in self._drawn)}

    @property
    def memory(self) -> Memory:
        """What the cache of all rows takes."""
        return memory(self._rows.cache) if self._rows else Memory(0, 0)

    def enter(self, text: Text, new_tokens: Sequence[int], sampling: Sequence[Sampling]) -> list[int]:
        """Reads prompts on all devices, together. `step` tells their first tokens before it takes a step.

        Args:
          text: the prompts.
          new_tokens: for each how many tokens it goes on for.
          sampling: for each how they are drawn.

        Returns:
          The row of each prompt; where the ends of the prompts are on another host, none.

        Raises:
          AstraError: more prompts than `free`, or one that is too long (`Generator.check`).
        """
        lengths = np.asarray(text.lengths)
        for length, more in zip(lengths.tolist(), new_tokens, strict=True):
            self.generator.check(length, more)
        if len(lengths) > self.free:
            raise AstraError(
                f"{len(lengths)} texts cannot enter where {self.free} have room: wait until others are done"
            )
        rows = self._places(len(lengths))
        spread, slots, order = self._spread(text, rows)
        fresh = self.generator.prefill(spread)
        if fresh is None:
            return []
        M, R = fresh[1].room
        M += bucket(max(new_tokens), NO_LIMIT)
        if self._rows:
            M, R = (max(new, old) for new, old in zip((M, R), self._rows.cache.room, strict=True))
        draws = Draws.of([Sampling() if n is None else sampling[n] for n in order])
        work = max(one.work for one in sampling)
        self._rows = self.generator.enter(
            self._rows, fresh, draws, slots, work=work, count=self._each * self._devices, room=(M, R)
        )
        self._in |= {row: _Row(due, one.work) for row, due, one in zip(rows, new_tokens, sampling, strict=True)}
        self._drawn += self._tokens(rows)
        return rows

    def step(self) -> list[Token]:
        """The next token of every row that is in; of rows that just entered the first, before others go on."""
        drawn, self._drawn = self._drawn, []
        if drawn or not self._in:
            return drawn
        assert self._rows
        self._rows, _ = self.generator.decode(self._rows, max(row.work for row in self._in.values()))
        return self._tokens(list(self._in))

    def leave(self, row: int) -> None:
        """Takes a text out before it is as long as was asked for."""
        self._in.pop(row, None)
        self._drawn = [token for token in self._drawn if token.row != row]

    def _tokens(self, rows: Sequence[int]) -> list[Token]:
        """The last tokens of these rows; whose last it was is out."""
        assert self._rows
        ids, found = np.asarray(self._rows.ids), list[Token]()
        for row in rows:
            due, work = self._in.pop(row)
            if due > 1:
                self._in[row] = _Row(due - 1, work)
            found.append(Token(row, int(ids[row]), due == 1))
        return found

    def _places(self, count: int) -> list[int]:
        """Free rows for so many texts, on each device as many as on the others where that can be."""
        free = [
            [row for row in range(device * self._each, (device + 1) * self._each) if row not in self._busy]
            for device in range(self._devices)
        ]
        return [max(free, key=len).pop(0) for _ in range(count)]

    def _spread(self, text: Text, rows: Sequence[int]) -> tuple[Text, Int[np.ndarray, "B"], list[int | None]]:
        """Prompts on the devices of their rows, padded to as many on each, with their rows there (-1 of padding), and
        which prompt each is."""
        on = [[n for n, row in enumerate(rows) if row // self._each == device] for device in range(self._devices)]
        most = max(map(len, on))
        order = [n for numbers in on for n in [*numbers, *[None] * (most - len(numbers))]]
        there = np.asarray([n is not None for n in order])
        which = np.asarray([n or 0 for n in order])
        lengths = np.where(there, np.asarray(text.lengths)[which], 1).astype(np.int32)
        slots = np.where(there, np.asarray(rows)[which] % self._each, -1).astype(np.int32)
        return Text(np.where(there[:, None], np.asarray(text.ids)[which], 0), lengths), slots, order


def tokens(generator: Generator, text: Text, new_tokens: int, sampling: Sampling) -> Iterator[Int[np.ndarray, "B"]]:
    """The next token of every text of a batch, `new_tokens` times or until the caller stops. Each row has the next seed
    of `sampling`. Where the ends of the prompts are on another host (not `Generator.here`), nothing is yielded.

    Raises:
      AstraError: see `Generator.check`.
    """
    B = len(text.lengths)
    batch = Batch(generator, B)
    rows = batch.enter(text, [new_tokens] * B, seeded(sampling, B))
    while found := {token.row: token.id for token in batch.step()}:
        yield np.asarray([found[row] for row in rows], np.int32)
