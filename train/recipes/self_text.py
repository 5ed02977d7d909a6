"""Let a language model write texts of its own, to calibrate and finetune on where its training text is not at hand.

    python -m train.recipes.self_text CHECKPOINT OUT.txt

Every text starts from the model's begin-of-text token, is drawn at temperature 1 and so follows the distribution that
the model has learned. Texts are separated by lines `<|endoftext|>`: use OUT.txt with --separator '<|endoftext|>'.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

import checkpoints
from astra_jax.cli.arguments import parse
from astra_jax.cli.main import guarded
from astra_jax.errors import AstraError
from astra_jax.files import check_output, write_output
from astra_jax.inputs.token_batches import most_tokens, pad
from astra_jax.mesh.sharding import make_mesh
from astra_jax.report import progress, say
from astra_jax.serving.batch import tokens
from astra_jax.serving.continuation import Continuation
from astra_jax.serving.generate import Generator
from astra_jax.serving.sampling import Sampling

SEPARATOR = "\n<|endoftext|>\n"


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of the recipe."""

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A language model made by `astra convert`."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The text file."""
    texts: int = 1024
    """How many texts."""
    batch_size: int = 64
    """Texts that are written at once."""
    seed: int = 0
    """Seed of the drawing."""


def main(args: Args) -> None:
    """Runs the recipe."""
    check_output("OUT", args.out)
    checkpoint = checkpoints.load(args.checkpoint)
    tokenizer = checkpoint.tokenizer
    begin = tokenizer.encode("") or list(checkpoint.eos_ids[:1])
    if not begin:
        raise AstraError(f"{args.checkpoint}: its tokenizer has no begin-of-text token to start from")
    limit = most_tokens(checkpoint.config)
    generator = Generator(checkpoint.model, make_mesh(1))
    prompts = pad([begin] * args.batch_size, limit)
    texts: list[str] = []
    with progress("texts", args.texts) as advance:
        for batch in range(-(-args.texts // args.batch_size)):
            rows = [Continuation(tokenizer.stream(begin), checkpoint.eos_ids) for _ in range(args.batch_size)]
            sampling = Sampling(temperature=1.0, seed=args.seed + batch * args.batch_size)
            for step in tokens(generator, prompts, limit + 1 - len(begin), sampling):
                for row, token in zip(rows, np.asarray(step).tolist(), strict=True):
                    row.add(token)
                if all(row.end for row in rows):
                    break
            texts += [row.text.strip() for row in rows]
            advance(args.batch_size)
    write_output(args.out, SEPARATOR.join(texts[: args.texts]) + "\n")
    say(f"wrote {args.texts:,} texts to {args.out}")


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(parse(Args, description=__doc__))))
