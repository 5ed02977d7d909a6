"""The demo: the whole way on real images, in a few minutes on two cores.

    make demo

Trains a small ViT on scikit-learn's scanned digits, saves it as a Hugging Face folder, and then runs the verbs that you
would run on your own model: convert, calibrate, finetune, eval. Every command is printed before it runs.
"""

import dataclasses
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from astra_jax.cli.arguments import parse
from astra_jax.cli.main import guarded
from astra_jax.report import say
from train.data import write_digits

GROUPS = (1, 8, 32)


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of the demo."""

    out: Path = Path("demo")
    """Folder for everything that the demo writes."""
    devices: int = 4
    """N: devices that share the tokens."""
    pretrain_steps: int = 1300
    """Training steps of the original model."""
    finetune_steps: int = 120
    """Finetuning steps of every quantized model."""


def run(*command: str) -> None:
    """Prints a command and runs it; the demo ends where it fails."""
    say(f"\n$ {shlex.join(command)}")
    module = {"astra": "astra_jax.cli.main"}.get(command[0])
    argv = [sys.executable, "-m", module, *command[1:]] if module else [sys.executable, *command[1:]]
    code = subprocess.run(argv, check=False).returncode
    if code:
        sys.exit(code)


def main(args: Args) -> None:
    """Runs the demo."""
    start = time.perf_counter()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # also where there is an accelerator, which has not N devices
    out, data, N = args.out, str(args.out / "digits"), str(args.devices)
    out.mkdir(parents=True, exist_ok=True)
    write_digits(out / "digits")
    say(f"wrote 1,797 real scanned digits to {data}")
    hf, original = str(out / "vit-digits-hf"), str(out / "original")
    run(
        *("python", "-m", "train.recipes.pretrain", hf, "--data", data, "--no-flip"),
        *("--steps", str(args.pretrain_steps)),
    )
    run("astra", "convert", hf, original)
    finetuned = []
    for G in GROUPS:
        calibrated, tuned = str(out / f"calibrated-G{G}"), str(out / f"astra-G{G}")
        run("astra", "calibrate", original, calibrated, "--data", data, "--groups", str(G), "--tokens", "8192")
        run(
            *("astra", "finetune", calibrated, tuned, "--data", data, "--no-flip"),
            *("--shards", N, "--steps", str(args.finetune_steps), "--learning-rate", "3e-4"),
        )
        finetuned.append(tuned)
    table, plot = out / "results.json", out / "results.png"
    run(
        *("astra", "eval", original, *finetuned, "--data", data, "--devices", N),
        *("--plot", str(plot), "--json", str(table)),
    )
    picture = next((out / "digits" / "test" / "7").iterdir())
    say(
        "\nA model this small computes in about a millisecond, so that several devices cannot make it faster;\n"
        "it shows accuracy and bits. docs/results.md has times at the size of ViT-Base.\n"
        f"done in {time.perf_counter() - start:.0f} s. Look at:\n"
        f"  {plot}   accuracy over bits, latency over the link's rate\n"
        f"  {table}  the table, for machines\n"
        f"  {finetuned[-1]}  a checkpoint, with its training log train.jsonl\n"
        f"Try next:\n"
        f"  .venv/bin/astra run {finetuned[-1]} --image {picture} --devices {N}"
    )


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(parse(Args, description=__doc__))))
