"""Answers that are classes, scores, or sets of classes.

Letters: B examples, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import precision_recall_fscore_support

from hf_compress.tasks.answers import Answers
from hf_compress.tasks.metrics import Array, multi_label_metrics, task_metrics


def _by_class(right: Array, answered: Array, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Precision, recall and F1 from [B, C] booleans: which classes an example has, and which the model answered."""
    # A class that was never answered has precision 0, one without examples recall 0.
    precision, recall, f1, examples = precision_recall_fscore_support(right, answered, average=None, zero_division=0)
    return [
        {
            "name": names[place] if place < len(names) else str(place),
            "examples": int(examples[place]),
            "precision": float(precision[place]),
            "recall": float(recall[place]),
            "f1": float(f1[place]),
        }
        for place in range(right.shape[-1])
    ]


@dataclass(frozen=True)
class ClassAnswers(Answers):
    """Answers of a classifier, or of a model that gives a score.

    Args:
        logits: [B, C], or [B, 1] scores.
        labels: [B] what would have been right.
        names: Of the classes; their numbers stand for missing ones.
    """

    logits: Array
    labels: Array
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def metrics(self) -> dict[str, float]:
        return task_metrics(self.logits, self.labels)

    def at(self, examples: npt.NDArray[np.int64]) -> ClassAnswers:
        return ClassAnswers(self.logits[examples], self.labels[examples], self.names)

    def right(self) -> npt.NDArray[np.bool_] | None:
        if self.logits.shape[-1] == 1:
            return None
        return np.asarray(self.logits.argmax(-1) == self.labels)

    def describe(self, example: int) -> tuple[str, str]:
        return self._name(int(self.labels[example])), self._name(int(self.logits[example].argmax()))

    def only_answer(self) -> str | None:
        answered = np.unique(self.logits.argmax(-1))
        if self.logits.shape[-1] == 1 or len(self) < 2 or len(answered) > 1:
            return None
        return self._name(int(answered[0]))

    def by_class(self) -> list[dict[str, Any]] | None:
        if self.logits.shape[-1] == 1:
            return None
        classes = np.arange(self.logits.shape[-1])
        return _by_class(self.labels[:, None] == classes, self.logits.argmax(-1)[:, None] == classes, self.names)

    def compared(self) -> dict[str, Array]:
        """Predicted classes or scores and the right ones, under the names that metrics of the hub take."""
        scores = self.logits.shape[-1] == 1
        return {"predictions": self.logits[:, 0] if scores else self.logits.argmax(-1), "references": self.labels}

    def _name(self, label: int) -> str:
        return self.names[label] if label < len(self.names) else str(label)


@dataclass(frozen=True)
class SetAnswers(Answers):
    """Answers of a classifier that may give a text several classes.

    Args:
        logits: [B, C]; classes above 0 are answered.
        labels: [B, C] 1 for the classes of an example.
        names: Of the classes.
    """

    logits: Array
    labels: Array
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def metrics(self) -> dict[str, float]:
        return multi_label_metrics(self.logits, self.labels)

    def at(self, examples: npt.NDArray[np.int64]) -> SetAnswers:
        return SetAnswers(self.logits[examples], self.labels[examples], self.names)

    def right(self) -> npt.NDArray[np.bool_]:
        return np.asarray(((self.logits > 0) == self.labels.astype(bool)).all(-1))

    def only_answer(self) -> str | None:
        answered = self.logits > 0
        return self._set(answered[0]) if len(self) > 1 and bool((answered == answered[0]).all()) else None

    def by_class(self) -> list[dict[str, Any]]:
        return _by_class(self.labels > 0, self.logits > 0, self.names)

    def describe(self, example: int) -> tuple[str, str]:
        return self._set(self.labels[example] > 0), self._set(self.logits[example] > 0)

    def _set(self, chosen: npt.NDArray[np.bool_]) -> str:
        return ", ".join(name for name, has in zip(self.names, chosen, strict=True) if has) or "none"
