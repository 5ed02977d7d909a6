"""The state of a training, and the folder that it is saved in and goes on from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Array, Int

from astra_jax.errors import AstraError
from astra_jax.files import write_atomically, writing
from astra_jax.hosts.agreement import fingerprint
from checkpoints.description import DAMAGED
from checkpoints.files import quiet
from checkpoints.streaming import digest

LOCK = ".train.lock"  # in the folder that is trained into


class TrainState(NamedTuple):
    """All that changes from step to step; random keys are functions of the step."""

    params: Any
    codecs: Any
    optimizer: Any
    step: Int[Array, ""]


class Journal:
    """Metrics of every step as JSON lines, beside the checkpoint. A resumed run continues where its state was saved."""

    def __init__(self, path: Path, step: int):
        lines = path.read_text(encoding="utf8").splitlines() if step and path.exists() else []
        # A killed run may have logged steps beyond its last saved state, and half a line.
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        write_atomically(path, "".join(line + "\n" for line in kept))
        self.file = path.open("a", encoding="utf8")

    def write(self, values: dict[str, Any]) -> None:
        """Appends one line."""
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()


def first_batch(data: Any) -> str:
    """A hash of the first batch, which other data under the same name change: their number does, too, as batches are
    drawn from all of them."""
    begin = data.get_state()
    found = fingerprint(next(data))
    data.set_state(begin)
    return found


def occupied(out: Path) -> Callable[[str], None]:
    """For `checkpoints.lock.alone`: says who trains into a folder."""

    def busy(who: str) -> None:
        raise AstraError(f"{out}: {who} is training into it: wait for it, or choose another folder")

    return busy


def save(manager: ocp.CheckpointManager, state: TrainState, data: Any, settings: dict, out: Path) -> None:
    """Saves the state, the position in the data and the settings. Raises AstraError if the disk is full."""
    leaves = _leaves(state)
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(leaves),
        data=ocp.args.JsonSave(data.get_state()),
        settings=ocp.args.JsonSave(settings | {"state_sha256": _digest(leaves)}),
    )
    with writing(out), quiet():
        manager.save(int(state.step), args=items)
        manager.wait_until_finished()


def _leaves(state: TrainState) -> dict[str, Any]:
    """The arrays of a state, numbered: Orbax then needs to know nothing of modules and optimizers."""
    return {f"{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}


def _digest(leaves: dict[str, Any]) -> str:
    return digest({name: np.asarray(leaf) for name, leaf in leaves.items()})


def restore(manager: ocp.CheckpointManager, state: TrainState, data: Any, settings: dict, out: Path) -> TrainState:
    """The latest saved state; puts `data` back to its position.

    Raises:
      AstraError: the settings are not the same, or the state is damaged.
    """
    step = manager.latest_step()
    saved = manager.restore(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardRestore(_leaves(state)), data=ocp.args.JsonRestore(), settings=ocp.args.JsonRestore()
        ),
    )
    before = saved["settings"]
    differing = sorted(k for k in settings if k != "checkpoint" and settings[k] != before.get(k))  # its bytes are known
    if differing == ["first_batch"]:
        raise AstraError(f"{out} holds a run on other data under the same name: restore them, or choose another folder")
    if differing:
        values = ", ".join(f"{k} was {before.get(k)}, now {settings[k]}" for k in differing)
        raise AstraError(f"{out} holds a run with other settings ({values}): repeat those, or choose another folder")
    if before.get("state_sha256") != _digest(saved["state"]):
        where = out / "train" / str(step)
        raise AstraError(f"{where}: {DAMAGED.split(':')[0]}: remove that folder to go on from the state before it")
    data.set_state(saved["data"])
    return jax.tree.unflatten(jax.tree.structure(state), [saved["state"][k] for k in sorted(saved["state"])])
