"""The kinds of tasks, and which one a table of examples and a model belong to."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PretrainedConfig

from hf_compress.tasks.arguments import DataArguments
from hf_compress.tasks.published import PUBLISHED
from hf_compress.tasks.sequence_classification import SequenceClassification
from hf_compress.tasks.table_files import Table
from hf_compress.tasks.task import Task


_KINDS: Sequence[type[Task]] = (SequenceClassification,)
TASK_KINDS: dict[str, type[Task]] = {kind.kind: kind for kind in _KINDS}


def kind_named(name: str) -> type[Task]:
    """The kind of that name.

    Raises:
        ValueError: Lists the kinds.
    """
    if name not in TASK_KINDS:
        raise ValueError(f"task_kind must be one of {', '.join(TASK_KINDS)}, got {name!r}.")
    return TASK_KINDS[name]


def kind_of_model(config: PretrainedConfig) -> type[Task] | None:
    """The kind that a model has the head of; None for a model without one of ours."""
    return next((kind for kind in TASK_KINDS.values() if kind.heads and kind.has_head(config)), None)


def choose_kind(table: Table, name: str, args: DataArguments, model: PretrainedConfig | None = None) -> type[Task]:
    """The kind of task that a table holds.

    Args:
        table: Some split.
        name: Of the task.
        args: `task_kind` decides; then comes what a published task is known to be.
        model: Of the model that will read the task; it decides where columns fit several kinds.

    Raises:
        ValueError: If there is no such kind.
    """
    if args.task_kind is not None:
        return kind_named(args.task_kind)
    if name in PUBLISHED:
        return TASK_KINDS[PUBLISHED[name].kind]
    fitting = [kind for kind in TASK_KINDS.values() if kind.fits(table, args)]
    if model is not None and (head := kind_of_model(model)) in fitting:
        return head
    # The columns of texts and labels are explained where they are looked for.
    return fitting[0] if fitting else SequenceClassification
