"""Tasks whose labels are classes with names: of texts, tokens or images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig

from hf_compress.core.labels import says_nothing
from hf_compress.tasks.task import Array, Task


# With fewer classes than this, few rows for each class mean a small file, not a mistake.
_MANY = 20


@dataclass(frozen=True, kw_only=True)
class LabelledTask(Task):
    """Splits with a column `label` of class ids: one for each example, or a list.

    Args:
        label_names: Class names in the order of the ids in `splits`; empty for regression.
        labels_from: The files' column of labels.
        numbers: For each class, the id that the files give it; None where they name classes by texts.
        declared: Whether the files list their classes, so that a class may occur in no row.
        first_rows: Split -> label name -> the first row (counted from 1) that has it.
        order: After `matched`: for each class of the files, the model's id. Empty: the files' own order.
    """

    label_names: tuple[str, ...]
    labels_from: str = "label"
    numbers: tuple[int, ...] | None = None
    declared: bool = False
    first_rows: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    order: tuple[int, ...] = ()

    @property
    def is_regression(self) -> bool:
        """Whether labels are scores."""
        return not self.label_names

    @property
    def num_labels(self) -> int:
        return len(self.label_names) or 1

    def own_order(self, classes: int) -> list[int]:
        """The model's ids in the order of the files; classes that only the model has come last."""
        return [*self.order, *(i for i in range(classes) if i not in self.order)]

    def own_names(self) -> tuple[str, ...]:
        """The names of the classes in the order of the files."""
        return tuple(self.label_names[place] for place in self.own_order(len(self.label_names)))

    def in_own_order(self, logits: Array, labels: Array) -> tuple[Array, Array]:
        """Logits [B, C] and labels [B] of a model's order in that of the files.

        What depends on the order, such as F1 of class 1, then means the same for every model.
        """
        if not self.order:
            return logits, labels
        places = self.own_order(logits.shape[-1])
        back = [places.index(i) for i in range(len(places))]
        return logits[:, places], _array_of(back, labels)

    def head_settings(self) -> dict[str, Any]:
        """The config fields that size and name a new head."""
        self._require_seen()
        return {"num_labels": self.num_labels, **names_in_config(self.label_names)}

    def describe_head(self) -> str:
        """The classes, in words."""
        return f"{self.num_labels} classes ({', '.join(self.label_names[:10])})"

    def names_for(self, config: PretrainedConfig) -> dict[str, Any]:
        """The config fields that name the labels of a model that is about to learn the task and names none."""
        nameless = self.label_names and says_nothing(labels_of(config))
        return names_in_config(self.label_names) if nameless else {}

    def require_trainable(self) -> None:
        """Raise `ValueError` unless `train` has at least two classes."""
        self.split("train")
        if self.label_names and len(self.first_rows["train"]) < 2:
            raise ValueError(
                f"{self.files['train']}: {self.labels_from} must have at least two classes, got only "
                f"{', '.join(self.first_rows['train'])}."
            )

    def _require_seen(self) -> None:
        """Refuse a new head that would be measured on classes that no training row has."""
        seen = self.first_rows.get("train")
        if seen is not None and not self.declared:
            for split, rows in self.first_rows.items():
                for name, row in rows.items():
                    if name not in seen:
                        raise ValueError(
                            f"{self.files.get(split, split)}, row {row} has the label {name!r}, which no row of train "
                            f"has ({', '.join(list(seen)[:10])})."
                        )
        if seen is not None and self.num_labels > _MANY and len(self.splits["train"]) < 2 * self.num_labels:
            raise ValueError(
                f"{self.labels_from} has {self.num_labels} classes in the {len(self.splits['train'])} rows of "
                "train, which looks like a number for each row. Name the column that holds the classes (label_column)."
            )
        if self.num_labels < 2:
            raise ValueError(
                f"{self.labels_from} must have at least two classes, got only {', '.join(self.label_names)}."
            )


def _array_of(places: Sequence[int], labels: Array) -> Array:
    back = labels.copy()
    for label, place in enumerate(places):
        back[labels == label] = place
    return back


def labels_of(config: PretrainedConfig) -> tuple[str, ...]:
    """A model's label names in the order of its outputs."""
    names: dict[Any, str] = dict(config.id2label or {})
    return tuple(str(names.get(i, f"LABEL_{i}")) for i in range(config.num_labels or 0))


def names_in_config(labels: Sequence[str]) -> dict[str, Any]:
    """The two config fields that name labels."""
    return {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
