"""A checkpoint that is loaded once, on one mesh, and answers requests: classes, similarities, or how a text goes on.

Used by `astra run` for one request and by `astra worker` for any number: programs stay compiled, weights in place.
"""

import dataclasses
import io
import itertools
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh
from PIL import Image

import checkpoints
from astra_jax.codecs.config import Similarity
from astra_jax.errors import AstraError
from astra_jax.hosts.agreement import Same, contents, options
from astra_jax.hosts.distributed import Hosts, open_mesh
from astra_jax.inputs.images import decode_image
from astra_jax.inputs.token_batches import Text
from astra_jax.mesh.sharding import SEQ
from astra_jax.models.weight_quantization import Weights, quantize_weights, weight_bytes
from astra_jax.serving.compile import STRATEGIES, Make, shardings
from astra_jax.serving.engine import Classes, Engine
from astra_jax.serving.generate import ends_of
from checkpoints.tensor_maps import embeds
from eval.quality.similarity import similarities
from eval.service.messages import (
    Message,
    PassTime,
    Piece,
    Quantized,
    ShortText,
    Table,
    TextBegins,
    TextTime,
)
from eval.service.passes import Passes
from eval.service.requests import Request


@dataclasses.dataclass(frozen=True)
class Loading:
    """How a checkpoint is loaded."""

    groups: int | None = None
    """Send only the first so many groups of the codes of a nested-pq codec: fewer bits; by default all."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What is computed in, and kept in memory."""
    weights: Weights | None = None
    """Keep the weights of the blocks as integers of so many bits; they are multiplied in --dtype."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is loaded, and where it runs: what stays the same for all requests."""

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A checkpoint; with codebooks for more than one device."""
    devices: str | None = None
    """The mesh: N devices over the tokens, or DxN for D batches at once; by default 1, or one on each host."""
    several: Annotated[Hosts, tyro.conf.arg(name="several hosts as one mesh"), tyro.conf.OmitArgPrefixes] = Hosts()
    strategy: Literal["astra", "sp", "tp"] = "astra"
    """How several devices share the work: sp and tp are exact and need no codebooks, but send far more."""
    loading: Annotated[Loading, tyro.conf.arg(name="")] = Loading()

    def __post_init__(self) -> None:
        if self.loading.groups is not None and self.strategy != "astra":
            raise AstraError(f"--groups is about codes, which strategy {self.strategy} does not send: leave it out")


def class_rows(found: Sequence[Classes], names: Sequence[str]) -> list[dict[str, Any]]:
    """The classes of every input, as rows of a table."""
    return [
        {"input": name, "class": score.label, classes.called: score.value}
        for name, classes in zip(names, found, strict=True)
        for score in classes.best
    ]


def similarity_rows(
    embeddings: Any, names: Sequence[str], by: Similarity = "cosine", one: str = "sentence"
) -> list[dict[str, Any]]:
    """How similar the embeddings of every pair of inputs are, compared as the model is made for.

    Args:
      one: what an input is called.
    """
    rows = np.asarray(embeddings)
    pairs = itertools.combinations(range(len(names)), 2)
    return [
        {one: names[a], "and": names[b], by: float(similarities(rows[a : a + 1], rows[b : b + 1], by)[0])}
        for a, b in pairs
    ]


class Service:
    """A checkpoint on a mesh, and its requests.

    Args:
      setup: which checkpoint, and where.
      same: finds out what else has to be the same on all hosts.

    Attributes:
      notes: what there is to say about loading.

    Raises:
      AstraError: see `astra_jax.hosts.distributed.open_mesh`, `checkpoints.load` and `Engine`.
    """

    passes: Any  # runs the passes of the engine, and knows how long the last one took

    def __init__(self, setup: Setup, same: Same = dict):
        self.name, self.codes = str(setup.checkpoint), setup.strategy == "astra"
        mesh = open_mesh(
            setup.devices, setup.several, same=lambda: options(setup) | contents([setup.checkpoint]) | dict(same())
        )
        if getattr(checkpoints.read_meta(setup.checkpoint).config, "task", None) == "causal-lm":
            ends_of(mesh)  # before anything is loaded
            if not self.codes:
                raise AstraError(f"--strategy {setup.strategy}: texts go on from codes only: leave the option out")
        make = STRATEGIES[setup.strategy].of
        self.notes = list[Message]()
        self.checkpoint = self._load(setup.checkpoint, setup.loading, mesh, make)
        self.passes = Passes()
        self.engine = Engine(self.checkpoint, mesh, make=make, passing=self.passes)

    def _load(self, checkpoint: Path, how: Loading, mesh: Mesh, make: Make) -> checkpoints.Checkpoint:
        """The checkpoint, on the devices of a mesh."""
        dtype = jnp.dtype(how.dtype)
        found = checkpoints.load(
            checkpoint,
            dtype=dtype,
            param_dtype=dtype,
            # Straight to where they are needed: no device ever holds more than its own.
            shardings=partial(shardings, mesh=mesh, make=make),
            groups=how.groups,
        )
        if not how.weights:
            return found
        before, model = weight_bytes(found.model), quantize_weights(found.model, how.weights)
        self.notes.append(Quantized(weight_bytes(model), before))
        return dataclasses.replace(found, model=model)

    @property
    def N(self) -> int:
        """Devices over the tokens."""
        return int(self.engine.mesh.shape[SEQ])

    @property
    def devices(self) -> int:
        """Devices in all."""
        return int(self.engine.mesh.size)

    def sent_bytes(self, inputs: Any) -> int:
        """Bytes that every device gives to the collectives of all blocks, for one image or text of this batch."""
        engine, N = self.engine, self.N
        return engine.make(engine.model, N, inputs).wire_bits(engine.model) // 8 if N > 1 else 0

    def smaller(self, request: Request) -> Request:
        """The same request in fewer bytes, where pictures are larger than what the model reads of them.

        Raises:
          AstraError: a picture cannot be read, or the checkpoint's folder holds another one than was loaded.
        """
        if checkpoints.read_meta(self.name).digest != self.checkpoint.digest:
            raise AstraError(f"{self.name} is another checkpoint now than was loaded: start the workers again")
        if self.checkpoint.config.input_kind != "images":  # `encode` says so
            return request
        return dataclasses.replace(request, files=tuple(map(self._smaller, request.files, request.names)))

    def _smaller(self, file: bytes, name: str) -> bytes:
        processor, image = self.checkpoint.processor, decode_image(file, name)
        if processor is None or processor.crop_size:  # what is cut out would be resized again
            return file
        small = io.BytesIO()
        Image.fromarray(processor.resize([image])[0].squeeze()).save(small, "PNG")
        return min(file, small.getvalue(), key=len)

    def encode(self, request: Request) -> Any:
        """What the model reads. Raises AstraError for what it does not take."""
        images, task = self.engine.input_kind == "images", self.engine.task
        given, other = (request.names, request.prompts) if images else (request.prompts, request.names)
        if not given or other:
            takes, gave, not_ = ("pictures", "image", "prompt") if images else ("text", "prompt", "image")
            raise AstraError(f"{self.name}: takes {takes}: give --{gave}, not --{not_}")
        if embeds(self.checkpoint.config) and len(given) < 2:
            encoder, what = ("an", "pictures with --image") if images else ("a sentence", "texts with --prompt")
            raise AstraError(f"{self.name}: is {encoder} encoder: give two or more {what}")
        if images:
            return self.engine.encode(map(decode_image, request.files, request.names))
        if request.pairs and task != "classification":
            raise AstraError(f"{self.name}: --pair is for classifiers, and this is a model for {task}: leave it out")
        text = self.engine.encode(request.texts)
        if task == "causal-lm":
            self._new_tokens(text, request)
        return text

    def _new_tokens(self, text: Any, request: Request) -> int:
        """The most tokens of a prompt. Raises AstraError where the model does not take so many."""
        lengths = np.asarray(text.lengths).tolist()
        return max(map(self.engine.new_tokens, lengths, request.wishes.of_texts(len(lengths))))

    def answer(self, request: Request, inputs: Any) -> Iterator[Message]:
        """Answers a request; on several hosts all of them have to, to the end, and only host 0 says something.

        Args:
          inputs: what `encode` makes of it.

        Raises:
          AstraError: it cannot be computed. Another one can be answered.
        """
        yield from (self._texts if self.engine.task == "causal-lm" else self._table)(request, inputs)

    def _preface(self, inputs: Any) -> Iterator[Message]:
        if isinstance(inputs, Text) and (shortest := int(np.min(inputs.lengths))) < self.N:
            yield ShortText(shortest, self.N)

    def _table(self, request: Request, inputs: Any) -> Iterator[Message]:
        names, engine, config = request.called, self.engine, self.checkpoint.config
        if embeds(config):
            one = "picture" if request.names else "sentence"
            kind, rows = "similarities", similarity_rows(engine.embed(inputs), names, config.similarity, one)
        else:
            kind, rows = "classes", class_rows(engine.classify(inputs, request.wishes.top), names)
        if jax.process_index():
            return
        yield from self._preface(inputs)
        yield Table(kind, self.name, self.devices, rows)
        sent = self.sent_bytes(inputs)
        yield PassTime(self.passes.seconds, self.passes.compile_seconds, len(names), sent, self.codes)

    def _texts(self, request: Request, text: Text) -> Iterator[Message]:
        B = len(request.prompts)
        generation = self.engine.generate(text, request.wishes.of_texts(B))
        if not self.engine.here:
            return
        yield from self._preface(text)
        yield TextBegins(self._new_tokens(text, request))
        start, last, counts = time.perf_counter(), 0.0, [0] * B
        for event in generation:
            if counts[event.row] == max(counts):  # the first of a step
                last = time.perf_counter() - start
            counts[event.row] += 1
            yield Piece(*event)
        steps, memory = max(counts), generation.memory
        yield TextTime(
            prompt_tokens=list(generation.lengths),
            first_token_seconds=self.passes.seconds,
            compile_seconds=self.passes.compile_seconds,
            tokens_per_second=(steps - 1) / last if steps > 1 else 0.0,
            sent=self.sent_bytes(text),
            cache_code_bytes=memory.codes,
            cache_full_bytes=memory.key_value,
            devices=self.N,
        )
