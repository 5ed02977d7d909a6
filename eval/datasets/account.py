"""What was read of data, and what was not: said to people, and kept for machines."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int

from astra_jax.report import Report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Account:
    """How much was read of how much.

    Attributes:
      where: what was asked for.
      what: pictures, documents, texts or pairs.
      read: so many of them were read,
      of: of so many in the splits that were asked for.
      classes: classes that what was read has; None without classes.
      of_classes: classes that the data have in all their splits.
      left_out: why, and how many.
      notes: what was taken for granted, such as how classes were matched.
    """

    where: str
    what: str
    read: int
    of: int
    classes: int | None = None
    of_classes: int | None = None
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def first(self, count: int | None, labels: Int[np.ndarray, "rows"] | None = None) -> "Account":
        """Of the first so many alone; None for all. `labels` are the classes of all that was read."""
        return self.some(np.arange(self.read if count is None else min(count, self.read)), labels)

    def some(self, rows: Int[np.ndarray, "some"], labels: Int[np.ndarray, "rows"] | None = None) -> "Account":
        """Of these rows alone."""
        classes = self.classes if labels is None else len(np.unique(labels[rows]))
        return dataclasses.replace(self, read=len(rows), classes=classes)

    def noted(self, *notes: str) -> "Account":
        """With more notes."""
        return dataclasses.replace(self, notes=(*self.notes, *notes))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        text = f"{self.where} read {self.read:,} of {self.of:,} {self.what}"
        if self.classes is not None:
            text += f" in {self.classes:,} of {self.of_classes:,} classes"
        if self.left_out:
            text += "; left out: " + ", ".join(f"{count:,} {why}" for why, count in self.left_out.items())
        return "; ".join([text, *self.notes])


Tell = Callable[[Account], None]  # is told of everything that is read


def telling(report: Report) -> Tell:
    """Says each account once, and records it under `data`."""
    told: list[dict[str, Any]] = []

    def tell(account: Account) -> None:
        if account.as_dict() not in told:
            told.append(account.as_dict())
            report.say(str(account), data=told)

    return tell
