"""What all tasks have in common: splits of examples, and how a model reads, learns and answers them.

A kind of task is a subclass of `Task`; a task is an object of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy.typing as npt
from datasets import Dataset, DatasetDict
from torch import Tensor
from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from hf_compress.core.table_files import Table
from hf_compress.tasks.answers import Answers
from hf_compress.tasks.arguments import DataArguments, WindowArguments


EVALUATED = ("validation", "test")

Processor = PreTrainedTokenizerBase | BaseImageProcessor
Batch = dict[str, Tensor]
Collator = Callable[[list[dict[str, Any]]], Mapping[str, Any]]
Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """Splits of examples, and how a model reads, learns and answers them.

    Args:
        name: For metrics and tables; the task name or the folder's.
        splits: `train`, `validation` and `test` as far as they exist, with the columns of the kind.
        files: Split -> how messages name its source.
    """

    name: str
    splits: DatasetDict
    files: Mapping[str, str] = field(default_factory=dict)

    # The name in the table of kinds, one line for lists, and what an error calls its models.
    kind: ClassVar[str]
    summary: ClassVar[str]
    model_noun: ClassVar[str]
    model_class: ClassVar[type[_BaseAutoModelClass]]
    # What the architectures of models that have this kind's head end in; empty where no head is needed.
    heads: ClassVar[tuple[str, ...]] = ()
    # Whether a lower value of the main metric is the better one.
    lower_is_better: ClassVar[bool] = False
    # Whether examples are images, so that a processor of images is needed and no tokenizer.
    reads_images: ClassVar[bool] = False
    # Whether `Trainer` can compute the metrics from the outputs it gathers.
    judged_in_training: ClassVar[bool] = True

    @classmethod
    @abstractmethod
    def read(cls, tables: Mapping[str, Table], name: str, args: DataArguments) -> Task:
        """Read the columns of this kind from the tables of all splits.

        Raises:
            ValueError: Names file, column and row of what is missing or wrong.
        """

    @classmethod
    @abstractmethod
    def fits(cls, table: Table, args: DataArguments) -> bool:
        """Whether the columns of a table look like this kind."""

    @classmethod
    def has_head(cls, config: PretrainedConfig) -> bool:
        """Whether a model of that config can answer tasks of this kind."""
        return not cls.heads or any(name.endswith(cls.heads) for name in config.architectures or [])

    @classmethod
    def unfit(cls, config: PretrainedConfig) -> str:
        """Why a trained model of that config is none of this kind, where its weights alone do not tell."""
        return ""

    @classmethod
    def made_for(cls, config: PretrainedConfig) -> bool:
        """Whether a model of that config was made for this kind and no other."""
        return bool(cls.heads) and cls.has_head(config)

    @property
    def has_own_loss(self) -> bool:
        """Whether the model's own loss, without a teacher, teaches the task."""
        return True

    @property
    def positive_class(self) -> str | None:
        """The class that F1 is of, where it is of one of two classes."""
        return None

    @property
    @abstractmethod
    def main_metric(self) -> str:
        """The metric that selects models and enters tables."""

    @abstractmethod
    def encode(self, split: str, processor: Processor, max_length: int) -> Dataset:
        """The model inputs of a split, unpadded, with labels where a loss needs them.

        Raises:
            ValueError: If `max_length` is longer than the tokenizer's model can take.
        """

    @abstractmethod
    def collator(self, processor: Processor) -> Collator:
        """What makes a batch of rows for a `Trainer`."""

    @abstractmethod
    def row_outputs(self, outputs: Any, batch: Batch) -> Sequence[Tensor]:
        """What is kept of a model's outputs (a `ModelOutput`) for each row of a batch, of one size or not."""

    def answering(self, model: PreTrainedModel) -> Callable[[Batch, Batch], Sequence[Tensor]]:
        """What computes `row_outputs` with a model, from the inputs of a batch on its device and the whole batch."""
        return lambda inputs, batch: self.row_outputs(model(**inputs), batch)

    @abstractmethod
    def answers(self, split: str, rows: Dataset, outputs: Sequence[Array]) -> Answers:
        """The answers to the examples of a split from what `row_outputs` kept for each of its encoded rows."""

    def windowed(self, windows: WindowArguments) -> Task:
        """The task as it is measured: a running text is cut as the arguments say; `ValueError` where none runs on."""
        windows.require_none(self.kind)
        return self

    def longest(self, model: PreTrainedModel, processor: Processor, max_length: int | None) -> int:
        """Tokens of the longest input of a measurement; `ValueError` if the wish is more than the model takes."""
        return DataArguments(max_length=max_length).longest

    def random_windows(self, processor: Processor, length: int, count: int, seed: int) -> Dataset | None:
        """Windows from random places of the training text; None for kinds whose examples are drawn one by one."""
        return None

    def protocol(self, rows: Dataset) -> dict[str, Any]:
        """Facts without which a metric of encoded rows cannot be compared with another one."""
        return {}

    def num_examples(self, split: str) -> int:
        """How many examples the metrics of a split are computed on."""
        return len(self.split(split))

    def text_of(self, split: str, example: int) -> str:
        """An example in words, for a list of what went wrong."""
        return f"{split}, example {example + 1}"

    def teacher_columns(self, split: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
        """The model inputs of a split once more, row by row, for a teacher that has another tokenizer.

        Raises:
            ValueError: If the rows of this kind differ between tokenizers.
        """
        raise ValueError(
            f"The teacher's tokenizer differs from the student's, and for {self.kind} both must read the same tokens: "
            "take a teacher with the student's tokenizer."
        )

    def head_settings(self) -> dict[str, Any]:
        """The config fields that size and name a new head.

        Raises:
            ValueError: If such a head could not be trained and measured on these splits.
        """
        return {}

    def describe_head(self) -> str:
        """What a new head is for, in words."""
        return self.kind

    def matched(self, config: PretrainedConfig) -> Task:
        """The task with the label ids of a model; `ValueError` if a label of the data is none of the model's."""
        return self

    def require_trainable(self) -> None:
        """Raise `ValueError` unless the split `train` is there and something can be learned from it."""
        self.split("train")

    def files_beside(self, source: str) -> dict[str, bytes]:
        """Path to content of what a folder needs beside a model of this kind, which was made from `source`."""
        return {}

    def names_for(self, config: PretrainedConfig) -> dict[str, Any]:
        """The config fields that name the labels of a model that is about to learn the task and names none."""
        return {}

    def training_outputs(self, logits: Any, labels: Any) -> Any:
        """What `Trainer` gathers of the outputs of an evaluation."""
        return logits

    def training_metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        """The metrics from what `Trainer` has gathered."""
        raise NotImplementedError

    def unmeasurable(self, split: str) -> str:
        """Why a model cannot be measured on a split, as an error says it; empty if it can."""
        return ""

    @property
    def evaluation_split(self) -> str | None:
        """`validation`, or `test` for tasks that have no other to measure on (IMDB), or None."""
        return next((name for name in EVALUATED if name in self.splits and not self.unmeasurable(name)), None)

    def measured_split(self, name: str | None = None) -> str:
        """The split that a model is measured on: the named one, else `validation`, else `test`; `ValueError` if there
        is none, or nothing to measure by."""
        found = name or self.evaluation_split or next((each for each in EVALUATED if each in self.splits), None)
        if found is None:
            there = f"{', '.join(self.splits)}: give one, or choose with split"
            raise ValueError(f"{self.name!r} has neither a validation nor a test split to measure on, only {there}.")
        self.split(found)
        if reason := self.unmeasurable(found):
            raise ValueError(reason)
        return found

    def split(self, name: str) -> Dataset:
        """The examples of a split.

        Raises:
            ValueError: Lists the splits there are.
        """
        if name not in self.splits:
            raise ValueError(
                f"split must be one of {', '.join(self.splits)}, got {name!r}: there is no such split with labels."
            )
        return self.splits[name]


def drawn(splits: DatasetDict, args: DataArguments, of: Sequence[str] = ("train", *EVALUATED)) -> DatasetDict:
    """Splits of at most as many examples as the arguments allow.

    They are drawn, not cut off: files sorted by label, as IMDB's are, would leave a single class.

    Args:
        splits: Changed.
        args: Say how many.
        of: The splits to draw from.
    """
    limits = {"train": args.max_train_samples, **dict.fromkeys(EVALUATED, args.max_eval_samples)}
    for split, limit in limits.items():
        if split in of and limit and split in splits and limit < len(splits[split]):
            splits[split] = splits[split].shuffle(seed=0).select(range(limit))
    return splits
