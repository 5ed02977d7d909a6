"""Run one checkpoint with its tokens split over the devices that --devices picks.

It names what is in pictures (--image), or goes on with texts, classifies them or compares them (--prompt), whatever the
checkpoint is for; a classifier of pairs of texts reads --prompt and --pair as one.

On a CPU the devices are made by the program itself. Prints the answer, the time, and what crossed the link. A language
model reads the prompts on all devices and then goes on where their end is, without the others. With --join, `astra
worker` has loaded the checkpoint already, on other hosts or here, and answers at once.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import tyro

from astra_jax.errors import AstraError
from astra_jax.hosts.agreement import inputs, options
from astra_jax.hosts.invitation import Invitation
from astra_jax.report import Report
from eval.service.client import ask
from eval.service.messages import Message
from eval.service.requests import Request, Wishes
from eval.service.screen import Screen
from eval.service.service import Service, Setup


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of `astra run`."""

    setup: Annotated[Setup, tyro.conf.arg(name="")]
    image: tuple[Path, ...] = ()
    """One or more pictures."""
    prompt: tuple[str, ...] = ()
    """One or more texts; several are run as one batch."""
    pair: tuple[str, ...] = ()
    """For a classifier of pairs of texts: what each --prompt is read with."""
    wishes: Annotated[Wishes, tyro.conf.arg(name="")] = Wishes()
    join: str | None = None
    """Let workers answer: the invitation that the first of them printed, or its address and port."""
    secret_file: Path | None = None
    """With --join: a file with the secret of the invitation; by default ASTRA_SECRET has it."""
    json: Path | None = None
    """Also write everything printed to this file."""


def read(path: Path) -> bytes:
    """The content of a picture's file. Raises AstraError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise AstraError(f"{path}: cannot be read ({error.strerror}): check the path") from error


def brought(request: Request) -> dict[str, str]:
    """What of a request has to be the same on all hosts. Of pictures it is what is in the files."""
    texts = inputs("prompt", request.prompts) | inputs("pair", request.pairs)
    return options(request.wishes) | inputs("picture", request.files) | texts


def main(args: Args) -> None:
    """Runs `astra run`."""
    report = Report("run", args.json)

    @functools.cache
    def request() -> Request:
        return Request(tuple(map(str, args.image)), tuple(map(read, args.image)), args.prompt, args.wishes, args.pair)

    if args.setup.several.coordinator is None:
        request()  # before a model is loaded; of several hosts, when they meet: who cannot read says so to all
    with Screen(report, args.prompt) as screen:
        for message in answer(args, request):
            screen.print(message)
    report.close()


def answer(args: Args, request: Callable[[], Request]) -> Iterator[Message]:
    """The answer, of workers or of a checkpoint that is loaded here.

    Raises:
      AstraError: see `eval.service.client.ask`, and `eval.service.service.Service`.
    """
    if args.join:
        if args.setup != Setup(args.setup.checkpoint):
            raise AstraError("--join: how the checkpoint is loaded and split was said to the workers: leave it out")
        yield from ask(Invitation.read(args.join, args.secret_file), args.setup.checkpoint, request())
        return
    service = Service(args.setup, lambda: brought(request()))
    yield from service.notes
    yield from service.answer(request(), service.encode(request()))
