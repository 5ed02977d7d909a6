"""Show what a checkpoint holds: the model, how it is compressed, how well its codes are used, and how it was made.

    astra info vit-base-calibrated

Of the codes it says how many bits a token takes per block, how many times fewer that is than the token's float32
embedding, and per block: the share of codewords in use (1 is all of them) and the perplexity, the number of codewords
that are effectively chosen among (K at best). A share far below 1 means that codewords are wasted.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from flax import nnx

import checkpoints
from astra_jax.codecs.base import usage
from astra_jax.codecs.config import AstraConfig
from astra_jax.report import Report
from checkpoints.configs import SLIDING_ROPE, rotary_to_hf
from checkpoints.description import Checkpoint
from checkpoints.tensor_maps import build


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of `astra info`."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A checkpoint."""
    json: Path | None = None
    """Write everything that is printed to this file."""


def parameters(model: Any) -> int:
    """How many numbers the model's parameters are; codebooks and statistics not counted."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def compression(astra: AstraConfig, D: int, L: int) -> dict[str, Any]:
    """Bits per token and block, and their ratio to the float32 embedding, D * 32 / (G log2 K); none where token ids
    alone are sent."""
    bits = astra.mean_bits(L)
    return {"bits per token and block": bits, "compression ratio": D * 32 / bits if bits else None}


def codebook_usage(model: Any) -> list[dict[str, Any]]:
    """One row per block: the means over its groups of share of codewords in use and perplexity."""
    used = jax.device_get(jax.jit(usage)(model.codec.counts()))
    return [
        {"block": block, "codewords used": float(share), "perplexity": float(perplexity)}
        for block, (share, perplexity) in enumerate(
            zip(np.mean(used.used, axis=-1), np.mean(used.perplexity, axis=-1), strict=True)
        )
    ]


def settings(config: Any) -> dict[str, Any]:
    """The fields of a configuration that are set, and what it says of a rotary embedding."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    rotary, sliding = values.pop("rope_parameters", None), values.pop(SLIDING_ROPE, None)
    values |= (rotary_to_hf(rotary) if rotary else {}) | {
        f"{name} of blocks with a window": value for name, value in (rotary_to_hf(sliding) if sliding else {}).items()
    }
    return {name: _shown(value) for name, value in values.items() if value is not None}


def _shown(value: Any) -> Any:
    """A list as its runs of equal values: `5 x sliding_attention, full_attention`."""
    if not isinstance(value, tuple):
        return value
    runs = [(len(list(run)), one) for one, run in itertools.groupby(value)]
    return ", ".join(f"{count} x {one}" if count > 1 else str(one) for count, one in runs)


def facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything about a checkpoint that is one value."""
    values = {"family": checkpoint.family, **settings(checkpoint.config)}
    values |= {"parameters": parameters(checkpoint.model), "exported as": checkpoint.dtype}
    if checkpoint.astra is not None:
        values |= checkpoint.astra.as_dict()
        values |= compression(checkpoint.astra, checkpoint.config.hidden_size, checkpoint.config.num_hidden_layers)
    return values


def main(args: Args) -> None:
    """Runs `astra info`."""
    report = Report("info", args.json)
    checkpoint = checkpoints.read_meta(args.checkpoint)
    if checkpoint.astra is None:  # then nothing is said of the weights but how many they are
        checkpoint = dataclasses.replace(checkpoint, model=build(checkpoint.family, checkpoint.config))
    else:
        checkpoint = checkpoints.load(args.checkpoint, param_dtype=None)
    report.table(
        "facts",
        str(args.checkpoint),
        [
            {"name": name, "value": str(value) if isinstance(value, bool) else value}
            for name, value in facts(checkpoint).items()
        ],
    )
    if checkpoint.astra is None:
        report.say("codebooks: none: `astra calibrate` finds them", calibrated=False)
    else:
        report.table("blocks", "how codes are used", codebook_usage(checkpoint.model))
    report.table("history", "how it was made", [_step(step) for step in checkpoint.history])
    report.close()


def _step(step: dict[str, Any]) -> dict[str, Any]:
    details = ", ".join(f"{name} {value}" for name, value in step.items() if name != "verb")
    return {"verb": str(step.get("verb")), "details": details}
