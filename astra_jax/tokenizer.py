"""Text <-> token ids, by the tokenizer that came with a checkpoint (`transformers`, without torch)."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from astra_jax.errors import AstraError

# What a tokenizer's files may be called; nothing else of a folder is copied or read.
FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model"),
)


class Tokenizer:
    """The tokenizer in a folder. No code of the folder is run, and nothing is downloaded.

    Args:
      folder: holds some of `FILES`, and config.json where these do not say what kind of tokenizer they are.
      vocab_size: V of the model.

    Raises:
      AstraError: there is no tokenizer, it cannot be read, or it has ids that the model has no embedding for.
    """

    def __init__(self, folder: Path, vocab_size: int):
        if not any((folder / name).is_file() for name in FILES):
            raise AstraError(f"{folder}: has no tokenizer.json or other tokenizer file: copy the model's into it")
        disabled = logging.root.manager.disable
        logging.disable(logging.WARNING)  # it comments on a missing torch and on config.json, which do not matter here
        try:
            from transformers import AutoTokenizer  # takes over a second: only for those who read text

            self._inner = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # of many kinds: JSON, tokenizers, missing files, missing sentencepiece
            reason = str(error).strip().split("\n")[0][:160]
            raise AstraError(f"{folder}: the tokenizer cannot be read ({type(error).__name__}: {reason})") from error
        finally:
            logging.disable(disabled)
        self.size = 1 + max(self._inner.get_vocab().values(), default=-1)  # one more than the largest id
        if self.size > vocab_size:
            raise AstraError(
                f"{folder}: the tokenizer has ids up to {self.size - 1}, but vocab_size in config.json is "
                f"{vocab_size}: is it the tokenizer of another model?"
            )

    def encode(self, text: str, limit: int | None = None) -> list[int]:
        """The ids of a text with the special tokens that the tokenizer adds, cut to `limit` tokens if given."""
        cut: dict[str, Any] = {} if limit is None else {"truncation": True, "max_length": limit}
        return self._inner(text, verbose=False, **cut)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        return str(self._inner.decode(list(ids), skip_special_tokens=True))

    def stream(self, prompt: Sequence[int] = ()) -> Callable[[int], str]:
        """A function from one id after the other to the text that it adds behind the prompt's ids: empty while a
        character is incomplete."""
        ids, start, shown = list(prompt), 0, len(prompt)

        def step(token: int) -> str:
            # What a token adds depends on what stands before it: on the tokens whose text was shown last.
            nonlocal start, shown
            ids.append(token)
            before, text = self.decode(ids[start:shown]), self.decode(ids[start:])
            if len(text) <= len(before) or text.endswith("\ufffd"):
                return ""
            start, shown = shown, len(ids)
            return text[len(before) :]

        return step
