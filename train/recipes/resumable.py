"""What recipes have in common: a checkpoint or a result that is there is not made again, so that an interrupted recipe
goes on where it was."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import checkpoints
from astra_jax.errors import AstraError
from astra_jax.files import write_atomically
from checkpoints.files import read_json
from checkpoints.store import META
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
    if options.coded_blocks is not None:  # checkpoints of before this option do not name it
        wanted["coded_blocks"] = options.coded_blocks
    if (now := _digest(options.checkpoint)) is None:  # as an earlier version wrote it
        wanted["checkpoint"] = str(options.checkpoint)
    else:
        wanted["checkpoint_sha256"] = now
    wanted |= {**options.source(), **dataclasses.asdict(options.training)}
    made = checkpoints.read_meta(options.out).history[-1]
    return json.loads(json.dumps(wanted)).items() <= made.items()


def evaluated(result: Path, options: evaluate.Args) -> list[dict[str, Any]]:
    """The rows of `astra eval`, which writes them to the file `result`, or read from there if it was of the same
    checkpoints, by their bytes, with the same options."""

    def evaluation() -> dict[str, Any]:
        evaluate.main(dataclasses.replace(options, json=result))
        return read_json(result)

    described = {name: str(value) for name, value in vars(options).items() if name not in ("checkpoints", "json")}
    return remembered(result, [_digest(one) for one in options.checkpoints], described, evaluation)["rows"]


def remembered(
    result: Path, digests: list[str | None], described: Mapping[str, Any], measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """What `measure` found, or what the file `result` says that it found, of the same checkpoints in the same way.

    Args:
      digests: of the checkpoints.
      described: how it is measured; values for JSON.
    """
    of = json.loads(json.dumps({"checkpoints": digests, **described}))
    if result.exists() and (kept := read_json(result)).get("of") == of:
        return kept
    found = {**measure(), "of": of}
    write_atomically(result, json.dumps(found, indent=2) + "\n")
    return found


def _digest(checkpoint: Path) -> str | None:
    return checkpoints.read_meta(checkpoint).digest


def short_name(test: str) -> str:
    """What tables call a test: of a file the name without its ending, and the folder that it is in."""
    return str(Path(Path(test).parent.name) / Path(test).stem)
