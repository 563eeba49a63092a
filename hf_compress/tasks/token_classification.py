"""Tags for the words of a sentence: names of people and places, parts of speech.

Letters: B sentences, S tokens, C classes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from datasets import Dataset, DatasetDict
from seqeval.metrics.sequence_labeling import get_entities
from sklearn.metrics import f1_score
from torch import Tensor
from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification, PretrainedConfig

from hf_compress.core.batches import live_tokens
from hf_compress.core.table_files import Table
from hf_compress.tasks.answers import Answers
from hf_compress.tasks.arguments import DataArguments
from hf_compress.tasks.column_choice import chosen_column, find_column, require_columns
from hf_compress.tasks.inputs import IGNORED, tokenizer_for
from hf_compress.tasks.label_lists import holds_lists, read_label_lists, read_lists
from hf_compress.tasks.label_matching import match_labels
from hf_compress.tasks.labelled import LabelledTask
from hf_compress.tasks.metrics import Array
from hf_compress.tasks.task import Batch, Collator, Processor, Task, drawn


logger = logging.getLogger(__name__)

_WORDS = ("tokens", "words")
_TAGS = ("tags", "ner_tags", "pos_tags", "labels", "label")


@dataclass(frozen=True)
class TagAnswers(Answers):
    """The tags that a model gave to words.

    Args:
        gold: For each sentence, [words] the ids of the right tags.
        found: The ids of the answered ones.
        names: Of the tags.
    """

    gold: Sequence[Array]
    found: Sequence[Array]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.gold)

    @cached_property
    def _entities(self) -> npt.NDArray[np.int64]:
        """[B, 3] entities found rightly, found, and to be found in each sentence."""
        rows = []
        for gold, found in zip(self.gold, self.found, strict=True):
            right, answered = (set(get_entities([self.names[i] for i in tags])) for tags in (gold, found))
            rows.append((len(right & answered), len(answered), len(right)))
        return np.array(rows, dtype=np.int64).reshape(-1, 3)

    def metrics(self) -> dict[str, float]:
        """Accuracy over words, and F1: of whole entities where tags are B-..., I-... and O, else the mean of tags."""
        gold, found = (np.concatenate([*tags, np.empty(0, np.int64)]) for tags in (self.gold, self.found))
        result = {"accuracy": float((gold == found).mean()) if len(gold) else 0.0}
        if not marks_entities(self.names):
            return {**result, "f1": float(f1_score(gold, found, average="macro", zero_division=0))}
        both, answered, right = self._entities.sum(0).tolist()
        precision, recall = both / answered if answered else 0.0, both / right if right else 0.0
        f1 = 2 * both / (answered + right) if answered + right else 0.0
        return {**result, "f1": f1, "precision": precision, "recall": recall}

    def at(self, examples: npt.NDArray[np.int64]) -> TagAnswers:
        drawn = TagAnswers([self.gold[i] for i in examples], [self.found[i] for i in examples], self.names)
        if marks_entities(self.names):
            # Finding entities takes long; a bootstrap asks for the same sentences again and again.
            vars(drawn)["_entities"] = self._entities[examples]
        return drawn

    def right(self) -> npt.NDArray[np.bool_]:
        return np.array([bool((g == f).all()) for g, f in zip(self.gold, self.found, strict=True)], dtype=bool)

    def only_answer(self) -> str | None:
        answered = np.unique(np.concatenate([*self.found, np.empty(0, np.int64)]))
        return self.names[int(answered[0])] if len(answered) == 1 and len(self) > 1 else None

    def describe(self, example: int) -> tuple[str, str]:
        gold, found = (" ".join(self.names[i] for i in tags[example]) for tags in (self.gold, self.found))
        return gold, found


def marks_entities(names: Sequence[str]) -> bool:
    """Whether tags mark where entities begin and go on.

    Example:
        >>> marks_entities(["O", "B-PER", "I-PER"]), marks_entities(["NOUN", "VERB"])
        (True, False)
    """
    return any(name[:2] == "B-" or name[:2] == "I-" for name in names) and all(
        name == "O" or name[:2] in ("B-", "I-", "E-", "S-", "L-", "U-") for name in names
    )


@dataclass(frozen=True, kw_only=True)
class TokenClassification(LabelledTask):
    """Sentences in words (column `tokens`) with a tag for each (column `label`, lists of ids)."""

    kind: ClassVar[str] = "token-classification"
    summary: ClassVar[str] = "a tag for each word of a sentence"
    model_noun: ClassVar[str] = "token classifier"
    model_class: ClassVar[type[Any]] = AutoModelForTokenClassification
    heads: ClassVar[tuple[str, ...]] = ("ForTokenClassification",)

    @classmethod
    def fits(cls, table: Table, args: DataArguments) -> bool:
        """Whether there are a column of lists of words and one of lists of tags."""
        found = (find_column(table, args.text_column, _WORDS), find_column(table, args.label_column, _TAGS))
        return all(column is not None and holds_lists(table, column) for column in found)

    @classmethod
    def read(cls, tables: Mapping[str, Table], name: str, args: DataArguments) -> TokenClassification:
        """Read words and tags of all splits."""
        some = next(iter(tables.values()))
        words = chosen_column(some, args.text_column, "text_column", "words", _WORDS)
        tags = chosen_column(some, args.label_column, "label_column", "tags", _TAGS)
        for table in tables.values():
            require_columns(table, (words, tags))
        lists = read_label_lists(tables, tags)
        splits = DatasetDict()
        for split, table in tables.items():
            sentences = read_lists(table, words)
            _check_words(table, words, sentences, lists.values[split])
            columns = {"tokens": sentences, "label": lists.values[split]}
            splits[split] = Dataset.from_dict(columns, split=split)
        return cls(
            name=name,
            splits=drawn(splits, args),
            files={split: table.where for split, table in tables.items()},
            label_names=lists.labels.names,
            labels_from=tags,
            numbers=lists.labels.numbers,
            declared=lists.labels.declared,
            first_rows=lists.labels.first_rows or {},
        )

    @property
    def main_metric(self) -> str:
        """F1 of entities, or accuracy where tags do not mark any."""
        return "f1" if marks_entities(self.label_names) else "accuracy"

    def encode(self, split: str, processor: Processor, max_length: int) -> Dataset:
        """Token ids and masks; `labels` has each word's tag on its first token, and -100 elsewhere."""
        rows, tokenizer = self.split(split), tokenizer_for(processor, max_length)
        cut = 0

        def encoded(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            nonlocal cut
            try:
                inputs = tokenizer(batch["tokens"], is_split_into_words=True, truncation=True, max_length=max_length)
                word_ids = [inputs.word_ids(row) for row in range(len(batch["tokens"]))]
            except (AssertionError, ValueError) as error:
                raise ValueError(f"The tokenizer cannot read sentences that are cut into words: {error}") from error
            labels = []
            for ids, tags in zip(word_ids, batch["label"], strict=True):
                first = [word is not None and word != before for before, word in zip([None, *ids], ids, strict=False)]
                labels.append([tags[w] if is_first else IGNORED for w, is_first in zip(ids, first, strict=True)])
                cut += len(tags) - sum(first)
            return {**inputs, "labels": labels}

        result = rows.map(encoded, batched=True, remove_columns=rows.column_names, load_from_cache_file=False)
        if cut:
            logger.warning("%d words of %s are beyond max_length=%d: no tag is learned or measured there.", cut, split,
                           max_length)  # fmt: skip
        return result

    def text_of(self, split: str, example: int) -> str:
        """The words."""
        return " ".join(self.split(split)[example]["tokens"])

    def collator(self, processor: Processor) -> Collator:
        """Pads inputs and labels to the longest row."""
        return DataCollatorForTokenClassification(tokenizer_for(processor))

    def row_outputs(self, outputs: Any, batch: Batch) -> Sequence[Tensor]:
        """[S] the likeliest tag of each token, without padding."""
        live = live_tokens(batch)
        return [tags[real] for tags, real in zip(outputs.logits.argmax(-1), live, strict=True)]

    def answers(self, split: str, rows: Dataset, outputs: Sequence[Array]) -> TagAnswers:
        """The tags of the words."""
        labels = [np.array(row) for row in rows["labels"]]
        return self._tags(list(zip(labels, outputs, strict=True)))

    def _tags(self, pairs: Sequence[tuple[Array, Array]]) -> TagAnswers:
        own = np.argsort(self.own_order(self.num_labels))
        kept = [(own[gold[gold != IGNORED]], own[found[gold != IGNORED]]) for gold, found in pairs]
        return TagAnswers([gold for gold, _ in kept], [found for _, found in kept], self.own_names())

    def training_outputs(self, logits: Any, labels: Any) -> Any:
        """The likeliest tags: logits of all tokens of a split would not fit the memory."""
        return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)

    def training_metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        """The metrics from gathered tags, padded with -100."""
        return self._tags(list(zip(np.asarray(labels), np.asarray(predictions), strict=True))).metrics()

    def matched(self, config: PretrainedConfig) -> Task:
        """The task with the label ids of a model."""
        return match_labels(self, config)


def _check_words(table: Table, column: str, sentences: list[list[Any]], tags: list[list[int]]) -> None:
    for row, (words, labels) in enumerate(zip(sentences, tags, strict=True), 1):
        if len(words) != len(labels):
            raise ValueError(f"{table.where}: row {row} has {len(words)} words in {column}, but {len(labels)} tags.")
    odd = next((word for word in chain.from_iterable(sentences) if not isinstance(word, str)), "")
    if not isinstance(odd, str):
        raise ValueError(f"{table.where}: {column} must hold lists of texts, got {odd!r} ({type(odd).__name__}).")
