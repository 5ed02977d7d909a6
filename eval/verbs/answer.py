"""A checkpoint that is loaded once, on one mesh, and answers requests: classes, similarities, or how a text goes on.

Used by `astra run` for one request and by `astra worker` for any number: programs stay compiled, weights in place.
"""

import dataclasses
import io
import itertools
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Int
from PIL import Image

import checkpoints
from astra_jax.codecs.config import Similarity
from astra_jax.errors import AstraError
from astra_jax.hosts import runtime
from astra_jax.hosts.agreement import Same, options
from astra_jax.hosts.heartbeat import Policy
from astra_jax.hosts.options import Hosts
from astra_jax.hosts.preflight import pair_rows
from astra_jax.inputs.images import decode_image
from astra_jax.inputs.token_batches import Text, bucket, check_text, longest, pad
from astra_jax.mesh.sharding import DATA, SEQ, hosts_of
from astra_jax.models.weight_quantization import Weights, quantize_weights, weight_bytes
from astra_jax.report import Report, progress
from astra_jax.serving.compile import STRATEGIES, Make, make_for, parallelize, shardings
from astra_jax.serving.generate import Continuation, Generator, Sampling, check_stop, ends_of, is_whole
from astra_jax.strategies.base import Astra
from checkpoints import Checkpoint
from checkpoints.configs import Problem, problem_of
from eval.cost.flops import flops
from eval.cost.timing import share
from eval.cost.traffic import abstract
from eval.network.model import volume
from eval.network.pass_profile import heard, observe, rows, told
from eval.quality.similarity import similarities

MOST_PROGRAMS = 64  # that are kept in memory, our choice; the compiled ones are on a disk, too
MOST_CHARACTERS = 1 << 22  # of a prompt, our choice: more than 2^17 tokens have, and no tokenizer takes long


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is loaded, and where it runs: what stays the same for all requests."""

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A checkpoint; with codebooks for more than one device."""
    devices: str | None = None
    """The mesh: N devices over the tokens, or DxN for D batches at once; by default 1, or one on each host."""
    several: Annotated[Hosts, tyro.conf.arg(name="")] = Hosts()
    on_failure: Policy = "fail"
    """When another host is gone: fail, or host 0 answers alone (single), or all that are left do (shrink)."""
    groups: int | None = None
    """Send only the first so many groups of the codes of a nested-pq codec: fewer bits; by default all."""
    coded_blocks: int | None = None
    """Let only the first so many blocks send codes; the others go by what is predicted from these, which takes a
    predictor (docs/accuracy-per-bit.md). By default as the checkpoint was made for: all, unless it was finetuned so."""
    strategy: Literal["astra", "sp", "tp"] = "astra"
    """How several devices share the work: sp and tp are exact and need no codebooks, but send far more."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What is computed in, and kept in memory."""
    weights: Weights | None = None
    """Keep the weights of the blocks as integers of so many bits; they are multiplied in --dtype."""
    fast_path: Literal["on", "off"] = "on"
    """Exact short cuts where they pay (docs/performance.md); off for the plain form."""


@dataclasses.dataclass(frozen=True)
class Wishes:
    """How a request is to be answered."""

    top: int = 5
    """How many classes to print for each picture or text."""
    max_new_tokens: int | None = None
    """How many tokens to go on for, at most; by default 128, or what the model's limit leaves."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling()
    stop: tuple[str, ...] = ()
    """End where one of these strings comes up; it is not printed."""

    def __post_init__(self) -> None:
        if not is_whole(self.top) or self.top < 1:
            raise AstraError(f"--top is {self.top}; it must be at least 1")
        if self.max_new_tokens is not None and not is_whole(self.max_new_tokens):
            raise AstraError(f"--max-new-tokens is {self.max_new_tokens}; it must be a whole number")
        check_stop(self.stop)


@dataclasses.dataclass(frozen=True)
class Request:
    """Pictures or texts, and how they are to be answered.

    Attributes:
      names: of the pictures.
      files: their contents, in one of `preprocess.FORMATS`.
      prompts: the texts.

    Raises:
      AstraError: a prompt is no text, or longer than any model takes.
    """

    names: tuple[str, ...] = ()
    files: tuple[bytes, ...] = ()
    prompts: tuple[str, ...] = ()
    wishes: Wishes = Wishes()

    def __post_init__(self) -> None:
        for prompt in self.prompts:
            check_text("--prompt", prompt)
            if len(prompt) > MOST_CHARACTERS:
                raise AstraError(f"--prompt has {len(prompt):,} characters; at most {MOST_CHARACTERS:,} are read")


def sent_bytes(model: Any, N: int, inputs: Any, make: Make = Astra.of) -> int:
    """Bytes that every device gives to the collectives of all blocks, for one image or text of this batch."""
    return make(model, N, inputs).wire_bits(model) // 8 if N > 1 else 0


# What a classifier's outputs become, and what that is called.
OUTPUTS: dict[Problem, tuple[str, Callable[[Any], Any]]] = {
    "single_label_classification": ("probability", jax.nn.softmax),
    "multi_label_classification": ("probability", jax.nn.sigmoid),
    "regression": ("score", np.asarray),
}


def class_rows(checkpoint: Checkpoint, logits: Any, names: tuple[str, ...], top: int) -> list[dict[str, Any]]:
    """The likeliest classes of every input with their probabilities, as a softmax or each for itself; or its scores."""
    called, function = OUTPUTS[problem_of(checkpoint.hf_config, logits.shape[1])]
    values = np.asarray(function(logits))
    labels = checkpoint.labels or tuple(str(c) for c in range(values.shape[1]))
    return [
        {"input": name, "class": labels[c], called: float(row[c])}
        for name, row in zip(names, values, strict=True)
        for c in np.argsort(-row, kind="stable")[:top]
    ]


def similarity_rows(embeddings: Any, names: tuple[str, ...], by: Similarity = "cosine") -> list[dict[str, Any]]:
    """How similar the embeddings of every pair of sentences are, compared as the model is made for."""
    rows = np.asarray(embeddings)
    pairs = itertools.combinations(range(len(names)), 2)
    return [
        {"sentence": names[a], "and": names[b], by: float(similarities(rows[a : a + 1], rows[b : b + 1], by)[0])}
        for a, b in pairs
    ]


def ways_out(hosts: Int[np.ndarray, "data seq"]) -> list[int]:
    """From how many of its devices each host sends to another one, where a row of the mesh is a ring."""
    out = hosts != np.roll(hosts, -1, axis=1)
    return [int(np.sum(out & (hosts == host))) for host in range(hosts.max() + 1)]


class Answerer:
    """A checkpoint on a mesh.

    Args:
      setup: which checkpoint, and where.
      report: what is said about loading.
      same: finds out what else has to be the same on all hosts.

    Raises:
      AstraError: see `astra_jax.hosts.runtime.open_mesh` and `checkpoints.load`.
    """

    def __init__(self, setup: Setup, report: Report, same: Same = dict):
        self.name, self.strategy, self.fast_path = str(setup.checkpoint), setup.strategy, setup.fast_path == "on"
        about_codes = {"--groups": setup.groups, "--coded-blocks": setup.coded_blocks}
        given = [option for option, value in about_codes.items() if value is not None]
        if given and setup.strategy != "astra":
            raise AstraError(f"{given[0]} is about codes, which strategy {setup.strategy} does not send: leave it out")
        self.mesh = runtime.open_mesh(
            setup.devices,
            setup.several,
            checkpoints=[setup.checkpoint],
            policy=setup.on_failure,
            same=lambda: options(setup) | dict(same()),
        )
        if getattr(checkpoints.read_meta(setup.checkpoint).config, "task", None) == "causal-lm":
            ends_of(self.mesh)  # before anything is loaded
        self.make = STRATEGIES[setup.strategy].of
        self.here = runtime.membership()
        if self.here:
            report.data["pairs"] = pair_rows(self.here.findings.pairs)
        dtype = jnp.dtype(setup.dtype)
        # Straight to where they are needed: no device ever holds more than its own.
        where = partial(shardings, mesh=self.mesh, make=self.make)
        checkpoint = checkpoints.load(
            setup.checkpoint,
            dtype=dtype,
            param_dtype=dtype,
            shardings=where,
            groups=setup.groups,
            coded_blocks=setup.coded_blocks,
        )
        if setup.weights:
            before, model = weight_bytes(checkpoint.model), quantize_weights(checkpoint.model, setup.weights)
            checkpoint, after = dataclasses.replace(checkpoint, model=model), weight_bytes(model)
            report.say(
                f"the weights take {after:,} bytes instead of {before:,}", weight_bytes=after, full_weight_bytes=before
            )
        self.checkpoint, self.model = checkpoint, checkpoint.model
        self.images = checkpoint.config.input_kind == "images"
        self.task = None if self.images else checkpoint.config.task
        if self.task == "causal-lm":
            if self.strategy != "astra":
                raise AstraError(f"--strategy {self.strategy}: texts go on from codes only: leave the option out")
            self.generator = Generator(self.model, self.mesh, self.fast_path, self.make)
        else:
            self.program = parallelize(self.model, self.mesh, self.make, self.fast_path)
        self._compiled = set[Any]()  # shapes of inputs, and what else needs a program of its own
        self._counted = dict[tuple[str, int], int]()

    @property
    def N(self) -> int:
        """Devices over the tokens."""
        return int(self.mesh.shape[SEQ])

    def shrink(self, request: Request) -> Request:
        """The same request in fewer bytes, where pictures are larger than what the model reads of them.

        Raises:
          AstraError: a picture cannot be read, or the checkpoint's folder holds another one than was loaded.
        """
        if checkpoints.read_meta(self.name).digest != self.checkpoint.digest:
            raise AstraError(f"{self.name} is another checkpoint now than was loaded: start the workers again")
        if not self.images:  # `inputs` says so
            return request
        return dataclasses.replace(request, files=tuple(map(self._shrink, request.files, request.names)))

    def _shrink(self, file: bytes, name: str) -> bytes:
        processor, image = self.checkpoint.processor, decode_image(file, name)
        if processor is None or processor.crop_size:  # what is cut out would be resized again
            return file
        smaller = io.BytesIO()
        Image.fromarray(processor.resize([image])[0].squeeze()).save(smaller, "PNG")
        return min(file, smaller.getvalue(), key=len)

    def inputs(self, request: Request) -> Any:
        """What the model reads. Raises AstraError for what it does not take."""
        given, other = (request.names, request.prompts) if self.images else (request.prompts, request.names)
        if not given or other:
            takes, gave, not_ = ("pictures", "image", "prompt") if self.images else ("text", "prompt", "image")
            raise AstraError(f"{self.name}: takes {takes}: give --{gave}, not --{not_}")
        if self.images:
            # One after the other: many that are small as files may be too large for the memory as pictures.
            pictures = zip(request.files, request.names, strict=True)
            return np.concatenate([self.checkpoint.processor([decode_image(file, name)]) for file, name in pictures])
        if self.task == "embedding" and len(request.prompts) < 2:
            raise AstraError(f"{self.name}: is a sentence encoder: give two or more texts with --prompt")
        text = pad([self.checkpoint.tokenizer.encode(p) for p in request.prompts], longest(self.checkpoint.config))
        if self.task == "causal-lm":
            self.generator.check(text, self._new_tokens(text, request.wishes))
        return text

    def answer(self, read: Callable[[], tuple[Request, Any]], report: Report) -> None:
        """Answers a request; on several hosts all of them have to, and only host 0 reports.

        Args:
          read: gives the request and its `inputs`.

        Raises:
          AstraError: on all hosts, where one of them cannot read or compute it. They can answer another request.
          Torn: see `astra_jax.hosts.runtime.agreed`.
        """
        (request, inputs), _ = runtime.agreed(read, exchanges=False)
        work = self._generate if self.task == "causal-lm" else self._classify
        work(request, inputs, report)

    def _preface(self, inputs: Any, report: Report) -> None:
        if again := runtime.again():
            report.say(
                f"answered by {again.hosts} of {again.were} hosts: {again.why}", began_anew=dataclasses.asdict(again)
            )
        if not self.images and (shortest := int(np.min(inputs.lengths))) < self.N:
            report.say(f"a prompt of {shortest} token(s) uses {shortest} of the {self.N} devices")

    def _classify(self, request: Request, inputs: Any, report: Report) -> None:
        names = request.names or request.prompts
        output, seconds, first = self._passed(inputs, lambda: self.program(inputs))
        if jax.process_index():
            return
        self._preface(inputs, report)
        where = f"{self.name} on {self.mesh.size} device(s)"
        if self.task == "embedding":
            report.table("similarities", where, similarity_rows(output, names, self.checkpoint.config.similarity))
        else:
            report.table("classes", where, class_rows(self.checkpoint, output, names, request.wishes.top))
        sent, codes = sent_bytes(self.model, self.N, inputs, self.make), self.strategy == "astra"
        compiled = f", {first:.1f} s with compilation" if first else ""
        report.say(
            f"{1e3 * seconds:.1f} ms for {len(names)} input(s){compiled}; "
            f"each device sent {sent:,} bytes{' of codes' * codes} per input",
            seconds=seconds,
            first_seconds=first,
            **{"code_bytes_per_input" if codes else "bytes_per_input": sent},
        )
        self._say_where_time_went(report, inputs)

    def _new_tokens(self, text: Text, wishes: Wishes) -> int:
        room = self.checkpoint.config.max_position_embeddings + 1 - int(np.max(text.lengths))
        return min(128, room) if wishes.max_new_tokens is None else wishes.max_new_tokens

    def _generate(self, request: Request, text: Text, report: Report) -> None:
        """Goes on with prompts: one is printed as it grows, several at the end."""
        wishes, generator = request.wishes, self.generator
        lengths, new_tokens = np.asarray(text.lengths), self._new_tokens(text, wishes)
        tokens: Any = iter(())

        def first_token() -> Any:
            nonlocal tokens
            tokens = generator.tokens(text, new_tokens, wishes.sampling)
            return next(tokens, None)

        def compile_all() -> Any:
            return list(itertools.islice(generator.tokens(text, new_tokens, wishes.sampling), 2))

        programs = (len(wishes.sampling.numbers), bucket(new_tokens, 1 << 30), new_tokens > 1)
        step, first_seconds, compiled = self._passed(text, first_token, compile_all, programs)
        if not generator.here:
            return
        self._preface(text, report)
        prompts = [row[:length].tolist() for row, length in zip(text.ids, lengths, strict=True)]
        texts = [
            Continuation(self.checkpoint.tokenizer.stream(p), self.checkpoint.eos_ids, wishes.stop) for p in prompts
        ]
        one = len(texts) == 1
        show = report.show if one else lambda text: None
        show(request.prompts[0])
        start, seconds = time.perf_counter(), [0.0]
        with nullcontext(lambda: None) if one else progress("tokens", new_tokens) as advance:
            while step is not None:
                for continuation, token in zip(texts, step.tolist(), strict=True):
                    show(continuation.add(token))
                advance()
                if all(continuation.done for continuation in texts):
                    break
                step = next(tokens, None)
                seconds += [time.perf_counter() - start] * (step is not None)
        for continuation in texts:
            show(continuation.rest())
        show("\n")
        if not one:
            for prompt, continuation in zip(request.prompts, texts, strict=True):
                report.show(f"--- {prompt}{continuation.text}\n")
        sent = sent_bytes(self.model, self.N, text, self.make)
        rate = (len(seconds) - 1) / seconds[-1] if len(seconds) > 1 else 0.0
        kept, full = generator.cache_memory
        with_compilation = f" ({compiled:.1f} s with compilation)" if compiled else ""
        report.say(
            f"first token after {1e3 * first_seconds:.1f} ms{with_compilation}, then {rate:.1f} tokens/s; "
            f"each device sent {sent:,} bytes of codes per prompt",
            texts=[continuation.text for continuation in texts],
            prompt_tokens=lengths.tolist(),
            new_tokens=[continuation.count for continuation in texts],
            first_token_seconds=first_seconds,
            compile_seconds=compiled,
            tokens_per_second=rate,
            code_bytes_per_prompt=sent,
        )
        if self.N > 1:
            report.say(
                f"the cache keeps remote tokens as {kept:,} bytes of codes instead of {full:,} of keys and values",
                cache_code_bytes=kept,
                cache_full_bytes=full,
            )
        self._say_where_time_went(report, text)

    def _passed(
        self, inputs: Any, call: Callable[[], Any], compile_all: Callable[[], Any] | None = None, programs: Any = None
    ) -> tuple[Any, float, float]:
        """One pass: what `call` gives, its seconds, and those of an earlier one that had to compile (0: none had to).

        From here on host 0 needs no other host to answer.

        Args:
          compile_all: what compiles, if `call` is not all that has to be.
          programs: what, beside the shapes of inputs, has programs of its own.
        """
        key, compiled = (str(jax.tree.map(np.shape, inputs)), programs), 0.0
        if key not in self._compiled:
            if len(self._compiled) >= MOST_PROGRAMS:  # the same on all hosts
                jax.clear_caches()
                self._compiled.clear()
                self._counted.clear()
            start = time.perf_counter()
            runtime.agreed(lambda: jax.block_until_ready((compile_all or call)()), exchanges=True)
            compiled = time.perf_counter() - start
            self._compiled.add(key)
        if not self.here:
            start = time.perf_counter()
            result = jax.block_until_ready(call())
            return result, time.perf_counter() - start, compiled
        (result, passed), all_told = runtime.agreed(lambda: observe(call), True, lambda found: told(found[1]))
        self._passes = list(map(heard, all_told))
        self.here.lifeline.need(False)
        return result, passed.seconds, compiled

    def _say_where_time_went(self, report: Report, inputs: Any) -> None:
        """On host 0 of several: what each did, and what one device alone would have taken. The answer is there already,
        so that what fails here is no failure of it."""
        if not self.here or jax.process_index():
            return
        try:
            self._say_passes(report, inputs)
        except Exception as error:
            report.say(f"where the time went is not known: {runtime.reason(error)}")

    def _say_passes(self, report: Report, inputs: Any) -> None:
        B, hosts = len(inputs.lengths) if isinstance(inputs, Text) else len(inputs), hosts_of(self.mesh)
        rows_each, devices_each = -(-B // self.mesh.shape[DATA]), int(np.sum(hosts == 0))
        messages = make_for(self.mesh, self.make)(self.model, self.N, inputs).messages(self.model) * rows_each
        # A host's devices compute and exchange at the same time.
        passes = [p._replace(collectives=tuple(s / devices_each for s in p.collectives)) for p in self._passes]
        table = rows(passes, volume(messages, self.N, "each")[0] / 8)
        for row, ways in zip(table, ways_out(hosts), strict=True):
            row["predicted"] *= ways
        report.table("hosts", "where the time went", table)
        computed, here = table[0]["compute ms"], table[0]["total ms"]
        if computed is None or here is None:
            return
        of_all, of_one = (self._operations(inputs, n) for n in (1, self.N))
        alone = computed * of_all * B / (of_one * rows_each * devices_each)
        advice = f"{alone / here:.2f} times as long" if alone > here else "which is less: stay on one device"
        report.say(
            f"host 0 alone would take {alone:,.4g} ms (by its operations), {advice}",
            single_ms=alone,
            speed_up=alone / here,
        )

    def _operations(self, inputs: Any, N: int) -> int:
        """Of one of N devices, counted once for every shape of inputs."""
        key = (str(jax.tree.map(np.shape, inputs)), N)
        if key not in self._counted:
            mine = share(abstract(self.model), N, inputs, self.make, self.fast_path)
            self._counted[key] = flops(mine.run, *mine.arguments)
        return self._counted[key]
