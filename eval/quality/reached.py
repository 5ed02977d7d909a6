"""What a model reaches under ASTRA, as `astra eval --json` wrote it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from astra_jax.codecs.config import AstraConfig, config_of
from astra_jax.errors import AstraError
from checkpoints.files import read_json
from eval.quality.tasks import METRICS

LIMITS = {"perplexity": (1.0, 1e300), "accuracy %": (0.0, 100.0), "Spearman": (-1.0, 1.0)}  # what there can be


@dataclasses.dataclass(frozen=True)
class Quality:
    """What a model reaches under ASTRA, as `astra eval` measured it.

    Attributes:
      metric: the column, of `METRICS`.
      original: what the original reaches on one device.
      reached: (N, G) -> what ASTRA reaches.
      codes: how the codes are made that reach it: what all rows have in common.
      others: how many rows were left out, as they are of other codes.
    """

    metric: str
    original: float
    reached: Mapping[tuple[int, int], float]
    codes: AstraConfig | None = None
    others: int = 0

    def drop(self, value: float) -> float:
        """How much worse than the original a value is: points of accuracy, hundredths of correlation, or percent of
        perplexity; below 0 for a better one."""
        if self.metric == "perplexity":
            return 100 * (value / self.original - 1)
        return (self.original - value) * (1 if self.metric == "accuracy %" else 100)

    def within(self, budget: float) -> set[tuple[int, int]]:
        """The (N, G) that are at most so much worse."""
        return {way for way, value in self.reached.items() if self.drop(value) <= budget}

    def of(self, groups: int | None, N: int) -> float | None:
        """What G groups reach on N devices; without any, as under an exact strategy, what the original does. None where
        that is not known."""
        return self.original if groups is None else self.reached.get((N, groups))


def code(astra: AstraConfig) -> AstraConfig:
    """What a configuration says of codes whatever their number: that of the first group alone."""
    return astra.with_groups(1)


def read_quality(path: Path, planned: AstraConfig | None) -> Quality:
    """Reads what `astra eval --json` wrote of one kind of codes: what others reach would be paired with a cost that is
    not theirs. Of several checkpoints with the same N and G the best counts, and what is not finite counts as not
    measured.

    Args:
      path: the file.
      planned: the codes that are planned with; None to plan with those of the file.

    Raises:
      AstraError: the file is missing or is something else, there is no original, it has rows of several kinds of codes
        and none is planned with, or none of those that are; the message names file and fix.
    """
    data = read_json(path)
    rows = data.get("rows")
    if data.get("verb") != "eval" or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise AstraError(f"{path}: is not what `astra eval --json` wrote: give the file of such a run")
    metric = next((name for name in METRICS.values() if any(name in row for row in rows)), "")
    for number, row in enumerate(rows, 1):
        for column, kinds in (("N", (int,)), ("G", (int, type(None))), (metric, (int, float))):
            if column not in row:
                raise AstraError(
                    f"{path}: row {number} has no column {column or ' or '.join(METRICS.values())!r}: "
                    "give the file of a run of `astra eval --json`"
                )
            _check(row[column], column, kinds, f"{path}: row {number}")
    originals = [row[metric] for row in rows if row["N"] == 1]
    if not originals or not math.isfinite(originals[0]):
        raise AstraError(f"{path}: no row says what the original reaches on one device: give it to astra eval first")
    coded = [(row, _codes(path, row)) for row in rows if row["N"] > 1 and row["G"] is not None]
    chosen = _choose(path, [astra for _, astra in coded], planned) if coded else None
    quality = Quality(metric, float(originals[0]), {})
    reached: dict[tuple[int, int], float] = {}
    mine = [row for row, astra in coded if chosen and code(astra) == code(chosen)]
    for row in mine:
        if math.isfinite(row[metric]):
            way = row["N"], row["G"]
            reached[way] = min(float(row[metric]), reached.get(way, float(row[metric])), key=quality.drop)
    return dataclasses.replace(quality, reached=reached, codes=chosen, others=len(coded) - len(mine))


def _choose(path: Path, found: Sequence[AstraConfig], planned: AstraConfig | None) -> AstraConfig:
    """Those with the most groups of the codes that are planned with, or of the only kind that there is."""
    kinds = {code(astra): astra for astra in sorted(found, key=lambda astra: astra.groups)}
    if planned is None and len(kinds) == 1:
        return next(iter(kinds.values()))
    if planned is not None and code(planned) in kinds:
        return kinds[code(planned)]
    names = "; ".join(astra.in_words() for astra in kinds)
    plans = f"codes are planned as {planned.in_words()}" if planned else "only one kind can be planned"
    raise AstraError(f"{path} is of codes made as {names}, and {plans}: plan for one of the checkpoints it is of")


def _codes(path: Path, row: Mapping[str, Any]) -> AstraConfig:
    """How the codes of a row are made. Raises AstraError where it does not say."""
    if not isinstance(row.get("astra"), dict):
        raise AstraError(f"{path}: does not say how its codes are made: run astra eval --json again")
    return config_of(row["astra"], str(path))


def _check(value: Any, column: str, kinds: tuple[Any, ...], where: str) -> None:
    """Raises AstraError for what a column cannot say; what is not finite was not measured, which it may."""
    if value is None and type(None) in kinds:
        return
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise AstraError(f"{where}: {column} is {value!r}; it must be a number: correct it")
    least, most = LIMITS.get(column, (1, 2**31))
    measured = not isinstance(value, float) or math.isfinite(value)
    if measured and not least <= value <= most:
        raise AstraError(f"{where}: {column} is {value!r}; it is from {least:g} to {most:g}: correct it")
