"""What recipes have in common: a checkpoint or a result that is there is not made again, so that an interrupted recipe
goes on where it was."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import checkpoints
from astra_jax.errors import AstraError
from astra_jax.files import write_atomically
from checkpoints.description import META
from checkpoints.files import read_json
from eval.verbs import evaluate
from train import calibrate, finetune


def calibrated(options: calibrate.Args) -> Path:
    """The checkpoint of `astra calibrate`, made where it is missing.

    Raises:
      AstraError: it is there, and was made of another checkpoint.
    """
    if not (options.out / META).is_file():
        calibrate.main(options)
    elif checkpoints.read_meta(options.out).history[-1].get("checkpoint_sha256") != _digest(options.checkpoint):
        raise AstraError(
            f"{options.out}: was made of another checkpoint than {options.checkpoint} is now: remove it, or choose "
            "another folder"
        )
    return options.out


def finetuned(options: finetune.Args) -> Path:
    """The checkpoint of `astra finetune`, made where it is missing and trained on where it was interrupted.

    Raises:
      AstraError: the folder holds a run with other settings, or of another checkpoint.
    """
    if not _is_trained(options):
        finetune.main(options)
    return options.out


def _is_trained(options: finetune.Args) -> bool:
    """Whether the folder holds a checkpoint that was trained just so, to the end."""
    if not (options.out / META).is_file():
        return False
    wanted = {name: getattr(options, name) for name in ("augment", "flip", "length")}
    wanted["checkpoint_sha256"] = _digest(options.checkpoint)
    wanted |= {**options.source(), **dataclasses.asdict(options.training)}
    made = checkpoints.read_meta(options.out).history[-1]
    return json.loads(json.dumps(wanted)).items() <= made.items()


def evaluated(result: Path, options: evaluate.Args) -> list[dict[str, Any]]:
    """The rows of `astra eval`, which are kept in the file `result`, or read from there if they are of the same
    checkpoints, by their bytes, with the same options."""
    described = {name: str(value) for name, value in vars(options).items() if name not in ("checkpoints", "json")}
    of = {"checkpoints": [_digest(one) for one in options.checkpoints], **described}
    if not result.exists() or (found := read_json(result)).get("of") != of:
        evaluate.main(dataclasses.replace(options, json=result))
        found = {**read_json(result), "of": of}
        write_atomically(result, json.dumps(found, indent=2) + "\n")
    rows: list[dict[str, Any]] = found["rows"]
    return rows


def _digest(checkpoint: Path) -> str | None:
    return checkpoints.read_meta(checkpoint).digest


def short_name(test: str) -> str:
    """What tables call a test: of a file the name without its ending, and the folder that it is in."""
    return str(Path(Path(test).parent.name) / Path(test).stem)
