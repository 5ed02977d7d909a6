"""A loaded checkpoint that is asked for classes, embeddings, or how texts go on: typed results, nothing printed."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar, cast, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from astra_jax.errors import AstraError
from astra_jax.inputs import InputKind
from astra_jax.inputs.images import ImageProcessor
from astra_jax.inputs.token_batches import Text, bucket, longest, most_tokens, pad
from astra_jax.inputs.tokenizer import Tokenizer
from astra_jax.serving.batch import NO_LIMIT, Batch
from astra_jax.serving.cache import Memory
from astra_jax.serving.compile import Make, make_for, parallelize, place
from astra_jax.serving.continuation import Continuation, End, check_stop
from astra_jax.serving.generate import Generator
from astra_jax.serving.sampling import Sampling, is_whole
from astra_jax.strategies.coded import Astra

NEW_TOKENS = 128  # where nobody says how many, our choice
# What a checkpoint is for -> the method of `Engine` that does it.
METHODS = {"causal-lm": "generate", "embedding": "embed", "image-embedding": "embed", "classification": "classify"}

Result = TypeVar("Result")
Encoded = Text | np.ndarray | Array  # what the model reads


class Loaded(Protocol):
    """What an engine reads of a checkpoint; `checkpoints.Checkpoint` is one."""

    @property
    def config(self) -> Any: ...
    @property
    def model(self) -> Any: ...
    @property
    def labels(self) -> tuple[str, ...] | None: ...
    @property
    def processor(self) -> ImageProcessor: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def eos_ids(self) -> tuple[int, ...]: ...
    def problem(self, outputs: int) -> str: ...


if not TYPE_CHECKING:  # whoever checks types while a program runs would look at a tokenizer that there is not
    Loaded = Any


@runtime_checkable
class Passing(Protocol):
    """Runs a pass that all devices take part in.

    Args:
      inputs: what it is for.
      call: the pass.
      compile_all: compiles what the pass and what follows it need, if `call` is not all of that.
      programs: what has programs of its own, beside the shapes of inputs.
    """

    def __call__(
        self,
        inputs: Any,
        call: Callable[[], Result],
        compile_all: Callable[[], Any] | None = None,
        programs: Any = None,
    ) -> Result: ...


def at_once(
    inputs: Any, call: Callable[[], Result], compile_all: Callable[[], Any] | None = None, programs: Any = None
) -> Result:
    """The plain way to run a pass: whatever it needs is compiled on the way."""
    return call()


class Score(NamedTuple):
    """A class, and its probability or score."""

    label: str
    value: float


class Classes(NamedTuple):
    """What a classifier says of one input: its likeliest classes first, and what their values are."""

    called: Literal["probability", "score"]
    best: tuple[Score, ...]


class Event(NamedTuple):
    """A text went on by a token.

    Attributes:
      row: which of the prompts.
      token: its id.
      text: what can be shown now: nothing of a character that is incomplete, or of a stop string that may have begun.
      end: why the text ends here, at an end-of-text token, a stop string or its greatest length; None where it goes on.
    """

    row: int
    token: int
    text: str
    end: End | None


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """How one prompt is gone on with.

    Raises:
      AstraError: a value is of another type, or outside its range.
    """

    max_new_tokens: int | None = None
    """How many tokens to go on for, at most; by default 128, or what the model's limit leaves."""
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    """End where one of these strings comes up; it is no part of the text."""

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and not is_whole(self.max_new_tokens):
            raise AstraError(f"--max-new-tokens is {self.max_new_tokens}; it must be a whole number")
        check_stop(self.stop)


# What a classifier's outputs become, and what that is called, by `Loaded.problem`.
OUTPUTS: dict[str, tuple[Literal["probability", "score"], Callable[[Any], Any]]] = {
    "single_label_classification": ("probability", jax.nn.softmax),
    "multi_label_classification": ("probability", jax.nn.sigmoid),
    "regression": ("score", np.asarray),
}


def classes(checkpoint: Loaded, logits: Any, top: int) -> list[Classes]:
    """The likeliest classes of every row of logits [B,C], with their probabilities (a softmax, or each for itself) or
    scores."""
    called, function = OUTPUTS[checkpoint.problem(logits.shape[1])]
    values = np.asarray(function(np.asarray(logits)))
    labels = checkpoint.labels or tuple(map(str, range(values.shape[1])))
    return [
        Classes(called, tuple(Score(labels[c], float(row[c])) for c in np.argsort(-row, kind="stable")[:top]))
        for row in values
    ]


class Generation:
    """How prompts go on, as `Event`s in the order in which tokens come, until all texts have ended.

    Attributes:
      lengths: tokens of the prompts.
      memory: bytes of the remote tokens in the cache.
    """

    def __init__(self, batch: Batch, rows: Sequence[int], texts: Sequence[Continuation], lengths: Sequence[int]):
        self.lengths, self.memory = tuple(lengths), batch.memory
        self._batch, self._rows, self._texts = batch, rows, texts

    lengths: tuple[int, ...]
    memory: Memory

    def __iter__(self) -> Iterator[Event]:
        prompts = {row: prompt for prompt, row in enumerate(self._rows)}
        while found := self._batch.step():
            for token in found:
                prompt = prompts[token.row]
                text = self._texts[prompt]
                piece = text.add(token.id)
                if token.last:
                    piece += text.cut()
                if text.end:
                    self._batch.leave(token.row)
                yield Event(prompt, token.id, piece, text.end)


class Engine:
    """A checkpoint on a mesh: its weights are placed once, and its programs stay compiled.

    For example, with a language model and a classifier of pictures that were calibrated for several devices:

        import checkpoints
        from astra_jax import Engine, make_mesh

        engine = Engine(checkpoints.load("gpt2-astra"), make_mesh(4))
        for event in engine.generate(["Once upon a time"]):
            print(event.text, end="")

        engine = Engine(checkpoints.load("vit-astra"), make_mesh(4))
        for found in engine.classify([Image.open("cat.png")], top=3):
            print(found.best)

    On several hosts every one calls the same, and the one that has the ends of the prompts goes on with texts.

    Args:
      checkpoint: with codebooks for more than one device.
      mesh: from `make_mesh`.
      make: what makes the strategy, such as `TensorParallel.of`; by default ASTRA. Texts go on from codes only.
      passing: what runs the passes of all devices, for who measures them or has hosts agree on them.
      placed: the weights, where they are placed already (`like`).

    Raises:
      AstraError: see `parallelize` and `Generator`.
    """

    def __init__(
        self,
        checkpoint: Loaded,
        mesh: Mesh,
        *,
        make: Make = Astra.of,
        passing: Passing = at_once,
        placed: Any = None,
    ):
        self.checkpoint, self.mesh, self.model, self._passing = checkpoint, mesh, checkpoint.model, passing
        self.make = make
        self.input_kind: InputKind = checkpoint.config.input_kind
        self.task: str = getattr(checkpoint.config, "task", "classification")
        self._placed = placed or place(self.model, mesh, make_for(mesh, make))
        if self.task == "causal-lm":
            self._generator = Generator(self.model, mesh, make, self._placed)
        else:
            self._program = parallelize(self.model, mesh, make, self._placed)

    def like(self, make: Make) -> "Engine":
        """The same with another strategy, such as one of several hosts, and with the same weights in their places."""
        return Engine(self.checkpoint, self.mesh, make=make, passing=self._passing, placed=self._placed)

    def take_part(self, inputs: Encoded) -> None:
        """What a host does for an answer that another one gives."""
        if self.task == "causal-lm":
            self._generator.prefill(cast(Text, inputs))
        else:
            jax.block_until_ready(self._program(inputs))

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Of the checkpoint; raises AstraError if it has none."""
        return self.checkpoint.tokenizer

    @property
    def here(self) -> bool:
        """Whether the answer is on this host: of texts it is on the one where the prompts end."""
        return self.task != "causal-lm" or self._generator.here

    def encode(self, inputs: Iterable[Any]) -> Encoded:
        """What the model reads, of any number of pictures (Pillow, or uint8 arrays) or of texts. A classifier
        also reads pairs of texts: tuples of two.

        Pictures are taken one after the other: many that are small as files may be too large for the memory.

        Raises:
          AstraError: there is none, or one that the model does not take.
        """
        if isinstance(inputs, str):
            raise AstraError("the inputs are one text: give a list of them")
        if self.input_kind == "images":
            found = [self.checkpoint.processor([picture]) for picture in inputs]
            if not found:
                raise AstraError("there is no picture: give at least one")
            return np.concatenate(found)
        texts = list(inputs)
        if self.task != "classification" and not all(isinstance(text, str) for text in texts):
            raise AstraError(f"pairs of texts are for classifiers, and this checkpoint is for {self.task}: give texts")
        return pad([self.tokenizer.encode(text) for text in texts], longest(self.checkpoint.config))

    def _encoded(self, inputs: Encoded | Iterable[Any]) -> Any:
        return inputs if isinstance(inputs, Text | np.ndarray | Array) else self.encode(inputs)

    def _need(self, method: str) -> None:
        if METHODS[self.task] != method:
            raise AstraError(f"this checkpoint is for {self.task}: call {METHODS[self.task]}")

    def _run(self, inputs: Encoded) -> Float[Array, "B _"]:
        return self._passing(inputs, lambda: self._program(inputs))

    def classify(self, inputs: Encoded | Iterable[Any], top: int = 5) -> list[Classes]:
        """The likeliest classes of every picture or text.

        Args:
          inputs: pictures or texts, or what `encode` made of them.
          top: how many classes of each.

        Raises:
          AstraError: the model is no classifier, or does not take these (`encode`).
        """
        self._need("classify")
        return classes(self.checkpoint, self._run(self._encoded(inputs)), top)

    def embed(self, inputs: Encoded | Iterable[Any]) -> Float[np.ndarray, "B D"]:
        """An embedding of every picture or text; `config.similarity` says how they are compared.

        Raises:
          AstraError: the model gives no embeddings, or does not take these (`encode`).
        """
        self._need("embed")
        return np.asarray(self._run(self._encoded(inputs)))

    def new_tokens(self, length: int, options: TextOptions) -> int:
        """For how many tokens a prompt of so many goes on, at most. Raises AstraError where the model takes fewer."""
        room = most_tokens(self.checkpoint.config) + 1 - length
        found = min(NEW_TOKENS, room) if options.max_new_tokens is None else options.max_new_tokens
        self._generator.check(length, found)
        return int(found)

    def generate(
        self, prompts: Encoded | Iterable[str], options: TextOptions | Sequence[TextOptions] = TextOptions()
    ) -> Generation:
        """Reads prompts on all devices, and goes on with them where they end.

        Args:
          prompts: the texts, or what `encode` made of them.
          options: for all prompts, or for each its own.

        Raises:
          AstraError: the model is no language model, or does not take these (`encode`, `new_tokens`).
        """
        self._need("generate")
        text = self._encoded(prompts)
        lengths = np.asarray(text.lengths).tolist()
        each = [options] * len(lengths) if isinstance(options, TextOptions) else list(options)
        if len(each) != len(lengths):
            raise AstraError(f"there are {len(lengths)} prompts and options for {len(each)}: give them for each")
        new_tokens, sampling = list(map(self.new_tokens, lengths, each)), [one.sampling for one in each]

        def begin() -> tuple[Batch, list[int]]:
            batch = Batch(self._generator, len(lengths))
            return batch, batch.enter(text, new_tokens, sampling)

        def compile_all() -> None:
            batch, _ = begin()
            batch.step()  # the first tokens
            batch.step()

        most = max(new_tokens)
        batch, rows = self._passing(text, begin, compile_all, (bucket(most, NO_LIMIT), most > 1))
        prompts_ids = [row[:length].tolist() for row, length in zip(text.ids, lengths, strict=True)]
        texts = [
            Continuation(self.tokenizer.stream(ids), self.checkpoint.eos_ids, one.stop)
            for ids, one in zip(prompts_ids, each, strict=True)
        ]
        return Generation(batch, rows, texts, lengths)
