"""What the outputs of a classifier are: one class of all, labels that are there or not, or scores."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from astra_jax.errors import AstraError
from checkpoints.fields import refuse_unknown, shorten

# What the outputs of a classifier are: one class of all, labels each of which is there or not, or plain numbers.
Problem = Literal["single_label_classification", "multi_label_classification", "regression"]
# Where sentence-transformers says what becomes of a cross-encoder's outputs.
ACTIVATIONS: dict[str, Problem] = {"Identity": "regression", "Sigmoid": "multi_label_classification"}


def problem_of(hf_config: Mapping[str, Any], num_labels: int, where: Path | str = "config.json") -> Problem:
    """What the outputs of a classifier are, as in transformers' pipelines: by `problem_type`, or by their number.

    One output without a `problem_type` is a label that is there or not, unless sentence-transformers says otherwise.

    Raises:
      AstraError: `problem_type`, or what sentence-transformers makes of outputs, is not known or does not fit.
    """
    found = hf_config.get("problem_type")
    if found is None:
        found = _activation(hf_config, where) or (
            "single_label_classification" if num_labels > 1 else "multi_label_classification"
        )
    if found not in get_args(Problem) or (found == "single_label_classification" and num_labels < 2):
        raise AstraError(
            f"{where}: problem_type is {shorten(found)} of {num_labels} label(s); it must be one of "
            f"{', '.join(get_args(Problem))}, of which the first needs two or more"
        )
    return found


def _activation(hf_config: Mapping[str, Any], where: Path | str) -> Problem | None:
    """What sentence-transformers says of a cross-encoder's outputs; None where it says nothing."""
    settings = hf_config.get("sentence_transformers") or {}
    if not isinstance(settings, dict):
        raise AstraError(f"{where}: sentence_transformers is {shorten(settings)}; it must be an object")
    known = ("activation_fn", "version")
    refuse_unknown(settings, known, Path(where), "remove it from sentence_transformers if it does not matter")
    name = settings.get("activation_fn") or hf_config.get("sbert_ce_default_activation_function")
    kind = str(name).rpartition(".")[2]
    if name is not None and kind not in ACTIVATIONS:
        raise AstraError(
            f"{where}: sentence-transformers' activation is {shorten(name)}; known are {', '.join(ACTIVATIONS)}"
        )
    return None if name is None else ACTIVATIONS[kind]
