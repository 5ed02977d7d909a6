"""What is asked: pictures or texts, how they are to be answered, and the same as a message to workers."""

import dataclasses
import json
from typing import Annotated, Any

import tyro

from astra_jax.errors import AstraError
from astra_jax.hosts.control import MOST_BYTES
from astra_jax.inputs.token_batches import check_text
from astra_jax.serving.continuation import check_stop
from astra_jax.serving.engine import TextOptions
from astra_jax.serving.sampling import Sampling, is_whole, seeded

MOST_CHARACTERS = 1 << 22  # of a prompt, our choice: more than 2^17 tokens have, and no tokenizer takes long
MOST_INPUTS = 1024  # pictures or texts of a request to workers


@dataclasses.dataclass(frozen=True)
class Wishes:
    """How a request is to be answered."""

    top: int = 5
    """How many classes to print for each picture or text."""
    max_new_tokens: int | None = None
    """How many tokens to go on for, at most; by default 128, or what the model's limit leaves."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="drawing tokens"), tyro.conf.OmitArgPrefixes] = Sampling()
    stop: tuple[str, ...] = ()
    """End where one of these strings comes up; it is not printed."""

    def __post_init__(self) -> None:
        if not is_whole(self.top) or self.top < 1:
            raise AstraError(f"--top is {self.top}; it must be at least 1")
        if self.max_new_tokens is not None and not is_whole(self.max_new_tokens):
            raise AstraError(f"--max-new-tokens is {self.max_new_tokens}; it must be a whole number")
        check_stop(self.stop)

    def of_texts(self, B: int) -> list[TextOptions]:
        """How each of B prompts is gone on with."""
        return [TextOptions(self.max_new_tokens, sampling, self.stop) for sampling in seeded(self.sampling, B)]


@dataclasses.dataclass(frozen=True)
class Request:
    """Pictures or texts, and how they are to be answered.

    Attributes:
      names: of the pictures.
      files: their contents, in one of `astra_jax.inputs.images.FORMATS`.
      prompts: the texts.
      pairs: what is read with each of them, as one; () where they are read alone.

    Raises:
      AstraError: a prompt is no text, or longer than any model takes; some have no other text.
    """

    names: tuple[str, ...] = ()
    files: tuple[bytes, ...] = ()
    prompts: tuple[str, ...] = ()
    wishes: Wishes = Wishes()
    pairs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for option, texts in (("--prompt", self.prompts), ("--pair", self.pairs)):
            for text in texts:
                check_text(option, text)
                if len(text) > MOST_CHARACTERS:
                    raise AstraError(f"{option} has {len(text):,} characters; at most {MOST_CHARACTERS:,} are read")
        if self.pairs and len(self.pairs) != len(self.prompts):
            raise AstraError(
                f"there are {len(self.prompts)} texts with --prompt and {len(self.pairs)} with --pair: give one of "
                "--pair for each"
            )

    @property
    def texts(self) -> tuple[str | tuple[str, str], ...]:
        """The prompts, each with what is read with it."""
        return tuple(zip(self.prompts, self.pairs, strict=True)) if self.pairs else self.prompts

    @property
    def called(self) -> tuple[str, ...]:
        """What an answer calls the inputs."""
        return self.names or tuple(" | ".join(text) if isinstance(text, tuple) else text for text in self.texts)


def packed(request: Request) -> bytes:
    """A request as a line of JSON, and the pictures one after the other.

    Raises:
      AstraError: it is more than workers take.
    """
    count, size = max(len(request.files), len(request.prompts)), sum(map(len, request.files))
    if count > MOST_INPUTS:
        raise AstraError(f"{count:,} inputs are more than workers take at once, {MOST_INPUTS:,}: ask for fewer")
    fields = dataclasses.asdict(request) | {"files": [len(file) for file in request.files]}
    head = json.dumps(fields).encode() + b"\n"
    if len(head) + size > MOST_BYTES:
        raise AstraError(
            f"the request has {len(head) + size:,} bytes, {size:,} of them pictures; workers take at most "
            f"{MOST_BYTES:,}: ask for fewer at once, or smaller ones"
        )
    return head + b"".join(request.files)


def unpacked(body: bytes) -> Request:
    """The inverse of `packed`. Raises AstraError for anything else, and for values that no request may have."""
    head, _, rest = body.partition(b"\n")
    try:
        fields, files = json.loads(head), []
        for size in _list(fields["files"], MOST_INPUTS):
            if not is_whole(size) or not 0 <= size <= len(rest):
                raise ValueError("a size that is none")
            files.append(rest[:size])
            rest = rest[size:]
        names, prompts, pairs = (_list(fields[name], MOST_INPUTS) for name in ("names", "prompts", "pairs"))
        if rest or len(names) != len(files) or not all(isinstance(name, str) for name in names):
            raise ValueError("names and files that do not fit")
        given = fields["wishes"]
        sampling, stop = Sampling(**given["sampling"]), _list(given["stop"], MOST_INPUTS)
        wishes = Wishes(**given | {"sampling": sampling, "stop": tuple(stop)})
        return Request(tuple(names), tuple(files), tuple(prompts), wishes, tuple(pairs))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise AstraError("what was asked is not understood: use the same version of astra for both") from error


def _list(value: Any, most: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        raise ValueError("no list, or a longer one than is taken")
    return value
