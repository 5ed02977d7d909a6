"""Run one checkpoint with its tokens split over the devices that --devices picks.

It names what is in pictures (--image), or goes on with texts, classifies them or compares them (--prompt), whatever the
checkpoint is for.

On a CPU the devices are made by the program itself. Prints the answer, the time, and what crossed the link. A language
model reads the prompts on all devices and then goes on where their end is, without the others.
"""

import dataclasses
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
from jax.sharding import Mesh

import checkpoints
from astra_jax.cluster import Hosts, open_mesh
from astra_jax.console import Report, console, progress
from astra_jax.errors import AstraError
from astra_jax.generate import Continuation, Generator, Sampling
from astra_jax.parallel import Make, parallelize, shardings
from astra_jax.preprocess import decode_image
from astra_jax.sharding import SEQ
from astra_jax.strategies import STRATEGIES, Astra
from astra_jax.text import Text, longest, pad
from astra_jax.weights import Weights, quantize_weights, weight_bytes
from checkpoints import Checkpoint


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of `astra run`."""

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A checkpoint; with codebooks for more than one device."""
    image: tuple[Path, ...] = ()
    """One or more pictures."""
    prompt: tuple[str, ...] = ()
    """One or more texts; several are run as one batch."""
    devices: str | None = None
    """The mesh: N devices over the tokens, or DxN for D batches at once; by default 1, or one on each host."""
    several: Annotated[Hosts, tyro.conf.arg(name="")] = Hosts()
    top: int = 5
    """How many classes to print for each picture or text."""
    max_new_tokens: int | None = None
    """How many tokens to go on for, at most; by default 128, or what the model's limit leaves."""
    strategy: Literal["astra", "sp", "tp"] = "astra"
    """How several devices share the work: sp and tp are exact and need no codebooks, but send far more."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling()
    stop: tuple[str, ...] = ()
    """End where one of these strings comes up; it is not printed."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What is computed in, and kept in memory."""
    weights: Weights | None = None
    """Keep the weights of the blocks as integers of so many bits; they are multiplied in --dtype."""
    json: Path | None = None
    """Also write everything printed to this file."""


def timed(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """What `call` gives, its seconds, and those of an earlier call that had to compile."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        result = jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return result, seconds[1], seconds[0]


def sent_bytes(model: Any, N: int, inputs: Any, make: Make = Astra.of) -> int:
    """Bytes that every device gives to the collectives of all blocks, for one image or text of this batch."""
    return make(model, N, inputs).wire_bits(model) // 8 if N > 1 else 0


def class_rows(checkpoint: Checkpoint, logits: Any, names: list[str], top: int) -> list[dict[str, Any]]:
    """The likeliest classes of every input, with their probabilities."""
    probabilities = np.asarray(jax.nn.softmax(logits))
    labels = checkpoint.labels or tuple(str(c) for c in range(probabilities.shape[1]))
    return [
        {"input": name, "class": labels[c], "probability": float(p[c])}
        for name, p in zip(names, probabilities, strict=True)
        for c in np.argsort(-p)[:top]
    ]


def similarity_rows(embeddings: Any, names: list[str]) -> list[dict[str, Any]]:
    """The cosine of the embeddings of every pair of sentences."""
    unit = np.asarray(embeddings) / np.linalg.norm(embeddings, axis=-1, keepdims=True)
    pairs = itertools.combinations(range(len(names)), 2)
    return [{"sentence": names[a], "and": names[b], "cosine": float(unit[a] @ unit[b])} for a, b in pairs]


def run_once(args: Args, checkpoint: Checkpoint, mesh: Mesh, inputs: Any, names: list[str], report: Report) -> None:
    """Pictures or texts through a classifier or a sentence encoder."""
    make = STRATEGIES[args.strategy].of
    program = parallelize(checkpoint.model, mesh, make)
    output, seconds, first = timed(lambda: program(inputs))
    where = f"{args.checkpoint} on {mesh.size} device(s)"
    if getattr(checkpoint.config, "task", None) == "embedding":
        report.table("similarities", where, similarity_rows(output, names))
    else:
        report.table("classes", where, class_rows(checkpoint, output, names, args.top))
    sent, codes = sent_bytes(checkpoint.model, mesh.shape[SEQ], inputs, make), args.strategy == "astra"
    report.say(
        f"{1e3 * seconds:.1f} ms for {len(names)} input(s), {first:.1f} s with compilation; "
        f"each device sent {sent:,} bytes{' of codes' * codes} per input",
        seconds=seconds,
        first_seconds=first,
        **{"code_bytes_per_input" if codes else "bytes_per_input": sent},
    )


def generate(args: Args, checkpoint: Checkpoint, mesh: Mesh, text: Text, report: Report) -> None:
    """Goes on with prompts: one is printed as it grows, several at the end."""
    lengths, N = np.asarray(text.lengths), mesh.shape[SEQ]
    room = checkpoint.config.max_position_embeddings + 1 - int(lengths.max())
    new_tokens = min(128, room) if args.max_new_tokens is None else args.max_new_tokens
    prompts = [row[:length].tolist() for row, length in zip(text.ids, lengths, strict=True)]
    rows = [Continuation(checkpoint.tokenizer.stream(ids), checkpoint.eos_ids, args.stop) for ids in prompts]
    generator = Generator(checkpoint.model, mesh)
    if not generator.here:
        for _ in range(2):  # as often as below
            list(generator.tokens(text, new_tokens, args.sampling))
        return

    start = time.perf_counter()
    list(itertools.islice(generator.tokens(text, new_tokens, args.sampling), 2))
    compiled = time.perf_counter() - start

    one = len(rows) == 1
    show = partial(console.print, end="", markup=False, soft_wrap=True) if one else lambda text: None
    show(args.prompt[0])
    start, seconds = time.perf_counter(), []
    with nullcontext(lambda: None) if one else progress("tokens", new_tokens) as advance:
        for step in generator.tokens(text, new_tokens, args.sampling):
            seconds.append(time.perf_counter() - start)
            for row, token in zip(rows, step.tolist(), strict=True):
                show(row.add(token))
            advance()
            if all(row.done for row in rows):
                break
    for row in rows:
        show(row.rest())
    show("\n")
    if not one:
        for prompt, row in zip(args.prompt, rows, strict=True):
            report.say(f"--- {prompt}{row.text}")
    counts, sent = [row.count for row in rows], sent_bytes(checkpoint.model, N, text)
    rate = (len(seconds) - 1) / (seconds[-1] - seconds[0]) if len(seconds) > 1 else 0.0
    kept, full = generator.cache_memory
    report.say(
        f"first token after {1e3 * seconds[0]:.1f} ms ({compiled:.1f} s with compilation), then {rate:.1f} tokens/s; "
        f"each device sent {sent:,} bytes of codes per prompt",
        texts=[row.text for row in rows],
        prompt_tokens=lengths.tolist(),
        new_tokens=counts,
        first_token_seconds=seconds[0],
        compile_seconds=compiled,
        tokens_per_second=rate,
        code_bytes_per_prompt=sent,
    )
    if N > 1:
        report.say(
            f"the cache keeps remote tokens as {kept:,} bytes of codes instead of {full:,} bytes of keys and values",
            cache_code_bytes=kept,
            cache_full_bytes=full,
        )


def main(args: Args) -> None:
    """Runs `astra run`."""
    report = Report("run", args.json)
    if args.top < 1:
        raise AstraError(f"--top is {args.top}; it must be at least 1")
    mesh = open_mesh(args.devices, args.several)
    N = mesh.shape[SEQ]
    dtype = jnp.dtype(args.dtype)
    make = STRATEGIES[args.strategy].of
    # Straight to where they are needed: no device ever holds more than its own.
    where = partial(shardings, mesh=mesh, make=make)
    checkpoint = checkpoints.load(args.checkpoint, dtype=dtype, param_dtype=dtype, shardings=where)
    if args.weights:
        before, model = weight_bytes(checkpoint.model), quantize_weights(checkpoint.model, args.weights)
        checkpoint, after = dataclasses.replace(checkpoint, model=model), weight_bytes(model)
        report.say(
            f"the weights take {after:,} bytes instead of {before:,}", weight_bytes=after, full_weight_bytes=before
        )
    images = checkpoint.family == "vit"
    given, other = ("image", "prompt") if images else ("prompt", "image")
    if not getattr(args, given) or getattr(args, other):
        raise AstraError(f"{args.checkpoint}: takes {'pictures' if images else 'text'}: give --{given}, not --{other}")
    if images:
        pixels = np.asarray(checkpoint.processor([decode_image(path) for path in args.image]))
        run_once(args, checkpoint, mesh, pixels, [str(path) for path in args.image], report)
    else:
        if checkpoint.config.task == "embedding" and len(args.prompt) < 2:
            raise AstraError(f"{args.checkpoint}: is a sentence encoder: give two or more texts with --prompt")
        text = pad([checkpoint.tokenizer.encode(p) for p in args.prompt], longest(checkpoint.config))
        shortest = int(np.min(text.lengths))
        if shortest < N:
            report.say(f"a prompt of {shortest} token(s) uses {shortest} of the {N} devices")
        if checkpoint.config.task == "causal-lm":
            if args.strategy != "astra":
                raise AstraError(f"--strategy {args.strategy}: texts go on from codes only: leave the option out")
            generate(args, checkpoint, mesh, text, report)
        else:
            run_once(args, checkpoint, mesh, text, list(args.prompt), report)
    report.close()
