"""A classification or regression task: labelled splits and what their labels mean.

Letters: B examples, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset, DatasetDict


EVALUATED = ("validation", "test")


@dataclass(frozen=True)
class Task:
    """Labelled splits and what their labels mean.

    Args:
        name: For metrics and tables; the task name or the folder's.
        splits: `train`, `validation` and `test` as far as they exist, with a column `label`: ids, or scores for
            regression.
        text_columns: One, or two for pairs.
        label_names: Class names in the order of the ids in `splits`; empty for regression.
        numbers: For each class, the id that the files give it; None where they name classes by texts.
        declared: Whether the files list their classes, so that a class may occur in no row.
        files: Split -> how messages name its source.
        first_rows: Split -> label name -> the first row (counted from 1) that has it.
        order: After `labels.match_labels`: for each class of the files, the model's id. Empty: the files' own order.
    """

    name: str
    splits: DatasetDict
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...]
    numbers: tuple[int, ...] | None = None
    declared: bool = False
    files: Mapping[str, str] = field(default_factory=dict)
    first_rows: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    order: tuple[int, ...] = ()

    @property
    def num_labels(self) -> int:
        return len(self.label_names) or 1

    @property
    def is_regression(self) -> bool:
        return not self.label_names

    @property
    def evaluation_split(self) -> str | None:
        """`validation`, or `test` for tasks that have no other (IMDB), or None."""
        return next((name for name in EVALUATED if name in self.splits), None)

    def measured_split(self, name: str | None = None) -> str:
        """The split that a model is measured on: the named one, else `validation`, else `test`.

        Raises:
            ValueError: If there is none.
        """
        if name is not None:
            self.split(name)
            return name
        if self.evaluation_split is None:
            raise ValueError(
                f"The task {self.name!r} has neither a validation nor a test split to measure on, only "
                f"{', '.join(self.splits)}: give one, or choose with split."
            )
        return self.evaluation_split

    def split(self, name: str) -> Dataset:
        if name not in self.splits:
            raise ValueError(
                f"split must be one of {', '.join(self.splits)}, got {name!r}: there is no such split with labels."
            )
        return self.splits[name]

    def own_order(self, classes: int) -> list[int]:
        """The model's ids in the order of the files; classes that only the model has come last."""
        return [*self.order, *(i for i in range(classes) if i not in self.order)]

    def in_own_order(self, logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logits [B, C] and labels [B] of a model's order in that of the files.

        What depends on the order, such as F1 of class 1, then means the same for every model.
        """
        if not self.order:
            return logits, labels
        places = self.own_order(logits.shape[-1])
        back = np.empty(len(places), dtype=labels.dtype)
        back[places] = np.arange(len(places))
        return logits[:, places], back[labels]
