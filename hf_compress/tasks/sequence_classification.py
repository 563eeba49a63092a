"""Texts or pairs of texts that have a class, several classes, or a score.

Letters: B examples, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset, DatasetDict, Features, List, Value
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from hf_compress.core.table_files import Table
from hf_compress.tasks.answers import Answers
from hf_compress.tasks.arguments import DataArguments
from hf_compress.tasks.class_answers import ClassAnswers, SetAnswers
from hf_compress.tasks.column_choice import (
    finds_label,
    finds_texts,
    label_column,
    read_texts,
    require_columns,
    text_columns,
)
from hf_compress.tasks.inputs import tokenizer_for
from hf_compress.tasks.label_lists import holds_lists, read_label_lists
from hf_compress.tasks.label_matching import match_labels
from hf_compress.tasks.label_values import read_labels, without_unlabelled_test
from hf_compress.tasks.labelled import LabelledTask
from hf_compress.tasks.metrics import main_metric, multi_label_metrics, task_metrics
from hf_compress.tasks.pair_inputs import PairCollator, encode_pairs, reads_separately
from hf_compress.tasks.published import PUBLISHED
from hf_compress.tasks.task import Array, Batch, Collator, Processor, Task, drawn


@dataclass(frozen=True, kw_only=True)
class SequenceClassification(LabelledTask):
    """Texts with a class or a score; without `label_names` it is regression.

    Args:
        text_columns: One, or two for pairs.
        several: Whether a text may have several classes, or none; `label` is then a list.
    """

    text_columns: tuple[str, ...]
    several: bool = False

    kind: ClassVar[str] = "sequence-classification"
    summary: ClassVar[str] = "a class or a score for a text or a pair of texts"
    model_noun: ClassVar[str] = "classifier"
    model_class: ClassVar[type[Any]] = AutoModelForSequenceClassification
    heads: ClassVar[tuple[str, ...]] = ("ForSequenceClassification",)

    @classmethod
    def fits(cls, table: Table, args: DataArguments) -> bool:
        """Whether there are texts and labels."""
        return finds_texts(table, args) and finds_label(table, args)

    @classmethod
    def read(cls, tables: Mapping[str, Table], name: str, args: DataArguments) -> SequenceClassification:
        """Read texts and labels of all splits."""
        some = next(iter(tables.values()))
        known = PUBLISHED.get(name)
        texts = text_columns(some, args.text_column, args.text_pair_column, known.columns if known else None)
        column = label_column(some, args.label_column)
        if column in texts or "label" in texts:
            raise ValueError(
                f"text_column and label_column must be different columns, and texts cannot be called 'label', got "
                f"{', '.join(texts)} and {column}."
            )
        tables = without_unlabelled_test(tables, column)
        for table in tables.values():
            require_columns(table, (*texts, column))
        read = {split: read_texts(table, texts, lenient=known is not None) for split, table in tables.items()}
        values: Mapping[str, Sequence[Any]]
        several = any(_names_several(table, column) for table in tables.values())
        if several:
            lists = read_label_lists(tables, column)
            labels, values = lists.labels, lists.values
        else:
            labels = read_labels(tables, column, known.num_labels if known else None)
            values = labels.values
        kind = Value("int64" if labels.names else "float64")
        kinds = Features({**{text: Value("string") for text in texts}, "label": List(kind) if several else kind})
        splits = DatasetDict(
            {
                split: Dataset.from_dict({**read[split], "label": values[split]}, features=kinds, split=split)
                for split in tables
            }
        )
        return cls(
            name=name,
            splits=drawn(splits, args),
            files={split: table.where for split, table in tables.items()},
            **labels.task_fields(),
            labels_from=column,
            text_columns=texts,
            several=several,
        )

    @property
    def main_metric(self) -> str:
        """What GLUE judges the task by; others: accuracy, F1 where texts have several classes, Spearman
        for scores."""
        return "f1" if self.several else main_metric(self.name, self.num_labels)

    def encode(self, split: str, processor: Processor, max_length: int) -> Dataset:
        """Token ids and masks with `labels`, unpadded."""
        rows, tokenizer = self.split(split), tokenizer_for(processor, max_length)
        separate = reads_separately(tokenizer)
        if separate and len(self.text_columns) < 2:
            raise ValueError(
                f"The task {self.name!r} has one text column ({self.text_columns[0]}), and the tokenizer belongs to a "
                "model that reads two texts separately: take one with pair_mode='joint', or a task of pairs."
            )

        def target(label: Any) -> Any:
            if self.several:
                return [float(i in label) for i in range(self.num_labels)]
            return float(label) if self.is_regression else int(label)

        def encoded(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            texts = [batch[column] for column in self.text_columns]
            if separate:
                inputs = encode_pairs(tokenizer, texts[0], texts[1], max_length)
            else:
                inputs = dict(tokenizer(*texts, truncation=True, max_length=max_length))
            return {**inputs, "labels": [target(label) for label in batch["label"]]}

        return rows.map(encoded, batched=True, remove_columns=rows.column_names, load_from_cache_file=False)

    def teacher_columns(self, split: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
        """The token ids and masks of another tokenizer."""
        return self.encode(split, tokenizer, max_length).remove_columns("labels")

    def text_of(self, split: str, example: int) -> str:
        """The text, or both texts of a pair."""
        row = self.split(split)[example]
        return " ".join(row[column] for column in self.text_columns)

    @property
    def positive_class(self) -> str | None:
        """The second of two classes, in the order of the files."""
        names = self.own_names()
        return names[1] if len(names) == 2 and not self.several else None

    def collator(self, processor: Processor) -> Collator:
        """Pads to the longest row."""
        tokenizer = tokenizer_for(processor)
        return PairCollator(tokenizer) if reads_separately(tokenizer) else DataCollatorWithPadding(tokenizer)

    def row_outputs(self, outputs: Any, batch: Batch) -> Sequence[Tensor]:
        """The logits [C] of each row."""
        return list(outputs.logits.float())

    def answers(self, split: str, rows: Dataset, outputs: Sequence[Array]) -> Answers:
        """Logits and labels in the order of the files."""
        labels = rows.with_format("numpy")["labels"][:]
        if self.several:
            return SetAnswers(*self._sets_in_own_order(np.stack(outputs), labels), self.own_names())
        return ClassAnswers(*self.in_own_order(np.stack(outputs), labels), self.own_names())

    def _sets_in_own_order(self, logits: Array, labels: Array) -> tuple[Array, Array]:
        places = self.own_order(logits.shape[-1])
        return logits[:, places], labels[:, places]

    def training_metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        """The metrics from gathered logits and labels."""
        logits = predictions[0] if isinstance(predictions, tuple) else predictions
        if self.several:
            return multi_label_metrics(*self._sets_in_own_order(np.asarray(logits), np.asarray(labels)))
        return task_metrics(*self.in_own_order(np.asarray(logits), np.asarray(labels)))

    def matched(self, config: PretrainedConfig) -> Task:
        """The task with the label ids of a model; numbers become scores for a model that gives one."""
        several = config.problem_type == "multi_label_classification"
        if several != self.several and (several or config.problem_type is not None):
            ours, theirs = ("lists of labels" if many else "one label for a text" for many in (self.several, several))
            raise ValueError(
                f"its head was made for {theirs} (problem_type {config.problem_type}), the task {self.name!r} has "
                f"{ours}."
            )
        return match_labels(self, config)

    def head_settings(self) -> dict[str, Any]:
        """The config fields that size and name a new head."""
        if self.is_regression:
            return {"num_labels": 1, "problem_type": "regression"}
        number = "multi" if self.several else "single"
        return {**super().head_settings(), "problem_type": f"{number}_label_classification"}

    def describe_head(self) -> str:
        """A score, or the classes."""
        return "a score" if self.is_regression else super().describe_head()


def _names_several(table: Table, column: str) -> bool:
    """Whether a column of labels holds lists, and not each time a single label in brackets."""
    return holds_lists(table, column) and any(len(value or ()) != 1 for value in table.read(column))
