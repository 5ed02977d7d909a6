"""Where a text ends, and which of its characters may be shown already."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from astra_jax.errors import AstraError
from astra_jax.inputs.token_batches import check_text

End = Literal["eos", "stop", "length"]  # why a text ended


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

    Attributes:
      text: what there is of it.
      count: tokens so far.
      end: why it ended; None while it has not.
    """

    def __init__(self, stream: Callable[[int], str], eos: Sequence[int], stop: Sequence[str] = ()):
        check_stop(stop)
        self._stream, self._eos, self._stop = stream, frozenset(eos), tuple(stop)
        self._shown = 0
        self.text, self.count = "", 0
        self.end: End | None = None

    def add(self, token: int) -> str:
        """Adds a token, if the text has not ended. Returns what can be shown now: no part of a stop string."""
        if self.end:
            return ""
        self.count += 1
        if token in self._eos:
            self.end = "eos"
            return self.rest()
        self.text += self._stream(token)
        ends = [self.text.find(stop) for stop in self._stop if stop in self.text]
        if ends:
            self.text, self.end = self.text[: min(ends)], "stop"
            return self.rest()
        # A tail that may become a stop string is held back.
        held = max((self._begun(stop) for stop in self._stop), default=0)
        return self._show(len(self.text) - held)

    def cut(self) -> str:
        """Ends the text where it is, if it has not ended: it is as long as was asked for. Returns what was held
        back."""
        self.end = self.end or "length"
        return self.rest()

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
