"""Reads the data of a recipe before it starts: files, columns, labels, lengths."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from datasets import DatasetDict
from transformers import PreTrainedTokenizerBase

from hf_compress.core.positions import most_tokens
from hf_compress.recipes.origins import Models, Origin
from hf_compress.stages.arguments import StageArguments
from hf_compress.stages.models import fit_labels
from hf_compress.stages.processors import check_vocabulary, open_processor
from hf_compress.stages.table import stage_of
from hf_compress.stages.training import require_positions
from hf_compress.tasks.arguments import DataArguments
from hf_compress.tasks.inputs import row_lengths
from hf_compress.tasks.sequence_classification import SequenceClassification
from hf_compress.tasks.sources import load_task
from hf_compress.tasks.task import Processor, Task


# How many rows of a split are turned into tokens.
_SAMPLE = 256
_SOURCES = ("task_name", "data_dir", "train_file", "validation_file", "test_file")


@dataclass(frozen=True)
class Examples:
    """What a job reads.

    Args:
        task: The task.
        train: How many training examples there are.
        measured: How many examples models are measured on.
        tokens: How many tokens an example has in the mean.
    """

    task: Task
    train: int
    measured: int
    tokens: float


def data_of(arguments: StageArguments) -> DataArguments | None:
    """The flags of the data that a stage takes; None where it takes none, or none are named."""
    data = next((group for group in arguments.groups().values() if isinstance(group, DataArguments)), None)
    return data if data is not None and any(getattr(data, name) for name in _SOURCES) else None


def measures(arguments: StageArguments) -> bool:
    """Whether a stage measures models on a split."""
    return any(hasattr(group, "split") for group in arguments.groups().values())


class Data:
    """The tasks of a recipe, each read once."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._tasks: dict[tuple[Any, ...], Task] = {}
        self._lengths: dict[tuple[Any, ...], list[int]] = {}

    def task(self, data: DataArguments, origin: Origin, trains: bool) -> Task:
        """The task that data hold for a model.

        Raises:
            ValueError: If a file cannot be read, or lacks a column, a text or a label.
        """
        known = (origin.name, *dataclasses.astuple(data))
        if known not in self._tasks:
            self._tasks[known] = load_task(data, self._models.config(origin.name) if origin.name else None)
        task = self._tasks[known]
        # A sentence encoder may be about to learn classes.
        return load_task(data) if trains and not task.has_own_loss else task

    def examples(self, arguments: StageArguments, origin: Origin, data: DataArguments) -> Examples:
        """Read what a stage will read, and check that it can.

        Args:
            arguments: Of the stage.
            origin: The model that it starts from, or the first that it reads.
            data: Its flags of the data.

        Raises:
            ValueError: If files, columns, labels, splits or lengths do not fit.
        """
        trains = arguments.training_arguments is not None
        task = self.task(data, origin, trains)
        measured = task.evaluation_split
        if trains:
            task.require_trainable()
        if measures(arguments):
            measured = task.measured_split(arguments.option("split"))
        _check_samples(arguments, task)
        config = self._models.config(origin.name) if origin.name else None
        if config is not None and not origin.made and type(task).has_head(config):
            fit_labels(task, self._models.skeleton(str(origin.name)), str(origin.name))
        train = len(task.splits["train"]) if "train" in task.splits else 0
        _check_windows(arguments, train)
        tokens = self._tokens(arguments, origin, task, data)
        return Examples(task, train, len(task.splits[measured]) if measured else 0, tokens)

    def _tokens(self, arguments: StageArguments, origin: Origin, task: Task, data: DataArguments) -> float:
        """Tokens of an example in the mean of a sample."""
        if origin.name is None:
            return float(data.longest) / 2
        config = self._models.config(origin.name)
        processor = open_processor(origin.name, type(task))
        check_vocabulary(config, processor)
        longer, longest = arguments.option("max_positions"), data.longest
        if isinstance(processor, PreTrainedTokenizerBase):
            if longer is not None or origin.made:
                # An earlier stage may have given the model more positions, too.
                processor.model_max_length = longer or max(processor.model_max_length, longest)
            stage = stage_of(type(arguments))
            if stage is not None and "max_length" in stage.unused:
                longest = min(longest, processor.model_max_length)
        known = (origin.name, task.kind, longest, *dataclasses.astuple(data))
        if known not in self._lengths:
            self._lengths[known] = _lengths(task, processor, longest)
        lengths = self._lengths[known]
        limit = None if origin.made or task.reads_images else most_tokens(self._models.skeleton(origin.name))
        require_positions(max(lengths, default=0), limit if longer is None else longer, data.longest)
        return sum(lengths) / max(len(lengths), 1)


def _lengths(task: Task, processor: Processor, longest: int) -> list[int]:
    """Tokens of the first rows of each split."""
    lengths: list[int] = []
    for name, rows in task.splits.items():
        few = rows.select(range(min(_SAMPLE, len(rows))))
        sample = dataclasses.replace(task, splits=DatasetDict({name: few}))
        lengths += row_lengths(sample.encode(name, processor, longest))
    return lengths


def _check_samples(arguments: StageArguments, task: Task) -> None:
    """Refuse to draw more calibration examples than there are."""
    asked: Any = arguments.option("calibration_samples")
    if asked is None or not isinstance(task, SequenceClassification):
        return
    if "calibration_samples" in arguments.chosen() and arguments.training_arguments is None:
        available = len(task.split("train"))
        if asked > available:
            raise ValueError(f"calibration_samples must be in 1..{available} (the training rows), got {asked}.")


def _check_windows(arguments: StageArguments, rows: int) -> None:
    """Refuse epochs that end within a window where the published code of ProKT does not allow that."""
    training = arguments.training_arguments
    if training is None or getattr(training, "compat", None) != "prokt":
        return
    size, accumulation = training.train_batch_size, training.gradient_accumulation_steps
    batches = rows // size if training.dataloader_drop_last else -(-rows // size)
    if batches % accumulation:
        raise ValueError(
            f"gradient_accumulation_steps must divide the {batches} batches of an epoch with compat='prokt', got "
            f"{accumulation}: change it or per_device_train_batch_size, or leave compat out."
        )
