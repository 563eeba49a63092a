"""Metrics of saved models on a task, and the comparison of dense against compressed ones."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import evaluate as hub_metrics

from hf_compress.core.saving import require_own_folder, write_json
from hf_compress.report.comparison import compare_models
from hf_compress.report.quality import evaluated
from hf_compress.stages.models import measured
from hf_compress.tasks.answers import Answers
from hf_compress.tasks.sequence_classification import ClassAnswers
from hf_compress.tasks.sources import DataArguments, load_task
from hf_compress.tasks.task import Task


logger = logging.getLogger(__name__)


@dataclass
class EvaluateArguments:
    """Which models are evaluated, on what.

    Args:
        models: Hub names or folders of the models to evaluate.
        split: Which split is measured: train, validation or test. Left out: validation, or test where there is none.
        eval_batch_size: How many sequences go through the model at once.
        extra_metrics: Further metrics: hub names or local scripts that `evaluate.load` opens.
        output_file: JSON file for the results. Left out: they are only printed.
        device: Where it is computed: auto (the accelerator where there is one), cpu, or a device such as cuda.
    """

    models: list[str]
    split: str | None = None
    eval_batch_size: int = 32
    extra_metrics: list[str] | None = None
    output_file: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.eval_batch_size < 1:
            raise ValueError(f"eval_batch_size must be at least 1, got {self.eval_batch_size}.")


@dataclass
class ReportArguments:
    """Which models are compared and how.

    Args:
        models: Folders or hub names of the models to compare; the first is the dense baseline.
        output_dir: Folder that receives `report.md`, `report.json` and the plots.
        split: Which split is measured: train, validation or test. Left out: validation, or test where there is none.
        latency_batch_sizes: Batch sizes whose latency is timed.
        latency_repeats: How many rounds are timed; the models take turns in each.
        latency_examples: How many examples are timed, evenly spread over the lengths.
        device: Where it is computed: auto (the accelerator where there is one), cpu, or a device such as cuda.
    """

    models: list[str]
    output_dir: str
    split: str | None = None
    latency_batch_sizes: list[int] = field(default_factory=lambda: [1, 32])
    latency_repeats: int = 7
    latency_examples: int = 256
    device: str = "auto"


def _extra(names: Sequence[str], answers: Answers) -> dict[str, float]:
    results: dict[str, float] = {}
    if names and not isinstance(answers, ClassAnswers):
        raise ValueError("extra_metrics compare classes or scores; leave them out for this kind of task.")
    for name in names:
        try:
            results.update(hub_metrics.load(name).compute(**answers.compared()))
        except (FileNotFoundError, ConnectionError, OSError) as error:
            raise ValueError(
                f"extra_metrics must be on the hub or local scripts, got {name!r} ({type(error).__name__})."
            ) from error
    return results


def _opened(data: DataArguments, wanted: str | None) -> tuple[Task, str]:
    task = load_task(data)
    split = task.measured_split(wanted)
    logger.info("Models are measured on the %s split.", split)
    return task, split


def evaluate_models(args: EvaluateArguments, data: DataArguments) -> dict[str, dict[str, Any]]:
    """The task's metrics for each model, with the split and the number of examples that they were computed on.

    Raises:
        ValueError: If a model or the split cannot be opened or does not fit.
    """
    task, split = _opened(data, args.split)
    if args.output_file:
        Path(args.output_file).parent.mkdir(parents=True, exist_ok=True)
        if Path(args.output_file).is_dir():
            raise ValueError(f"output_file must be a file, {args.output_file!r} is a folder.")
    results: dict[str, dict[str, Any]] = {}
    for name in args.models:
        answers = evaluated(measured(name, task, split, data.max_length, args.device), args.eval_batch_size)
        extra = _extra(args.extra_metrics or (), answers)
        results[name] = {**answers.metrics(), **extra, "split": split, "num_examples": len(answers)}
        if args.output_file:
            # What is known of the first models must not be lost with a later one.
            write_json(args.output_file, results)
    return results


def report(args: ReportArguments, data: DataArguments) -> dict[str, Any]:
    """Compare a dense model with compressed ones and write table, JSON and plots.

    Raises:
        ValueError: If a model or the split cannot be opened or does not fit.
    """
    require_own_folder(args.output_dir, {f"the model {name}": name for name in args.models})
    task, split = _opened(data, args.split)
    models, folders = {}, {}
    for name in args.models:
        label = Path(name).name or name
        label = label if label not in models else name
        if label in models:
            raise ValueError(f"models must be different ones, got {name!r} twice.")
        models[label], folders[label] = measured(name, task, split, data.max_length, args.device), name
    return compare_models(
        models,
        None,
        None,
        task.name,
        args.output_dir,
        split=split,
        folders=folders,
        batch_sizes=args.latency_batch_sizes,
        repeats=args.latency_repeats,
        limit=args.latency_examples,
    )
