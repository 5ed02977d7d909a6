"""Whether a finetuning fits on accelerators that are not here: it is compiled for them by their own compiler.

    python -m train.fits llama-3-8b --on v5e-4 --batch-size 8 --dtype bfloat16 --trains codebooks

The model is a checkpoint or a known architecture, of shapes alone. What a step takes on every device is what the
compiler plans: arguments (parameters, moments, codebooks, the batch) and what is there on the way. The compiler of TPUs
comes with `pip install -e '.[tpu]'`; no TPU is needed. It takes some minutes for a large model.
"""

import dataclasses
import importlib.util
import os
import re
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from astra_jax.cli.arguments import parse
from astra_jax.cli.main import guarded
from astra_jax.codecs.config import Site
from astra_jax.errors import AstraError
from astra_jax.inputs.token_batches import Text
from astra_jax.mesh.sharding import DATA
from astra_jax.report import Report
from eval.cost.workload import Workload, open_workload
from train.loop import Training, divide, first_state, make_step
from train.lora import Lora, add
from train.memory import FSDP, Memory, Remat, mesh_of, split


class Slice(NamedTuple):
    """A number of TPU chips.

    Attributes:
      topology: the least slice that holds them, under the compiler's name.
      chips: how many of it are used.
      memory: of one chip, in GB, as its compiler counts it.
    """

    topology: str
    chips: int
    memory: float


LORA = Lora()

SLICES = {
    "v5e-1": Slice("v5e:2x2", 1, 15.75),
    "v5e-4": Slice("v5e:2x2", 4, 15.75),
    "v5e-8": Slice("v5e:2x4", 8, 15.75),
    "v6e-1": Slice("v6e:2x2", 1, 31.25),
    "v6e-4": Slice("v6e:2x2", 4, 31.25),
    "v6e-8": Slice("v6e:2x4", 8, 31.25),
}


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of the report."""

    model: Annotated[str, tyro.conf.Positional]
    """A checkpoint, or a known architecture such as gpt2-m."""
    on: str = "v6e-8"
    """Which chips."""
    tokens: int | None = None
    """T: tokens of an input; by default what a checkpoint's images have, or 1,024."""
    site: Site | None = None
    """What is quantized; by default what the checkpoint does, else `hidden`."""
    training: Annotated[Training, tyro.conf.arg(name="training"), tyro.conf.OmitArgPrefixes] = Training()
    lora: Annotated[Lora, tyro.conf.arg(name="lora"), tyro.conf.OmitArgPrefixes] = Lora()
    remat: Remat = "none"
    """What a backward pass computes again: block, of every block all but its input."""
    json: Path | None = None
    """Also write everything printed to this file."""


def devices_of(name: str) -> Any:
    """Devices that programs can be compiled for, but that are not here.

    Raises:
      AstraError: no such slice is known, or its compiler is not installed.
    """
    if name not in SLICES:
        raise AstraError(f"--on is {name!r}; it must be one of {', '.join(SLICES)}")
    if importlib.util.find_spec("libtpu") is None:
        raise AstraError(f"the compiler for {name} is not here: pip install -e '.[tpu]'")
    from jax.experimental import topologies

    # The compiler looks for a TPU and for other users of it, unless it is told not to.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    found = topologies.get_topology_desc(platform="tpu", topology_name=SLICES[name].topology).devices
    return np.asarray(found)[: SLICES[name].chips]


def abstract_batch(work: Workload, batch_size: int) -> dict[str, Any]:
    """The shapes of a batch."""
    label = {"label": jax.ShapeDtypeStruct((batch_size,), jnp.int32)}
    if work.config.input_kind == "images":
        side = work.config.side
        return {"input": jax.ShapeDtypeStruct((batch_size, side, side, work.config.num_channels), jnp.float32), **label}
    ids, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch_size, work.T), (batch_size,)))
    return {"input": Text(ids, lengths)} | (label if work.config.task == "classification" else {})  # type: ignore[arg-type]


def lower(work: Workload, training: Training, memory: Memory, lora: Lora = LORA) -> Any:
    """A step for the first number of shards of a training, lowered from shapes."""
    mesh, model = memory.mesh, work.abstract(work.astra.groups)
    assert mesh is not None
    if training.trains == "lora":
        add(model, lora, training.seed)
    kept = jnp.dtype(training.dtype)
    graphdef, params, frozen, codecs = divide(model, training)
    params, frozen = (
        jax.tree.map(lambda a, dtype=dtype: jax.ShapeDtypeStruct(a.shape, dtype), part)
        for part, dtype in ((params, jnp.float32), (frozen, kept))
    )
    state = jax.eval_shape(partial(first_state, training), params, codecs)

    def on(part: Any, where: Any) -> Any:
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), part, where)

    batch, shared = abstract_batch(work, training.batch_size), NamedSharding(mesh, P((DATA, FSDP)))
    batch = on(batch, jax.tree.map(lambda _: shared, batch))
    step = make_step(graphdef, training, training.shards[0], memory)
    return step.lower(on(state, split(state, mesh)), on(frozen, split(frozen, mesh)), batch)  # type: ignore[attr-defined]


def measure(work: Workload, training: Training, remat: Remat, on: str, lora: Lora = LORA) -> dict[str, Any]:
    """What a step takes on every chip, in GB, as the compiler plans it; `there` is what a chip has."""
    devices = devices_of(on)
    memory = Memory(mesh_of(devices[None]), remat, jnp.dtype(training.dtype))
    memory.check(training.batch_size)
    row: dict[str, Any] = {
        "model": work.name,
        "trains": training.trains,
        "batch": training.batch_size,
        "T": work.T,
        "remat": remat,
        "on": on,
    }
    begun = time.perf_counter()
    try:
        plan = lower(work, training, memory, lora).compile().memory_analysis()
        arguments, working = plan.argument_size_in_bytes / 1e9, plan.temp_size_in_bytes / 1e9
        row |= {"arguments GB": arguments, "working GB": working, "all GB": arguments + working}
    except jax.errors.JaxRuntimeError as error:
        wanted = re.search(r"total memory required for HLO temporaries \(([0-9.]+)G\)|Used ([0-9.]+)G of", str(error))
        if wanted is None:
            raise
        row |= {"arguments GB": None, "working GB": float(wanted[1] or wanted[2]), "all GB": None}
    return row | {
        "there GB": SLICES[on].memory,
        "fits": row["all GB"] is not None,
        "compile s": time.perf_counter() - begun,
    }


def main(args: Args) -> None:
    """Runs the report."""
    jax.config.update("jax_platforms", "cpu")  # nothing is run
    report = Report("fits", args.json)
    args.lora.check(args.training.trains)
    work = open_workload(args.model, args.tokens, args.site, args.training.dtype)
    row = measure(work, args.training, args.remat, args.on, args.lora)
    report.table("rows", f"a step of finetuning {args.model} for {args.training.shards[0]} devices, per chip", [row])
    if row["fits"]:
        report.say(f"it fits: {row['all GB']:.1f} of {row['there GB']} GB", fits=True)
    else:
        less = ["fewer --tokens or a smaller --batch-size", "more chips"]
        less[:0] = ["--remat block"] * (args.remat == "none") + ["--trains lora"] * (args.training.trains == "all")
        report.say(f"it does not fit; what would take less: {', '.join(less)}", fits=False)
    report.close()


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(parse(Args, description=__doc__))))
