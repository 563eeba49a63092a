"""Sentences as vectors: how alike two of them are is the cosine between their vectors.

Pairs with scores say how well cosines order them; pairs without scores are queries with the text that belongs to each.

Letters: B pairs, D dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from datasets import Dataset, DatasetDict
from torch import Tensor
from transformers import AutoModel, DataCollatorWithPadding, PretrainedConfig, PreTrainedTokenizerBase

from hf_compress.core.batches import live_tokens
from hf_compress.core.pooling import Pooling, has_pooling, pooling_of, sentence_files
from hf_compress.core.table_files import Table
from hf_compress.tasks.answers import Answers
from hf_compress.tasks.arguments import DataArguments
from hf_compress.tasks.column_choice import finds_label, finds_texts, label_column, read_texts, text_columns
from hf_compress.tasks.inputs import tokenizer_for
from hf_compress.tasks.label_values import read_labels, without_unlabelled_test
from hf_compress.tasks.metrics import Array, regression_metrics
from hf_compress.tasks.retrieval import RetrievalAnswers, ranks_of
from hf_compress.tasks.task import Batch, Collator, Processor, Task, drawn


@dataclass(frozen=True)
class SimilarityAnswers(Answers):
    """How alike a model finds pairs of sentences.

    Args:
        cosines: [B] of the two vectors.
        scores: [B] how alike people found them, on any scale.
    """

    cosines: Array
    scores: Array

    def __len__(self) -> int:
        return len(self.scores)

    def metrics(self) -> dict[str, float]:
        """The correlation of the ranks (Spearman) and of the values (Pearson)."""
        return regression_metrics(self.cosines, self.scores)

    def at(self, examples: npt.NDArray[np.int64]) -> SimilarityAnswers:
        return SimilarityAnswers(self.cosines[examples], self.scores[examples])


@dataclass(frozen=True, kw_only=True)
class SentenceEmbedding(Task):
    """Columns `sentence1`, and for pairs `sentence2` and `label`, a score; a split of texts alone has the first only.

    Where no split has scores, the first sentence of each pair is a query, and the second the text that belongs to it.

    Args:
        pooling: How the vectors of tokens become one.
    """

    pooling: Pooling = Pooling.MEAN

    kind: ClassVar[str] = "sentence-embedding"
    summary: ClassVar[str] = "a vector for a sentence, close to those of similar sentences"
    model_noun: ClassVar[str] = "encoder"
    model_class: ClassVar[type[Any]] = AutoModel
    judged_in_training: ClassVar[bool] = False

    @classmethod
    def fits(cls, table: Table, args: DataArguments) -> bool:
        """Whether there are texts alone, or pairs of texts with a label."""
        if not finds_texts(table, args):
            return False
        pairs = len(text_columns(table, args.text_column, args.text_pair_column)) == 2
        return pairs or not finds_label(table, args)

    @classmethod
    def made_for(cls, config: PretrainedConfig) -> bool:
        """Whether a folder says that its model embeds sentences."""
        return has_pooling(config)

    @classmethod
    def read(cls, tables: Mapping[str, Table], name: str, args: DataArguments) -> SentenceEmbedding:
        """Read texts of all splits, and scores of those that have pairs."""
        scored = {split: table for split, table in tables.items() if finds_label(table, args)}
        if scored:
            column = label_column(next(iter(scored.values())), args.label_column)
            scored = without_unlabelled_test(scored, column)
            scores = read_labels(scored, column, known_labels=1).values
        splits = DatasetDict()
        for split, table in tables.items():
            names = text_columns(table, args.text_column, args.text_pair_column)
            columns: dict[str, Sequence[Any]] = {
                f"sentence{i}": texts for i, texts in enumerate(read_texts(table, names).values(), 1)
            }
            if split in scored and len(names) == 2:
                columns["label"] = scores[split]
            splits[split] = Dataset.from_dict(dict(columns), split=split)
        files = {split: table.where for split, table in tables.items()}
        return cls(name=name, splits=drawn(splits, args), files=files)

    @property
    def main_metric(self) -> str:
        """Spearman's correlation of scored pairs, else the share of queries whose text is the nearest."""
        return "recall_at_1" if self._retrieves else "spearman"

    @property
    def _retrieves(self) -> bool:
        """Whether what is measured are queries and not scores."""
        return not any("label" in rows.column_names for rows in self.splits.values())

    @property
    def has_own_loss(self) -> bool:
        """No: only a teacher's vectors teach a sentence encoder here."""
        return False

    def unmeasurable(self, split: str) -> str:
        """Say what is missing where a split has no pairs, or no scores and another split has some."""
        if ("sentence2" if self._retrieves else "label") in self.split(split).column_names:
            return ""
        return (
            f"{self.files.get(split, split)} has texts, but no pairs to measure on: columns such as sentence1, "
            "sentence2 and label (a score), or sentence1 and sentence2 (a query and the text that belongs to it)."
        )

    def encode(self, split: str, processor: Processor, max_length: int) -> Dataset:
        """Token ids and masks of every sentence, both of a pair one after the other.

        Of pairs without scores: first all queries, then every text once.
        """
        rows, tokenizer = self.split(split), tokenizer_for(processor, max_length)
        names = [name for name in rows.column_names if name != "label"]
        if self._retrieves and "sentence2" in names:
            sentences = rows["sentence1"][:] + list(dict.fromkeys(rows["sentence2"][:]))
        else:
            sentences = [text for row in rows.select_columns(names) for text in row.values()]
        encoded = tokenizer(sentences, truncation=True, max_length=max_length)
        return Dataset.from_dict(dict(encoded), split=rows.split)

    def teacher_columns(self, split: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
        """The token ids and masks of another tokenizer."""
        return self.encode(split, tokenizer, max_length)

    def text_of(self, split: str, example: int) -> str:
        """Both sentences."""
        row = self.split(split)[example]
        return " / ".join(value for name, value in row.items() if name != "label")

    def collator(self, processor: Processor) -> Collator:
        """Pads to the longest row."""
        return DataCollatorWithPadding(tokenizer_for(processor))

    def row_outputs(self, outputs: Any, batch: Batch) -> Sequence[Tensor]:
        """[D] the vector of each sentence."""
        return list(self.pooling.pooled(outputs.last_hidden_state.float(), live_tokens(batch)))

    def answers(self, split: str, rows: Dataset, outputs: Sequence[Array]) -> SimilarityAnswers | RetrievalAnswers:
        """The cosine of each pair, or where the text of each query stands."""
        vectors, pairs = np.stack(outputs).astype(np.float64), self.split(split)
        unit = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
        if self._retrieves:
            places = {text: place for place, text in enumerate(dict.fromkeys(pairs["sentence2"][:]))}
            wanted = np.array([places[text] for text in pairs["sentence2"][:]])
            return RetrievalAnswers(ranks_of(unit[: len(pairs)], unit[len(pairs) :], wanted))
        cosines = (unit[0::2] * unit[1::2]).sum(-1)
        return SimilarityAnswers(cosines, np.array(pairs["label"][:], dtype=np.float64))

    def matched(self, config: PretrainedConfig) -> Task:
        """The task with the pooling of a model's folder; the mean where it has none."""
        return replace(self, pooling=pooling_of(config))

    def files_beside(self, source: str) -> dict[str, bytes]:
        """What SentenceTransformer reads beside the model: the source's own files, or mean pooling."""
        return sentence_files(source)
