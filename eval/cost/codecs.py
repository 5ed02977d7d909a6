"""What every codec and predictor costs in computing, and on which link the bits that it saves are worth that.

    python -m eval.cost.codecs vit-base --devices 4 --codecs vq,rotated-pq,vq+linear --groups 1,4,16

Operations are counted in the traced programs and bits are what the strategy sends, as in `astra plan`, so that nothing
has to be calibrated. A codec with fewer bits that computes for longer is faster below some rate of the link: where what
it saves there is more than what it adds here. Seconds of computation are operations over one speed, that of
--device-profile or what one device reaches here, and the link takes one device's bits over its rate.

With a predictor every device keeps estimates of all tokens, its own too: it predicts and decodes all of them, and
projects those of the others to keys and values, for which there are no tables. Without one the fast path is taken where
it pays on what JAX runs on here. What is no matrix product (looking up codewords, a diagonal predictor) has no
operations; --repeats times it.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from astra_jax.cli.arguments import Integers, Texts, parse
from astra_jax.cli.main import guarded
from astra_jax.codecs.config import RANKS, AstraConfig, Site, codec_and_predictor, doubling
from astra_jax.errors import AstraError
from astra_jax.mesh.collectives import Alone
from astra_jax.models.blocks import block_at
from astra_jax.models.key_value_tables import fold
from astra_jax.report import Report, progress
from astra_jax.strategies.base import Astra
from eval.cost.cost import Cost, check_split, cost
from eval.cost.device_profile import read_profile
from eval.cost.flops import flops
from eval.cost.timing import Share, wall_seconds
from eval.cost.workload import ONE, Setting, Workload, open_workload
from eval.network.model import Counting, Link, parse_rate, pass_seconds, volume
from eval.reports.paper import insert, markdown
from eval.verbs.plan import measured_speeds

COMMAND = "python -m eval.cost.codecs"
BASE = "vq"  # what others are compared with: the paper's


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of the table."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A checkpoint, or vit-base, vit-large, bert-base, gpt2-s, gpt2-m, llama-s, llama-3-8b."""
    devices: int = 4
    """N."""
    tokens: int | None = None
    """T; by default 1,024, or what the model takes."""
    groups: Integers = (1, 4, 16)
    """G, one after the other."""
    codecs: Texts = ("vq", "rotated-pq", "nested-pq", "vq+diagonal", "vq+low-rank", "vq+linear", "vq+mlp")
    """Codecs, one after the other; with a predictor behind a plus sign."""
    axes: int | None = None
    """Axes that rotated codes are of, spread evenly over the groups; by default all. Calibration may choose fewer, and
    these cost less."""
    rank: int | None = None
    """Of the predictors low-rank and mlp, by default 16 and 128."""
    site: Site | None = None
    """What is quantized; by default what the checkpoint does, or hidden."""
    rates: Texts = ("10mbit",)
    """Rates of the link."""
    counting: Counting = "once"
    """Whether a device waits for the bits of one message, as in the paper, or for one from each of the others."""
    device_profile: Path | None = None
    """Predict compute from the speed in this file, instead of measuring one device here."""
    repeats: int = 0
    """How often one block of every codec is timed here; 0 for not at all."""
    markdown: Path | None = None
    """Also put the table into this file, between its marks that have the name of MODEL."""
    json: Path | None = None
    """Also write everything printed to this file."""


@dataclasses.dataclass(frozen=True)
class Price:
    """What a codec costs with one G, whatever the link.

    Attributes:
      codec: its name, with a predictor behind a plus sign.
      work: the model with this codec.
      block_flops: operations of one device in a block, but not in the first.
      cost: of a whole pass.
    """

    codec: str
    work: Workload
    block_flops: int
    cost: Cost

    @property
    def G(self) -> int:
        """Groups."""
        return self.work.astra.groups

    @property
    def first_bits(self) -> int:
        """Bits per token in the first block: of the token's id, where that is sent instead of codes."""
        if self.work.astra.side_info == "none":
            return self.work.astra.token_bits
        return self.cost.messages[0].bits // math.ceil(self.work.T / self.cost.setting.N)


def with_codec(work: Workload, name: str, G: int, axes: int | None = None, rank: int | None = None) -> Workload:
    """A workload with this codec. With a predictor the devices of a text model also tell each other the token ids.

    Args:
      name: `CODEC` or `CODEC+PREDICTOR`.
      axes: of rotated codes; None for all.
      rank: of a predictor that has one; None for what calibration takes.

    Raises:
      AstraError: there is no such codec, or G or the axes do not fit the model.
    """
    codec, predictor = codec_and_predictor(name)
    model = work.abstract(None)
    attention = model.blocks.attention
    width = work.config.hidden_size if work.astra.site == "hidden" else 2 * attention.J * attention.E
    widths, levels = grouped_axes(codec, width if axes is None else axes, G, width)
    astra = dataclasses.replace(
        work.astra,
        groups=G,
        codec=codec,
        widths=widths,
        levels=levels,
        predictor=predictor,
        rank=RANKS.get(predictor, AstraConfig.rank) if rank is None else rank,
        side_info="token-ids" if predictor != "none" and work.config.input_kind == "text" else "none",
    )
    return dataclasses.replace(work, astra=astra)


def grouped_axes(codec: str, axes: int, G: int, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """`widths` and `levels` of an `AstraConfig`: which group has how many axes; every level has all, spread evenly.

    Levels have 1, 1, 2, 4, 8, ... groups, so that the first 1, 2, 4, 8, ... groups are whole levels.

    Raises:
      AstraError: a level has more groups than axes, or these are more than there are.
    """
    if codec == "vq":
        return (), ()
    levels = doubling(G) if codec == "nested-pq" else (G,)
    if not max(levels) <= axes <= width:
        raise AstraError(
            f"{codec} with {G} groups has {axes} axes here; it can have {max(levels)} to {width}: use other --axes, or "
            "fewer --groups"
        )
    widths = tuple(axes // n + (g < axes % n) for n in levels for g in range(n))
    return widths, levels if codec == "nested-pq" else ()


def block_share(model: Any, N: int, inputs: Any) -> Share:
    """One device's share of a block, the exchange excluded: the last of N devices, a block behind the first. What is
    before a predictor's first block is known, and nothing is predicted from it.

    Args:
      model: with codebooks, folded where that pays; may be abstract.
      inputs: one sequence.

    Returns:
      the function of the block's weights, its input and the estimates of all tokens, and shapes of these.
    """
    strategy = dataclasses.replace(Astra.of(model, N, inputs), peers=Alone(N))
    graphdef, stack = nnx.split(model.blocks)
    shards, codec = strategy.shards, model.blocks.attention.codec
    x = jax.ShapeDtypeStruct((1, shards.class_slots + shards.S, model.config.hidden_size), model.dtype)
    carry: Any = ()
    if codec.predictor is not None:
        carry = jax.ShapeDtypeStruct((N, 1, shards.sent_slots, codec.predictor.bias.shape[-1]), jnp.float32)

    def run(block: Any, x: Any, carry: Any) -> Any:
        return nnx.merge(graphdef, block)(x, strategy, carry, 1)[:2]  # with the estimates, or they would not be made

    return Share(run, (jax.eval_shape(lambda stack: jax.tree.map(lambda a: a[-1], stack), stack), x, carry))


def price(work: Workload, name: str, N: int, flops_per_second: float) -> Price:
    """What the codec of a workload costs on N devices of this speed."""
    G = work.astra.groups
    share = block_share(fold(work.abstract(G)), N, work.inputs())
    setting = Setting("astra", N, groups=G)
    return Price(name, work, flops(share.run, *share.arguments), cost(work, setting, (1.0,) * N, flops_per_second))


def block_call(work: Workload, weights: Any, N: int) -> Callable[[], Any]:
    """One device's share of a block with these weights, random codebooks and random tokens, to be timed."""
    model = fold(work.model(weights, work.astra.groups))
    share = block_share(model, N, work.inputs())
    _, block = nnx.split(block_at(model.blocks, -1))
    rng = np.random.default_rng(1)
    tokens = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape, np.float32), a.dtype), share.arguments[1:])
    return partial(jax.jit(share.run), block, *tokens)


def measured_ms(prices: Sequence[Price], N: int, repeats: int) -> list[float]:
    """The median milliseconds of one device's share of a block with every codec, which take turns on this machine."""
    weights = prices[0].work.weights()
    calls = [block_call(found.work, weights, N) for found in prices]
    return [1e3 * float(np.median(seconds)) for seconds in wall_seconds(calls, repeats)]


def faster_below(few: Cost, many: Cost, counting: Counting = "once") -> float | None:
    """The link's rate in bits per second below which the codec that sends fewer bits is the faster one.

    It is `(bits_many - bits_few) / (compute_few - compute_many)`, where a pass takes as long with both; infinite where
    it does not compute for longer. None where it does not send fewer bits. Both have as many exchanges, so that the
    link's latency does not matter.
    """
    less, more = (volume(found.messages, found.setting.N, counting)[0] for found in (few, many))
    if less >= more:
        return None
    added = max(few.compute) - max(many.compute)
    return (more - less) / added if added > 0 else math.inf


def row(found: Price, base: Sequence[Price], rates: Sequence[str], counting: Counting) -> dict[str, Any]:
    """A row of the table.

    Args:
      base: vq with every G, the smallest first.
    """
    (same,) = (other for other in base if other.G == found.G)

    def below(other: Price) -> float | str | None:
        rate = faster_below(found.cost, other.cost, counting)
        return "any" if rate == math.inf else rate and rate / 1e6

    def seconds(rate: str) -> float:
        return pass_seconds(
            found.cost.compute, found.cost.messages, found.cost.setting.N, Link(parse_rate(rate), 0.0, counting)
        )

    return {
        "codec": found.codec,
        "G": found.G,
        "bits": found.work.astra.token_bits,
        "in block 0": found.first_bits,
        "GFLOP per block": found.block_flops / 1e9,
        f"% more than {BASE}": 100 * (found.block_flops / same.block_flops - 1),
        **{f"s at {rate}": seconds(rate) for rate in rates},
        **{f"faster than {BASE} G={other.G} below Mbit/s": below(other) for other in base[1:]},
    }


def check(args: Args) -> None:
    """Raises AstraError, before any work, for what cannot be."""
    if not (args.codecs and args.groups and args.rates):
        raise AstraError("--codecs, --groups and --rates are lists, such as --codecs vq,vq+linear --groups 1,16")
    if args.devices < 2:
        raise AstraError(f"--devices is {args.devices}; codes are exchanged between at least 2: try 4")
    if args.repeats < 0:
        raise AstraError(f"--repeats is {args.repeats}; it must be at least 0: try 11")
    for rate in args.rates:
        parse_rate(rate)


def main(args: Args) -> None:
    """Prints and writes the table."""
    check(args)
    report, N = Report("codecs", args.json), args.devices
    profile = read_profile(args.device_profile) if args.device_profile else None
    work = open_workload(args.model, args.tokens, args.site, "float32")
    names, groups = list(dict.fromkeys(args.codecs)), sorted(set(args.groups))
    every = [
        (name, with_codec(work, name, G, args.axes, args.rank))
        for G in groups
        for name in dict.fromkeys([BASE, *names])
    ]
    for _, coded in every:
        check_split(coded, [Setting("astra", N, groups=coded.astra.groups)], (1.0,) * N)
    speed = profile.flops_per_second if profile else measured_speeds(work, [ONE])["single", None]
    prices = []
    with progress("counted", len(every)) as advance:
        for name, coded in every:
            prices.append(price(coded, name, N, speed))
            advance(codec=name, G=coded.astra.groups)
    base, shown = [found for found in prices if found.codec == BASE], [f for f in prices if f.codec in names]
    rows = [row(found, base, args.rates, args.counting) for found in shown]
    if args.repeats:
        rows = [r | {"ms here": ms} for r, ms in zip(rows, measured_ms(shown, N, args.repeats), strict=True)]
    where = profile.name if profile else "this machine"
    report.table("rows", f"{args.model}: {work.T:,} tokens, {N} devices, compute as on {where}", rows)
    axes = "all axes" if args.axes is None else f"{args.axes:,} axes"
    report.say(
        f"GFLOP per block: of one device that does {speed / 1e9:.4g} in a second; rotated codes are of {axes};\n"
        f"Mbit/s: the link's rate below which this, with fewer bits, is faster than {BASE} with more",
        flops_per_second=speed,
        axes=args.axes,
    )
    if args.markdown:
        insert(args.markdown, args.model, markdown(rows), COMMAND)
        report.say(f"table: {args.markdown}")
    report.close()


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(parse(Args, description=__doc__))))
