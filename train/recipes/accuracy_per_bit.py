"""Quality over bits per token and block: what a model of your own reaches as ASTRA, for every codec and G.

    python -m train.recipes.accuracy_per_bit ORIGINAL OUT --data train.txt --test test.txt --plot plot.png

Every codec and G is calibrated from the original and, with --steps, finetuned for each of --devices, and evaluated on
virtual shards. Of the codec nested-pq there is one checkpoint alone, with the most groups, which shows what its first
groups do for every other G; it is finetuned for all of them and all --devices at once. Beside them stand the original
on one device, the same trained for as many steps, and what is left where nothing of other devices arrives, or, with a
predictor, nothing but a text's token ids. A language model shows its perplexity on text files, a classifier its
accuracy on parts of --data. What OUT already has is not made or evaluated again, so an interrupted run goes on where it
was.

The shape of the paper's Tables 1, 12 and 13, of a classifier, and of its Table 3, of a language model:

    ... --codecs vq --groups 1,8,16,32 --steps 500 --noise 0,1 --class-tokens distributed,single
    ... --codecs vq --groups 1,16,32 --steps 500 --devices 4,6,8
"""

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args
from urllib.parse import quote

import tyro

import checkpoints
from astra_jax.cli.arguments import Integers, Numbers, Texts, parse
from astra_jax.cli.main import guarded
from astra_jax.codecs.config import ClassToken, Codec, Site
from astra_jax.errors import AstraError
from astra_jax.files import write_atomically
from astra_jax.report import Report, say
from eval import plots
from eval.datasets.labelled import DataArgs
from eval.quality.tasks import METRICS, task_of
from eval.reports.tables import around_marks, insert, markdown
from eval.verbs import evaluate
from train import calibrate, finetune
from train.loop import Training
from train.recipes.resumable import calibrated, evaluated, finetuned, short_name

COMMAND = "python -m train.recipes.accuracy_per_bit"
LOST = {"perplexity": "% above the original", "accuracy %": "points below the original"}  # metric -> column behind it
# Options that do not change what a checkpoint or result of a given name in OUT is.
FREE = (*("out", "test", "groups", "codecs", "noise", "class_tokens", "steps", "plot", "markdown", "json"),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(DataArgs):
    """Arguments of the recipe."""

    original: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ORIGINAL")]
    """A language model or a classifier made by `astra convert`."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the checkpoints and the results."""
    test: tuple[str, ...]
    """Text files to evaluate a language model on; of a classifier parts of --data, such as test[:2000]."""
    groups: Integers = (1, 2, 4, 8, 16, 32)
    """G, one after the other."""
    codecs: Texts = get_args(Codec)
    """Codecs, one after the other; with a predictor behind a plus sign, such as nested-pq+linear."""
    codewords: int = 1024
    """K: codewords per group."""
    site: Site = "hidden"
    """What is quantized."""
    auto: bool = False
    """With a predictor, let calibration choose how many blocks send codes (`astra calibrate --schedule auto`)."""
    devices: Integers = (4,)
    """N: devices to train for and to evaluate on, one after the other."""
    class_tokens: Texts = ("distributed",)
    """Class tokens of the codecs: distributed, single, or one after the other."""
    steps: int = 0
    """Finetuning steps of every checkpoint; 0 for calibration alone."""
    noise: Numbers = (1.0,)
    """Noise of Noise-Augmented Quantization in the finetuning: 1 is the paper's, 0 is without; or one after the
    other."""
    distillation: float = 0.0
    """Of finetuning as in `astra finetune`, but not of vq, which is trained as in the paper: weight of the KL
    divergence from what the original says."""
    hidden: float = 0.0
    """The same: weight of how far final states are from the original's."""
    cuts: Literal["even", "random"] = "even"
    """The same: where a sequence is cut into shards."""
    packet_loss: float = 0.0
    """The same: largest share of lost packets."""
    batch_size: int = 16
    """Texts or images per batch of the finetuning."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    flip: bool = True
    """Mirror images at random; turn off where left and right matter, as in digits."""
    seed: int = 0
    """Seed of calibration and finetuning."""
    length: int | None = None
    """Tokens of a text; by default what the model takes, but at most 512, in the evaluation 1024."""
    stride: int | None = None
    """Tokens by which the windows of the evaluation move on; by default half their length."""
    plot: Path | None = None
    """Draw quality over bits into this file (PNG or SVG)."""
    markdown: Path | None = None
    """Also put the table into this file, between its marks that have the name of ORIGINAL's folder."""
    json: Path | None = None
    """Also write everything printed to this file."""

    def label(self, column: str, test: str) -> str:
        """What a column of a test is called: there is no need to tell the only one from others."""
        return column if len(self.test) == 1 else f"{column}, {short_name(test)}"


def metric_of(args: Args) -> str:
    """The column of `astra eval` that is shown. Raises AstraError for a model that has no loss to be finetuned by."""
    metric = METRICS[task_of(checkpoints.read_meta(args.original).config)]
    if metric not in LOST:
        raise AstraError(f"{args.original}: gives embeddings: use a language model or a classifier")
    return metric


def is_text(args: Args) -> bool:
    """Whether the model reads texts, of which token ids can be sent."""
    return bool(checkpoints.read_meta(args.original).config.input_kind == "text")


def check(args: Args) -> None:
    """Raises AstraError, before any work, for options that do not fit."""
    for name in ("codecs", "groups", "devices", "class_tokens", "noise"):
        if not getattr(args, name):
            raise AstraError(f"--{name.replace('_', '-')} is an empty list: leave the option out for the default")
    for name in args.codecs:
        calibrate.codec_options(name, is_text(args), args.auto)
    if unknown := set(args.class_tokens) - set(get_args(ClassToken)):
        raise AstraError(f"--class-tokens has {min(unknown)!r}; give distributed, single, or both")
    for noise in args.noise:
        Training(noise=noise)
    if args.plot:
        plots.check_plot(args.plot)
    if args.markdown:
        around_marks(args.markdown, args.original.name, COMMAND)


def open_folder(args: Args) -> None:
    """Makes OUT, or raises AstraError if what it has was made with other options."""
    decisive = {name: value for name, value in vars(args).items() if name not in FREE}
    now = json.loads(json.dumps(decisive | {"original": str(args.original.resolve())}))
    options = args.out / "options.json"
    if options.exists():
        before = json.loads(options.read_text(encoding="utf8"))
        if differing := [name for name in now if now[name] != before.get(name)]:
            values = ", ".join(f"{name} was {before.get(name)}, now {now[name]}" for name in differing)
            raise AstraError(f"{args.out} was made otherwise ({values}): repeat that, or choose another folder")
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomically(options, json.dumps(now, indent=2) + "\n")


def quality(
    checkpoint: Path,
    N: int,
    args: Args,
    groups: int | None = None,
    packet_loss: float | None = None,
) -> dict[str, Any]:
    """N, a checkpoint's G and bits, and its metric on every test; of its first `groups` alone, or
    under packet loss."""
    metric = metric_of(args)
    found: dict[str, Any] = {}
    how = f"first{groups}-" * (groups is not None) + f"loss{packet_loss}-" * (packet_loss is not None)
    for test in args.test:
        result = args.out / f"{checkpoint.name}-N{N}-{how}{quote(test, safe='[:]')}.json"
        where = {"data": test, "split": "test"} if metric == "perplexity" else {"split": test}
        options = evaluate.Args(
            checkpoints=(checkpoint,),
            devices=str(N),
            virtual=True,
            groups=() if groups is None else (groups,),
            losses=evaluate.Losses(packet_loss, seeds=None if packet_loss is None else 1),
            length=args.length,
            stride=args.stride,
            rates=(),
            **{**args.source(), **where},
        )
        (row,) = evaluated(result, options)
        found |= {"N": N, "G": row["G"], "bits": row["bits"], args.label(metric, test): row[metric]}
    return found


def calibration(name: str, G: int, class_token: str, args: Args) -> calibrate.Args:
    """How one codec, G and class token are calibrated."""
    return calibrate.Args(
        checkpoint=args.original,
        out=args.out / f"calibrated-{name}-G{G}{_suffix(class_token)}",
        groups=G,
        codewords=args.codewords,
        site=args.site,
        class_token=cast(ClassToken, class_token),
        length=args.length,
        seed=args.seed,
        **calibrate.codec_options(name, is_text(args), args.auto),
        **args.source(),
    )


def finetuned_one(checkpoint: Path, name: str, args: Args, shards: tuple[int, ...], **others: Any) -> Path:
    """A checkpoint trained on so many virtual shards.

    Args:
      others: further fields of `Training`.
    """
    training = Training(
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        shards=shards,
        seed=args.seed,
        **others,
    )
    out = args.out / f"{name}-{args.steps}-steps"
    options = finetune.Args(
        checkpoint=checkpoint,
        out=out,
        training=training,
        flip=args.flip,
        length=args.length,
        **args.source(),
    )
    return finetuned(options)


def controls(args: Args) -> list[dict[str, Any]]:
    """Rows without codes: the original, trained for longer, and with nothing of other devices, or token ids alone
    and what a predictor makes of them."""
    rows = [{"made by": "original", "codec": None, **quality(args.original, 1, args)}]
    if args.steps:
        longer = finetuned_one(args.original, "control", args, (1,))
        rows.append(
            {"made by": f"original, trained {args.steps} steps more", "codec": None, **quality(longer, 1, args)}
        )
    # Any codes will do, as none arrive: the first that leave the same.
    tries = [("vq", min(args.groups)), *((name, max(args.groups)) for name in args.codecs)]
    lost = dict[str, calibrate.Args]()
    for name, G in tries:
        options = calibration(name, G, args.class_tokens[0], args)
        lost.setdefault(options.without_codes, options)
    for made, options in lost.items():
        none, coded = {"made by": made, "codec": None}, calibrated(options)
        rows += [none | quality(coded, N, args, packet_loss=1.0) | {"G": None, "bits": 0} for N in args.devices]
    return rows


def coded(name: str, class_token: str, args: Args) -> list[dict[str, Any]]:
    """Rows of one codec and class token: for every G and N a checkpoint of its own, or one for all and its first G
    groups; and of each what every noise makes of it."""
    label = name + ", single class token" * (class_token == "single")
    if not name.startswith("nested-pq"):
        return [row for G in args.groups for row in one_for_each(name, label, G, class_token, args)]
    return list(one_for_all(name, label, class_token, args))


def one_for_each(name: str, label: str, G: int, class_token: str, args: Args) -> Iterator[dict[str, Any]]:
    """Rows of a codec with G groups, finetuned for every N by itself."""
    say(f"\n--- {label}, G={G}")
    start = calibrated(calibration(name, G, class_token, args))
    further = {} if name == "vq" else beyond_the_paper(args)
    for N in args.devices:
        yield {"made by": "calibrated", "codec": label, **quality(start, N, args)}
        for made, noise in noises(args).items():
            out = f"finetuned-{name}-G{G}-N{N}{_suffix(class_token, noise)}"
            tuned = finetuned_one(start, out, args, (N,), noise=noise, **further)
            yield {"made by": made, "codec": label, **quality(tuned, N, args)}


def one_for_all(name: str, label: str, class_token: str, args: Args) -> Iterator[dict[str, Any]]:
    """Rows of a codec of which the first groups are a code, finetuned for all groups and N at once."""
    groups = tuple(sorted(args.groups))
    say(f"\n--- {label}, the first of {groups[-1]} groups")
    start = calibrated(calibration(name, groups[-1], class_token, args))
    made = {"calibrated": start}
    for how, noise in noises(args).items():
        out = f"finetuned-{name}-G{_list(groups)}-N{_list(args.devices)}{_suffix(class_token, noise)}"
        further = {"groups": groups, "noise": noise, **beyond_the_paper(args)}
        made[how] = finetuned_one(start, out, args, args.devices, **further)
    for (how, checkpoint), N, m in itertools.product(made.items(), args.devices, groups):
        yield {"made by": how, "codec": label, **quality(checkpoint, N, args, m)}


def noises(args: Args) -> dict[str, float]:
    """The noises to finetune with, under what a table calls checkpoints that are finetuned so; none without steps."""
    named = {"finetuned" + f", noise {noise:g}" * (noise != 1): noise for noise in args.noise}
    return named if args.steps else {}


def beyond_the_paper(args: Args) -> dict[str, Any]:
    """Fields of `Training` that the paper's training has not."""
    return {name: getattr(args, name) for name in ("distillation", "hidden", "cuts", "packet_loss")}


def _suffix(class_token: str, noise: float = 1.0) -> str:
    """What the name of a checkpoint says of these where they are not as they mostly are."""
    return "-single" * (class_token == "single") + f"-noise{noise:g}" * (noise != 1)


def _list(numbers: tuple[int, ...]) -> str:
    return "-".join(map(str, numbers))


def against(row: dict[str, Any], original: dict[str, Any], args: Args) -> dict[str, Any]:
    """A row that says behind every metric how much worse than the original that is."""
    metric, found = metric_of(args), {k: row[k] for k in ("made by", "codec", "N", "G", "bits")}
    for test in args.test:
        column = args.label(metric, test)
        here, there = row[column], original[column]
        lost = 100 * (here / there - 1) if metric == "perplexity" else there - here
        found |= {column: here, args.label(LOST[metric], test): lost}
    return found


def main(args: Args) -> None:
    """Runs the recipe."""
    report, metric = Report("accuracy-per-bit", args.json), metric_of(args)
    check(args)
    open_folder(args)
    rows = controls(args)
    for codec, class_token in dict.fromkeys(itertools.product(args.codecs, args.class_tokens)):
        rows += coded(codec, class_token, args)
    rows = [against(row, rows[0], args) for row in rows]
    made = f"finetuned for {args.steps} steps" if args.steps else "not finetuned"
    report.table("rows", f"{args.original.name}: K={args.codewords}, site {args.site}, {made}", rows)
    if args.plot:
        plots.quality_over_bits(rows, [args.label(metric, test) for test in args.test], args.plot)
        report.say(f"plot: {args.plot}", plot=str(args.plot))
    if args.markdown:
        insert(args.markdown, args.original.name, markdown(rows), COMMAND)
        report.say(f"table: {args.markdown}")
    report.close()


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(parse(Args, description=__doc__))))
