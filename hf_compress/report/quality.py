"""Measures models on a split, and the difference between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from tqdm.auto import tqdm
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import EvalPrediction

from hf_compress.core.batches import on_device
from hf_compress.core.modes import evaluating
from hf_compress.tasks.answers import Answers
from hf_compress.tasks.inputs import length_sorted
from hf_compress.tasks.labelled import labels_of
from hf_compress.tasks.sequence_classification import SequenceClassification
from hf_compress.tasks.task import Array, Processor, Task
from hf_compress.training.preflight import MetricCallback


_RESAMPLES = 200


def task_of_rows(config: PretrainedConfig, name: str = "") -> Task:
    """Classification or regression by rows that are encoded already, with `labels` in the order of a model."""
    names = labels_of(config) if (config.num_labels or 0) > 1 else ()
    return SequenceClassification(name=name, splits=DatasetDict(), label_names=names, text_columns=())


@dataclass(frozen=True)
class Measured:
    """A model, and the examples encoded for it.

    Args:
        model: On the device where it is measured; maybe an exported one, which is called as the original is.
        rows: As `task.encode` gave them with `processor`, labels in the model's order.
        processor: Its own tokenizer, or what prepares its images.
        task: In the model's order of labels.
        split: Which split the rows are.
    """

    model: PreTrainedModel
    rows: Dataset
    processor: Processor
    task: Task
    split: str


@torch.no_grad()
def _outputs(measured: Measured, batch_size: int) -> list[Array]:
    """What the task keeps of the model's outputs, for each row, computed on length-sorted batches in eval mode."""
    model, found = measured.model, {}
    # Shown on terminals only.
    progress = tqdm(total=len(measured.rows), desc="measuring", unit="rows", leave=False, disable=None)
    with evaluating(model), progress:
        answer = measured.task.answering(model)
        for batch in length_sorted(measured.rows, batch_size, measured.processor):
            index = batch.pop("index")
            labels = {name: batch.pop(name) for name in ("labels",) if name in batch}
            inputs = on_device(model, batch)
            kept = answer(inputs, {**inputs, **labels})
            found.update({int(row): value.cpu().numpy() for row, value in zip(index, kept, strict=True)})
            progress.update(len(index))
    if not found:
        raise ValueError("rows must hold at least one example, got none.")
    return [found[row] for row in range(len(measured.rows))]


def predict(model: PreTrainedModel, rows: Dataset, processor: Processor, batch_size: int = 32) -> torch.Tensor:
    """Logits [rows, classes] in the order of the rows, computed on length-sorted batches in eval mode."""
    return torch.from_numpy(
        np.stack(_outputs(Measured(model, rows, processor, task_of_rows(model.config), ""), batch_size))
    )


def evaluated(measured: Measured, batch_size: int = 32) -> Answers:
    """Compute a model's answers to its examples, in the order of classes that all models share.

    Raises:
        ValueError: If there are no rows.
    """
    return measured.task.answers(measured.split, measured.rows, _outputs(measured, batch_size))


def evaluate_model(
    model: PreTrainedModel, rows: Dataset, processor: Processor, batch_size: int = 32
) -> dict[str, float]:
    """Measure a classifier or a regressor on encoded rows.

    Args:
        model: On the device where it is measured.
        rows: With the inputs of the model and `labels` in its order, as `task.encode` gives them.
        processor: The model's tokenizer, or its image processor.
        batch_size: Rows that go through the model at once.

    Returns:
        Metrics by name, fractions from 0 to 1: accuracy and F1 of classes, Pearson and Spearman of numbers.

    Raises:
        ValueError: If there are no rows.

    Example:
        >>> import hf_compress as hc
        >>> task = hc.load_task(hc.DataArguments(data_dir="reviews")).matched(model.config)  # doctest: +SKIP
        >>> hc.evaluate_model(model, task.encode("test", tokenizer, 128), tokenizer)  # doctest: +SKIP
        {'accuracy': 0.883, 'f1': 0.881}
    """
    return evaluated(Measured(model, rows, processor, task_of_rows(model.config), ""), batch_size).metrics()


class TaskEvaluation(MetricCallback):
    """Adds a task's metrics to a `Trainer`'s evaluations, for kinds that it cannot judge from what it gathers.

    Args:
        task: In the model's order of labels.
        split: Which split is measured.
        rows: As the task encoded that split.
        processor: That encoded them.
    """

    def __init__(self, task: Task, split: str, rows: Dataset, processor: Processor) -> None:
        self._task, self._split, self._rows, self._processor = task, split, rows, processor

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compute the metrics under the prefix of this evaluation; they count for the best model, too."""
        metrics: dict[str, float] = kwargs["metrics"]
        measured = Measured(kwargs["model"], self._rows, self._processor, self._task, self._split)
        prefix = next((name.removesuffix("_runtime") for name in metrics if name.endswith("_runtime")), "eval")
        found = {
            f"{prefix}_{name}": value for name, value in evaluated(measured, args.eval_batch_size).metrics().items()
        }
        metrics.update(found)
        if state.log_history:
            # It was written before callbacks are asked.
            state.log_history[-1].update(found)


def training_metrics(task: Task) -> dict[str, Callable[..., Any]]:
    """The keyword arguments by which a `Trainer` computes a task's metrics in its evaluations.

    Empty where it cannot: see `TaskEvaluation`.
    """
    if not task.judged_in_training:
        return {}

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return task.training_metrics(prediction.predictions, prediction.label_ids)

    return {"compute_metrics": compute_metrics, "preprocess_logits_for_metrics": task.training_outputs}


def standard_error(before: Answers, after: Answers, metric: str) -> float | None:
    """Estimate the standard error of the change of a metric between two models, by a paired bootstrap.

    Args:
        before, after: Of two models on the same examples in the same order.
        metric: Of `Answers.metrics`.

    Returns:
        The standard deviation of the change over 200 samples of the examples, drawn with replacement and a fixed seed;
        None when the metric does not exist.
    """
    generator = np.random.default_rng(0)
    changes = []
    for _ in range(_RESAMPLES):
        drawn = generator.integers(len(before), size=len(before))
        old, new = (answers.at(drawn).metrics() for answers in (before, after))
        if metric in old and metric in new:
            changes.append(new[metric] - old[metric])
    return float(np.std(changes)) if changes else None
