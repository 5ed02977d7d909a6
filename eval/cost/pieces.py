"""What a block of ASTRA is made of, timed piece by piece at the size of ViT-Base, each beside what could replace it.

    python -m eval.cost.pieces

One device of four has 256 of 1,024 tokens. `taskset -c 0 python -m eval.cost.pieces` is one core.
The last line is what `models/key_value_tables.py` decides by: how many operations of a matrix product take as long as a
byte of a table.
"""

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from astra_jax.cli.arguments import Integers, parse
from astra_jax.cli.main import guarded
from astra_jax.codecs.quantizer import nearest
from astra_jax.models.attention import sum_of_rows
from astra_jax.report import Report
from eval.cost.timing import wall_seconds

S, R, D, K = 256, 768, 768, 1024  # of one device of four


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of the benchmark."""

    groups: Integers = (1, 4, 16, 32)
    """G, one after the other."""
    repeats: int = 21
    """How often each piece is timed."""
    json: Path | None = None
    """Also write everything printed to this file."""


def draw(*shape: int) -> Array:
    """Random numbers of unit variance."""
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape, np.float32))


def decode(C: Array, z: Array) -> Array:
    """The vectors [R,D] that codes z [R,G] stand for."""
    return jax.vmap(lambda codewords, codes: codewords[codes], (0, 1), 1)(C, z).reshape(R, D)


def pieces(groups: tuple[int, ...]) -> list[tuple[str, str, Callable[..., Any], tuple[Array, ...]]]:
    """Every piece: what it is for, in which way it does that, and the function with its arguments."""
    y, q, k, v, key_value = draw(S, D), draw(D, D), draw(D, D), draw(D, D), draw(D, 2 * D)
    found: list[tuple[str, str, Callable[..., Any], tuple[Array, ...]]] = [
        ("queries, keys and values", "three products", lambda y, *w: [y @ one for one in w], (y, q, k, v)),
        ("queries, keys and values", "one product", lambda y, w: y @ w, (y, draw(D, 3 * D))),
    ]
    for G in groups:
        C, table = draw(G, K, D // G), draw(G, K, 2 * D)
        z = jnp.asarray(np.random.default_rng(G).integers(0, K, (R, G)), jnp.uint16)
        remote, codes = f"keys and values of remote tokens, G={G}", f"codes, G={G}"
        grouped = y.reshape(S, G, -1)
        found += [
            (remote, "projected", lambda C, z, w: decode(C, z) @ w, (C, z, key_value)),
            (remote, "from tables", lambda table, z: sum_of_rows(table, z[None]), (table, z)),
            (codes, "nearest codewords", nearest, (grouped, C)),
            (codes, "the product alone", scores, (grouped, C)),
            (codes, "the product alone, bfloat16", scores, (grouped.astype(jnp.bfloat16), C.astype(jnp.bfloat16))),
        ]
    return found


def scores(y: Array, C: Array) -> Array:
    """The greatest `y_g . C[g,k]` of every group, group by group as in `quantizer.nearest`."""

    def one_group(group: tuple[Array, Array]) -> Array:
        codewords, vectors = group
        return jnp.max(jnp.matmul(codewords, vectors, preferred_element_type=jnp.float32), axis=0)

    return jax.lax.map(one_group, (C, y.transpose(1, 2, 0)))


def flops_per_byte(rows: list[dict[str, Any]], G: int) -> float:
    """Operations of the projection of remote tokens in the time in which a byte of their tables is read."""
    ms = {row["in which way"]: row["ms"] for row in rows if row["what for"].endswith(f"remote tokens, G={G}")}
    return (2 * R * D * 2 * D / ms["projected"]) / (4 * R * G * 2 * D / ms["from tables"])


def main(args: Args) -> None:
    """Runs the benchmark."""
    report = Report("pieces", args.json)
    measured = pieces(args.groups)
    calls = [partial(jax.jit(function), *arguments) for _, _, function, arguments in measured]
    rows = [
        {"what for": purpose, "in which way": way, "ms": 1e3 * float(np.median(seconds))}
        for (purpose, way, *_), seconds in zip(measured, wall_seconds(calls, args.repeats), strict=True)
    ]
    report.table("rows", f"{S} of {S + R} tokens, D={D}, K={K}", rows)
    G = max(args.groups)  # whose tables fit no cache
    balance = flops_per_byte(rows, G)
    report.say(f"{balance:.1f} operations take as long as a byte of the tables of G={G}", flops_per_byte=balance)
    report.close()


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(parse(Args, description=__doc__))))
