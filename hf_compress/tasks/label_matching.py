"""Labels are matched by name: the files' classes with those of a model.

Names that say nothing (LABEL_0, LABEL_1, ... or plain numbers) match by id.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import PretrainedConfig

from hf_compress.core.labels import places_by_name, says_nothing
from hf_compress.core.table_files import Table
from hf_compress.tasks.label_values import NUMBER, read_labels
from hf_compress.tasks.labelled import LabelledTask, labels_of


logger = logging.getLogger(__name__)


def _disagreement(task: LabelledTask, ours: Sequence[str], theirs: Sequence[str], places: Sequence[int | None]) -> str:
    strange = next(i for i, place in enumerate(places) if place is None)
    name = task.label_names[strange]
    rows = [f"{task.files.get(s, s)}, row {first[name]}" for s, first in task.first_rows.items() if name in first]
    return (
        f"the model has the labels {', '.join(theirs)}, the task {task.name!r} has {', '.join(ours)}: "
        f"{ours[strange]!r} ({rows[0] if rows else 'declared, in no row'}) is none of the model's. Rename the labels "
        "in the data, or id2label and label2id in the model's config.json."
    )


def _places(task: LabelledTask, theirs: Sequence[str]) -> list[int]:
    """The model's id of each class of the task."""
    ours, numbers, count = task.label_names, task.numbers, len(theirs)
    digits = numbers is not None and all(NUMBER.fullmatch(name) for name in theirs)
    if not says_nothing(theirs):
        named = list(map(str, numbers)) if numbers is not None and digits else ours
        places = places_by_name(named, theirs)
        if None not in places:
            return [place for place in places if place is not None]
        if numbers is None or digits:
            raise ValueError(_disagreement(task, named, theirs, places))
    sizes = f"its head has {count} labels, the task {task.name!r} has {len(ours)}"
    if numbers is None:
        if len(ours) != count:
            raise ValueError(f"{sizes} ({', '.join(ours)}), and the model's have no names to match.")
        logger.warning(
            "The model's labels have no names of their own. The task's are taken in this order: %s.",
            ", ".join(f"{i} is {name}" for i, name in enumerate(ours)),
        )
        return list(range(count))
    if max(numbers) >= count:
        if numbers != tuple(range(1, count + 1)) or not says_nothing(theirs):
            raise ValueError(
                f"{sizes}: label must hold the class ids 0..C-1 of the model "
                f"({', '.join(f'{i} {name}' for i, name in enumerate(theirs[:10]))}), got "
                f"{', '.join(map(str, numbers[:10]))}."
            )
        logger.warning("The model's labels are numbered from 0: the task's %s are taken in this order.", ours)
        return list(range(count))
    if "train" in task.splits and max(numbers) + 1 < count:
        raise ValueError(f"{sizes}.")
    if not says_nothing(theirs):
        logger.log(
            logging.WARNING if min(numbers) > 0 else logging.INFO,
            "Labels are numbers%s, read as the model's ids: %s.",
            " without a 0" if min(numbers) > 0 else "",
            ", ".join(f"{number} is {theirs[number]}" for number in numbers[:10]),
        )
    return list(numbers)


def match_labels(task: LabelledTask, config: PretrainedConfig) -> LabelledTask:
    """A task in the order of a model's labels.

    Args:
        task: As it was loaded.
        config: Of a model that has a head.

    Returns:
        The task with the model's ids in its splits and the model's names.

    Raises:
        ValueError: If a class of the files is none of the model's, or classes meet scores.
    """
    if config.num_labels == 1 or task.is_regression:
        return _matched_scores(task, config)
    ours, theirs = task.label_names, labels_of(config)
    places = _places(task, theirs)
    own = places == list(range(len(places)))
    order = [places[place] for place in task.order] if task.order else places
    splits = {s: _relabelled(rows, _mapped(rows["label"][:], places)) for s, rows in task.splits.items()}
    numbers = task.numbers
    if own and len(ours) == len(theirs) and says_nothing(theirs):
        # The names of the files say more.
        theirs = ours
    elif numbers is not None:
        numbers = tuple(range(len(theirs)))
    renamed = {name: theirs[place] for name, place in zip(ours, places, strict=True)}
    first = {split: {renamed[name]: row for name, row in rows.items()} for split, rows in task.first_rows.items()}
    return replace(
        task, splits=DatasetDict(splits), label_names=theirs, numbers=numbers, first_rows=first,
        order=() if order == list(range(len(order))) else tuple(order),
    )  # fmt: skip


def _reading(scores: Sequence[float]) -> Callable[[str], list[Any]]:
    return lambda column: list(map(int, scores))


def _mapped(labels: Any, places: Sequence[int]) -> Any:
    """A class id, or the ids in a list at any depth, as the model's."""
    return [_mapped(label, places) for label in labels] if isinstance(labels, list) else places[labels]


def _relabelled(rows: Dataset, labels: Sequence[Any]) -> Dataset:
    return rows.remove_columns("label").add_column("label", list(labels))


def _matched_scores(task: LabelledTask, config: PretrainedConfig) -> LabelledTask:
    if config.num_labels == 1 and task.is_regression:
        return task
    if config.num_labels == 1:
        if task.numbers is None:
            raise ValueError(
                f"its head has 1 label, a score; the task {task.name!r} has the classes {', '.join(task.label_names)}."
            )
        scores = {
            s: _relabelled(rows, [float(task.numbers[label]) for label in rows["label"]])
            for s, rows in task.splits.items()
        }
        return replace(task, splits=DatasetDict(scores), label_names=(), numbers=None)
    values = {s: list(rows["label"]) for s, rows in task.splits.items()}
    if not all(float(v).is_integer() and v >= 0 for rows in values.values() for v in rows):
        raise ValueError(
            f"its head has {config.num_labels} labels, the task {task.name!r} has scores such as "
            f"{next(iter(values.values()))[0]}."
        )
    tables = {split: Table(task.files.get(split, split), ("label",), _reading(rows)) for split, rows in values.items()}
    labels = read_labels(tables, "label")
    splits = DatasetDict({s: _relabelled(task.splits[s], labels.values[s]) for s in values})
    classes = replace(
        task, splits=splits, label_names=labels.names, numbers=labels.numbers, first_rows=labels.first_rows or {}
    )
    return match_labels(classes, config)
