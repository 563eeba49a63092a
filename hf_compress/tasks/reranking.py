"""Queries with passages, which a model scores together: the best passages of a query come first.

Letters: B pairs, Q queries.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from datasets import Dataset, DatasetDict
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from hf_compress.core.table_files import Table
from hf_compress.tasks.arguments import DataArguments
from hf_compress.tasks.column_choice import (
    finds_label,
    finds_texts,
    label_column,
    read_texts,
    require_columns,
    text_columns,
)
from hf_compress.tasks.inputs import tokenizer_for
from hf_compress.tasks.label_values import read_labels, without_unlabelled_test
from hf_compress.tasks.pair_inputs import reads_separately
from hf_compress.tasks.retrieval import RetrievalAnswers
from hf_compress.tasks.task import EVALUATED, Array, Batch, Collator, Processor, Task, drawn


@dataclass(frozen=True, kw_only=True)
class Reranking(Task):
    """Columns `query`, `passage` and `label`, the relevance between 0 and 1; a split to learn from may have no labels.

    What is measured is the order of the passages of each query. A passage is relevant if its label is above 0.
    """

    kind: ClassVar[str] = "reranking"
    summary: ClassVar[str] = "a score for a query and a passage, by which the passages of a query are ordered"
    model_noun: ClassVar[str] = "reranker"
    model_class: ClassVar[type[Any]] = AutoModelForSequenceClassification
    heads: ClassVar[tuple[str, ...]] = ("ForSequenceClassification",)
    judged_in_training: ClassVar[bool] = False

    @classmethod
    def fits(cls, table: Table, args: DataArguments) -> bool:
        """Never of itself: such columns are those of a classifier of pairs, too, so `task_kind` names this kind."""
        return False

    @classmethod
    def made_for(cls, config: PretrainedConfig) -> bool:
        """Never of itself: a model with one score may be one of regression."""
        return False

    @classmethod
    def read(cls, tables: Mapping[str, Table], name: str, args: DataArguments) -> Reranking:
        """Read queries and passages of all splits, and the labels of those that have some."""
        labelled = {split: table for split, table in tables.items() if finds_label(table, args)}
        labels: Mapping[str, Sequence[Any]] = {}
        if labelled or args.label_column is not None:
            column = label_column(next(iter((labelled or tables).values())), args.label_column)
            tables = without_unlabelled_test(tables, column)
            labelled = {split: table for split, table in labelled.items() if split in tables}
            for table in labelled.values():
                require_columns(table, (column,))
            labels = read_labels(labelled, column, known_labels=1).values
        splits = DatasetDict()
        for split, table in tables.items():
            names = text_columns(table, args.text_column, args.text_pair_column) if finds_texts(table, args) else ()
            if len(names) != 2:
                raise ValueError(
                    f"{table.where} must have a column of queries and one of passages (query and passage, or named "
                    f"by --text_column and --text_pair_column), it has {', '.join(table.columns)}."
                )
            queries, passages = read_texts(table, names).values()
            columns: dict[str, Sequence[Any]] = {"query": queries, "passage": passages}
            if split in labels:
                wrong = next((row for row, label in enumerate(labels[split], 1) if not 0 <= label <= 1), None)
                if wrong is not None:
                    raise ValueError(
                        f"{table.where}: {column} must be a relevance between 0 and 1, got {labels[split][wrong - 1]} "
                        f"in row {table.row_of(wrong)}. Divide grades by the highest one; drop rows without a label."
                    )
                columns["label"] = labels[split]
            splits[split] = Dataset.from_dict(columns, split=split)
        files = {split: table.where for split, table in tables.items()}
        return cls(name=name, splits=_drawn_by_query(drawn(splits, args, of=("train",)), args), files=files)

    @property
    def main_metric(self) -> str:
        """The mean reciprocal rank of the first relevant passage."""
        return "mrr"

    @property
    def has_own_loss(self) -> bool:
        """Whether there are labels to learn from."""
        return "train" not in self.splits or "label" in self.splits["train"].column_names

    def unmeasurable(self, split: str) -> str:
        """Say what is missing where a split has no query with relevant and other passages."""
        where = self.files.get(split, split)
        if "label" not in self.split(split).column_names:
            return f"{where} has no column of labels to measure by: the relevance of each passage, between 0 and 1."
        if not self.num_examples(split):
            return f"{where} must have a query with relevant passages (label above 0) and others (0), got none."
        return ""

    def encode(self, split: str, processor: Processor, max_length: int) -> Dataset:
        """Token ids and masks of query and passage together, with `labels` [1] where there are some."""
        rows, tokenizer = self.split(split), tokenizer_for(processor, max_length)
        if reads_separately(tokenizer):
            raise ValueError(
                "A reranker must read query and passage together, and the tokenizer belongs to a model that reads two "
                "texts separately: take one with pair_mode='joint'."
            )

        def encoded(batch: dict[str, list[Any]]) -> dict[str, Any]:
            inputs = dict(tokenizer(batch["query"], batch["passage"], truncation=True, max_length=max_length))
            if "label" in batch:
                inputs["labels"] = [[label] for label in batch["label"]]
            return inputs

        return rows.map(encoded, batched=True, remove_columns=rows.column_names, load_from_cache_file=False)

    def teacher_columns(self, split: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
        """The token ids and masks of another tokenizer."""
        rows = self.encode(split, tokenizer, max_length)
        return rows.remove_columns([name for name in rows.column_names if name == "labels"])

    def text_of(self, split: str, example: int) -> str:
        """Query and passage."""
        row = self.split(split)[example]
        return f"{row['query']} / {row['passage']}"

    def collator(self, processor: Processor) -> Collator:
        """Pads to the longest row."""
        return DataCollatorWithPadding(tokenizer_for(processor))

    def row_outputs(self, outputs: Any, batch: Batch) -> Sequence[Tensor]:
        """[1] the score of each pair."""
        return list(outputs.logits.float())

    def answers(self, split: str, rows: Dataset, outputs: Sequence[Array]) -> RetrievalAnswers:
        """Where the first relevant passage of each query stands among its passages."""
        pairs = self.split(split)
        relevant = np.array(pairs["label"][:]) > 0
        ranks = ranks_by_query(pairs["query"][:], np.stack(outputs)[:, 0], relevant)
        # A query may have several relevant passages, of which one is enough.
        return RetrievalAnswers(ranks, share="hit_rate")

    def num_examples(self, split: str) -> int:
        """The queries that decide."""
        rows = self.split(split)
        relevant = np.array(rows["label"][:]) > 0
        return len(ranks_by_query(rows["query"][:], relevant.astype(float), relevant))

    def matched(self, config: PretrainedConfig) -> Task:
        """The task itself, for a model that gives one score."""
        if config.num_labels != 1:
            raise ValueError(f"its head gives {config.num_labels} scores, and a reranker must give a single one.")
        return self

    def names_for(self, config: PretrainedConfig) -> dict[str, Any]:
        """The loss of a model whose config names none: transformers would take squared errors."""
        return self.head_settings() if config.problem_type is None else {}

    def head_settings(self) -> dict[str, Any]:
        """One score, taught by cross-entropy as a probability."""
        return {"num_labels": 1, "problem_type": "multi_label_classification"}

    def describe_head(self) -> str:
        """The score of a query and a passage."""
        return "the score of a query and a passage"


def ranks_by_query(queries: Sequence[str], scores: Array, relevant: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Count the passages that stand before the first relevant one of each query.

    A passage with the same score stands before it, so that a model that scores all alike gets no credit. Queries
    without a relevant passage, or with no other, decide nothing and are left out.

    Args:
        queries: [B].
        scores: [B].
        relevant: [B].

    Returns:
        [Q], in the order in which queries occur first.

    Example:
        >>> relevant = np.array([True, False, False, True, False])
        >>> ranks_by_query(["a", "a", "a", "b", "b"], np.array([0.5, 0.9, 0.1, 2.0, 1.0]), relevant).tolist()
        [1, 0]
    """
    found = []
    for of_query in _rows_by_query(queries).values():
        own, right = scores[of_query], relevant[of_query]
        if right.any() and not right.all():
            # A score that is no number stands last if relevant and first if not.
            best = np.max(np.where(np.isnan(own[right]), -np.inf, own[right]))
            found.append(int((~(own[~right] < best)).sum()))
    return np.array(found, dtype=np.int64)


def _rows_by_query(queries: Sequence[str]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for row, query in enumerate(queries):
        rows.setdefault(query, []).append(row)
    return rows


def _drawn_by_query(splits: DatasetDict, args: DataArguments) -> DatasetDict:
    """Splits to measure on of at most `max_eval_samples` rows, but of whole queries, and of one at least."""
    for split in EVALUATED:
        if split in splits and args.max_eval_samples and args.max_eval_samples < len(splits[split]):
            groups, kept = list(_rows_by_query(splits[split]["query"][:]).values()), list[int]()
            random.Random(0).shuffle(groups)
            for group in groups:
                if kept and len(kept) + len(group) > args.max_eval_samples:
                    break
                kept += group
            splits[split] = splits[split].select(sorted(kept))
    return splits
