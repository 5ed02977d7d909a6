"""What recipes have in common: a checkpoint or a result that is there is not made again, so that an interrupted recipe
goes on where it was."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import checkpoints
from checkpoints.store import META
from eval import evaluate
from train import calibrate, finetune


def calibrated(options: calibrate.Args) -> Path:
    """The checkpoint of `astra calibrate`, made where it is missing."""
    if not (options.out / META).is_file():
        calibrate.main(options)
    return options.out


def finetuned(options: finetune.Args) -> Path:
    """The checkpoint of `astra finetune`, made where it is missing and trained on where it was interrupted.

    Raises:
      AstraError: the folder holds a run with other settings.
    """
    if not _is_trained(options):
        finetune.main(options)
    return options.out


def _is_trained(options: finetune.Args) -> bool:
    """Whether the folder holds a checkpoint that was trained just so, to the end."""
    if not (options.out / META).is_file():
        return False
    wanted = {name: getattr(options, name) for name in ("augment", "flip", "length")}
    if options.coded_blocks is not None:  # checkpoints of before this option do not name it
        wanted["coded_blocks"] = options.coded_blocks
    wanted |= {"checkpoint": str(options.checkpoint), **options.source(), **dataclasses.asdict(options.training)}
    made = checkpoints.read_meta(options.out).history[-1]
    return json.loads(json.dumps(wanted)).items() <= made.items()


def evaluated(result: Path, options: evaluate.Args) -> list[dict[str, Any]]:
    """The rows of `astra eval`, which writes them to the file `result`, or read from there."""
    if not result.exists():
        evaluate.main(dataclasses.replace(options, json=result))
    return json.loads(result.read_text(encoding="utf8"))["rows"]


def short_name(test: str) -> str:
    """What tables call a test: of a file the name without its ending, and the folder that it is in."""
    return str(Path(Path(test).parent.name) / Path(test).stem)
