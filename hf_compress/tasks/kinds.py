"""The kinds of tasks, and which one a table of examples and a model belong to."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PretrainedConfig

from hf_compress.core.table_files import Table
from hf_compress.tasks.arguments import DataArguments
from hf_compress.tasks.image_classification import ImageClassification
from hf_compress.tasks.language_modeling import LanguageModeling
from hf_compress.tasks.published import PUBLISHED
from hf_compress.tasks.question_answering import QuestionAnswering
from hf_compress.tasks.reranking import Reranking
from hf_compress.tasks.sentence_embedding import SentenceEmbedding
from hf_compress.tasks.sequence_classification import SequenceClassification
from hf_compress.tasks.task import Task
from hf_compress.tasks.token_classification import TokenClassification


TASK_KINDS: dict[str, type[Task]] = {
    kind.kind: kind
    for kind in (
        SequenceClassification,
        TokenClassification,
        QuestionAnswering,
        LanguageModeling,
        ImageClassification,
        SentenceEmbedding,
        Reranking,
    )
}
# Kinds with columns of their own, which stand for no other.
_BY_COLUMNS: Sequence[type[Task]] = (QuestionAnswering, TokenClassification, ImageClassification)


class UndecidedKind(ValueError):
    """Columns fit several kinds, and no model decides."""


def kind_named(name: str) -> type[Task]:
    """The kind of that name.

    Raises:
        ValueError: Lists the kinds.
    """
    if name not in TASK_KINDS:
        raise ValueError(f"task_kind must be one of {', '.join(TASK_KINDS)}, got {name!r}.")
    return TASK_KINDS[name]


def kind_of_model(config: PretrainedConfig) -> type[Task] | None:
    """The kind that a model was made for; None for an encoder that could learn any."""
    return next((kind for kind in TASK_KINDS.values() if kind.made_for(config)), None)


def choose_kind(table: Table, name: str, args: DataArguments, model: PretrainedConfig | None = None) -> type[Task]:
    """The kind of task that a table holds.

    Args:
        table: Some split.
        name: Of the task.
        args: `task_kind` decides; then comes what a published task is known to be.
        model: Of the model that will read the task; it decides where columns fit several kinds.

    Raises:
        ValueError: If there is no such kind, or the columns fit several and the model does not decide.
    """
    if args.task_kind is not None:
        return kind_named(args.task_kind)
    published = TASK_KINDS[PUBLISHED[name].kind] if name in PUBLISHED else None
    if published is not None and args.task_name is not None:
        return published
    fitting = [kind for kind in TASK_KINDS.values() if kind.fits(table, args)]
    made_for = kind_of_model(model) if model is not None else None
    for kind in (made_for, published, *_BY_COLUMNS, SequenceClassification):
        if kind in fitting:
            return kind
    headed = made_for is not None and bool(made_for.heads)
    # Texts among other columns are a classifier's, whose column of labels has another name.
    forgotten = model is None and len(table.columns) > 1
    if not fitting or headed or forgotten:
        # What columns it needs is explained where it looks for them.
        return made_for or SequenceClassification
    if model is not None and LanguageModeling in fitting:
        # Not made for language modelling, or it would have said so.
        fitting.remove(LanguageModeling)
    if len(fitting) > 1:
        names = " or ".join(kind.kind for kind in fitting)
        raise UndecidedKind(f"{table.where} has columns that fit {names}: choose one with --task_kind.")
    return fitting[0]
