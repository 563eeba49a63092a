"""Metrics of saved models on a task."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import evaluate as hub_metrics

from hf_compress.core.saving import write_json
from hf_compress.report.quality import evaluated
from hf_compress.stages.arguments import DeviceArguments, StageArguments
from hf_compress.stages.measured import common_device, folder_of, measured
from hf_compress.stages.models import task_for
from hf_compress.tasks.answers import Answers
from hf_compress.tasks.arguments import DataArguments, WindowArguments
from hf_compress.tasks.class_answers import ClassAnswers
from hf_compress.tasks.sources import load_task
from hf_compress.tasks.task import Task


logger = logging.getLogger(__name__)


@dataclass
class EvaluateArguments:
    """Which models are evaluated, on what.

    Args:
        models: Hub names or folders of the models to evaluate. A folder that was exported stands for its model.onnx;
            name the file to have another one, as in small_onnx/model_int8.onnx.
        split: Which split is measured: train, validation or test. Left out: validation, or test where there is none.
        eval_batch_size: How many sequences go through the model at once.
        extra_metrics: Further metrics: hub names or local scripts that `evaluate.load` opens.
        output_file: JSON file for the results. Left out: they are only printed.
    """

    models: list[str]
    split: str | None = None
    eval_batch_size: int = 32
    extra_metrics: list[str] | None = None
    output_file: str | None = None

    def __post_init__(self) -> None:
        if self.eval_batch_size < 1:
            raise ValueError(f"eval_batch_size must be at least 1, got {self.eval_batch_size}.")


@dataclass(frozen=True, kw_only=True)
class Evaluate(StageArguments):
    """What `evaluate` takes.

    Args:
        evaluation: Which models are measured and how.
        data: The task.
        windows: How the text of a language model is cut.
        device: Where the models run.
    """

    evaluation: EvaluateArguments
    data: DataArguments
    windows: WindowArguments = field(default_factory=WindowArguments)
    device: DeviceArguments = DeviceArguments()


def _extra(names: Sequence[str], answers: Answers) -> dict[str, float]:
    results: dict[str, float] = {}
    if not names:
        return results
    if not isinstance(answers, ClassAnswers):
        raise ValueError("extra_metrics compare classes or scores; leave them out for this kind of task.")
    for name in names:
        try:
            results.update(hub_metrics.load(name).compute(**answers.compared()))
        except (FileNotFoundError, ConnectionError, OSError) as error:
            raise ValueError(
                f"extra_metrics must be on the hub or local scripts, got {name!r} ({type(error).__name__})."
            ) from error
    return results


def opened_task(
    data: DataArguments, wanted: str | None, models: Sequence[str], windows: WindowArguments | None = None
) -> tuple[Task, str]:
    """The task, and the split that models are measured on; the first model decides the kind of task."""
    task = task_for(folder_of(models[0]), data) if models else load_task(data)
    task = task.windowed(windows or WindowArguments())
    split = task.measured_split(wanted)
    logger.info("Models are measured on the %s split.", split)
    return task, split


def evaluate(arguments: Evaluate) -> dict[str, dict[str, Any]]:
    """Measure saved models on a task.

    Returns:
        Model -> its metrics, the split and the number of examples that they were computed on, and for language models
        how the text was cut.

    Raises:
        ValueError: If a model or the split cannot be opened or does not fit.
    """
    wanted, data = arguments.evaluation, arguments.data
    device = common_device(wanted.models, arguments.device.device)
    task, split = opened_task(data, wanted.split, wanted.models, arguments.windows)
    if wanted.output_file:
        Path(wanted.output_file).parent.mkdir(parents=True, exist_ok=True)
        if Path(wanted.output_file).is_dir():
            raise ValueError(f"output_file must be a file, {wanted.output_file!r} is a folder.")
    results: dict[str, dict[str, Any]] = {}
    for name in wanted.models:
        model = measured(name, task, split, data.max_length, device)
        answers = evaluated(model, wanted.eval_batch_size)
        extra = _extra(wanted.extra_metrics or (), answers)
        results[name] = {**answers.metrics(), **extra, "split": split, "num_examples": len(answers)}
        results[name].update(task.protocol(model.rows))
        if task.positive_class is not None:
            results[name]["positive_class"] = task.positive_class
        if wanted.output_file:
            # What is known of the first models must not be lost with a later one.
            write_json(wanted.output_file, results)
    return results
