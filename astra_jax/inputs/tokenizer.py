"""Text <-> token ids, by the tokenizer that came with a checkpoint (`transformers`, without torch)."""

import contextlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from astra_jax.errors import AstraError, first_line
from astra_jax.files import in_utf8
from astra_jax.inputs.token_batches import typed

# What a tokenizer's files may be called; nothing else of a folder is copied or read.
FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
# What is kept beside them, for whoever talks with the model: how a conversation is written as one text.
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")


def tokenizer_names(folder: Path) -> tuple[str, ...]:
    """The files of a tokenizer that a folder has, by their names in it."""
    templates = (path.relative_to(folder).as_posix() for pattern in TEMPLATES for path in sorted(folder.glob(pattern)))
    return tuple(name for name in (*FILES, *templates) if (folder / name).is_file())


def own_class(folder: Path) -> str | None:
    """The class, of code in the folder or elsewhere, that a tokenizer_config.json asks for (`auto_map`); None for none.

    Raises:
      AstraError: the file cannot be read.
    """
    where = folder / "tokenizer_config.json"
    if not where.is_file():
        return None
    try:
        auto_map = json.loads(where.read_text(encoding="utf8")).get("auto_map")
        names = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise AstraError(f"{where}: is not valid JSON, or no object: is the file damaged?") from error
    names = names if isinstance(names, list) else [names]
    return next((str(name) for name in reversed(names) if name), None)


@contextlib.contextmanager
def _failing(folder: Path, what: str) -> Iterator[None]:
    """Turns what the libraries of tokenizers raise into an AstraError that says `what` failed."""
    try:
        yield
    except AstraError:
        raise
    except BaseException as error:  # of many kinds: JSON, missing files, missing sentencepiece, panics of Rust
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise AstraError(f"{folder}: {what} ({first_line(error)[:160]}): are its files damaged?") from error


def _read(folder: Path, lower: bool, plain: bool) -> Any:
    """The tokenizer of `transformers` in a folder; `plain` reads its tokenizer.json, whatever else it asks for.

    Raises:
      AstraError: it cannot be read.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it comments on a missing torch and on config.json, which do not matter here
    try:
        with _failing(folder, "the tokenizer cannot be read"):
            # takes over a second: only for those who read text
            from tokenizers.normalizers import Lowercase, Sequence
            from transformers import AutoTokenizer, PreTrainedTokenizerFast

            kind: Any = PreTrainedTokenizerFast if plain else AutoTokenizer
            with in_utf8(folder) as where:
                inner = kind.from_pretrained(str(where), local_files_only=True, trust_remote_code=False)
                if _is_another(inner, folder / "tokenizer.json"):
                    inner = PreTrainedTokenizerFast.from_pretrained(str(where), local_files_only=True)
            if lower:
                backend = inner.backend_tokenizer
                backend.normalizer = Sequence([Lowercase(), *([backend.normalizer] if backend.normalizer else [])])
            return inner
    finally:
        logging.disable(disabled)


def _is_another(inner: Any, file: Path) -> bool:
    """Whether `transformers` made another kind of tokenizer than a tokenizer.json says: for some families it takes the
    class that these had first, whose rules then are not those of the file."""
    backend = getattr(inner, "backend_tokenizer", None)
    if backend is None or not file.is_file():
        return False
    kind = re.search(r'"model"\s*:\s*\{\s*"type"\s*:\s*"(\w+)"', file.read_text(encoding="utf8", errors="replace"))
    return kind is not None and kind[1] != type(backend.model).__name__


class Tokenizer:
    """The tokenizer in a folder. No code of the folder is run, and nothing is downloaded.

    Where a folder asks for code of its own, its tokenizer.json is read as what it is: all that such a file says is done
    by the library that reads it.

    Args:
      folder: holds some of `FILES`, and config.json where these do not say what kind of tokenizer they are.
      vocab_size: V of the model.
      lower: whether texts are made lower case, whatever the tokenizer does.
      prompt: what is put before every text.
      drop_end: a token that does not count at the end of a text.
      types: how many types of tokens the model has; of less than two none are read.

    Raises:
      AstraError: there is no tokenizer, it cannot be read (not without code of its own, say), or it has ids that the
        model has no embedding for, other than those of tokens that were added to a vocabulary that fits.
    """

    def __init__(
        self,
        folder: Path,
        vocab_size: int,
        *,
        lower: bool = False,
        prompt: str = "",
        drop_end: int | None = None,
        types: int = 0,
    ):
        if not any((folder / name).is_file() for name in FILES):
            raise AstraError(f"{folder}: has no tokenizer.json or other tokenizer file: copy the model's into it")
        if (code := own_class(folder)) and not (folder / "tokenizer.json").is_file():
            raise AstraError(
                f"{folder}: the tokenizer is code of its own ({code}), which is never run: save it as a tokenizer.json "
                "with transformers, if its class can, and put that beside it"
            )
        self._inner = _read(folder, lower, plain=bool(code))
        self._folder, self._vocab_size, self._prompt, self._drop_end = folder, vocab_size, prompt, drop_end
        self._types = types
        vocabulary = self._inner.get_vocab()
        self.size = 1 + max(vocabulary.values(), default=-1)  # one more than the largest id
        self.beyond = {token: id for token, id in vocabulary.items() if id >= vocab_size}
        if set(self.beyond) - set(self._inner.get_added_vocab()):
            raise AstraError(
                f"{folder}: the tokenizer has ids up to {self.size - 1}, but vocab_size in config.json is "
                f"{vocab_size}: is it the tokenizer of another model?"
            )

    def encode(self, text: str | tuple[str, str], limit: int | None = None) -> list[int]:
        """The ids of a text, or of two as one, with the special tokens that the tokenizer adds; `typed` where the model
        has types. Cut to `limit` tokens if given, of two texts always at the end of the longer one.

        Raises:
          AstraError: the text has one of the tokens `beyond` the model's vocabulary, or of a type that it has not.
        """
        options: dict[str, Any] = {} if limit is None else {"truncation": True, "max_length": limit}
        options["return_token_type_ids"] = self._types > 1  # also where transformers' class of the tokenizer would not
        first, second = (text, None) if isinstance(text, str) else text
        with _failing(self._folder, "the tokenizer cannot read a text"):
            found = self._inner(self._prompt + first, second, verbose=False, **options)
        ids, types = found["input_ids"], found.get("token_type_ids", [])
        if self.beyond and max(ids, default=0) >= self._vocab_size:
            token = next(token for token, id in self.beyond.items() if id in ids)
            raise AstraError(
                f"the text has the token {token!r}, which the model has no embedding for ({self._folder} has it beyond "
                f"vocab_size {self._vocab_size}): leave it out"
            )
        while len(ids) > 1 and ids[-1] == self._drop_end:
            ids = ids[:-1]
        return self._typed(ids, types) if self._types > 1 and any(types) else ids

    def _typed(self, ids: list[int], types: list[int]) -> list[int]:
        if max(types) >= self._types:
            raise AstraError(
                f"{self._folder}: the tokenizer gives a token the type {max(types)}; the model has types up to "
                f"{self._types - 1}: is it the tokenizer of another model?"
            )
        return typed(ids, types[: len(ids)], self._vocab_size)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        with _failing(self._folder, "the tokenizer cannot write a text"):
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
