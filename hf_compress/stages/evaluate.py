"""Metrics of saved models on a task, and the comparison of dense against compressed ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import evaluate as hub_metrics

from hf_compress.core.saving import write_json
from hf_compress.report.comparison import compare_models
from hf_compress.report.quality import evaluate_model, predict
from hf_compress.stages.models import check_vocabulary, open_classifier, open_tokenizer
from hf_compress.tasks.inputs import tokenize
from hf_compress.tasks.metrics import task_metrics
from hf_compress.tasks.sources import DataArguments, load_task


@dataclass
class EvaluateArguments:
    """Which models are evaluated, on what.

    Args:
        models: Hub names or folders of the models to evaluate.
        split: Which split is evaluated: `train`, `validation` or `test`.
        eval_batch_size: How many examples a batch holds.
        extra_metrics: Further metrics, loaded by `evaluate.load`: hub names or local scripts.
        output_file: JSON file that receives the results. Left out: they are only printed.
    """

    models: list[str]
    split: str = "validation"
    eval_batch_size: int = 32
    extra_metrics: list[str] | None = None
    output_file: str | None = None

    def __post_init__(self) -> None:
        if self.eval_batch_size < 1:
            raise ValueError(f"eval_batch_size must be at least 1, got {self.eval_batch_size}.")


@dataclass
class ReportArguments:
    """Which models are compared and how.

    Args:
        models: Folders or hub names of the models to compare; the first is the dense baseline.
        output_dir: Folder that receives `report.md`, `report.json` and the plots.
        split: Which split is measured: `validation` or `test`.
        latency_batch_sizes: Batch sizes whose latency is timed.
        latency_repeats: How many rounds are timed; the models take turns in each.
        latency_examples: How many examples are timed, evenly spread over the lengths.
    """

    models: list[str]
    output_dir: str
    split: str = "validation"
    latency_batch_sizes: list[int] = field(default_factory=lambda: [1, 32])
    latency_repeats: int = 7
    latency_examples: int = 256


def _extra(names: Sequence[str], logits: Any, labels: Any) -> dict[str, float]:
    predictions = logits[:, 0] if logits.shape[-1] == 1 else logits.argmax(-1)
    results: dict[str, float] = {}
    for name in names:
        try:
            results.update(hub_metrics.load(name).compute(predictions=predictions, references=labels))
        except (FileNotFoundError, ConnectionError, OSError) as error:
            raise ValueError(
                f"extra_metrics must be on the hub or local scripts, got {name!r} ({type(error).__name__})."
            ) from error
    return results


def evaluate_models(args: EvaluateArguments, data: DataArguments) -> dict[str, dict[str, float]]:
    """The task's metrics for each model.

    Raises:
        ValueError: If a model or the split cannot be opened or does not fit.
    """
    task = load_task(data)
    split = task.split(args.split)
    results = {}
    for name in args.models:
        tokenizer = open_tokenizer(name)
        model = open_classifier(name, task)
        check_vocabulary(model.config, tokenizer)
        rows = tokenize(split, task, tokenizer, data.max_length)
        if args.extra_metrics:
            logits, labels = (
                predict(model, rows, tokenizer, args.eval_batch_size).numpy(),
                rows.with_format("numpy")["labels"][:],
            )
            results[name] = {**task_metrics(logits, labels), **_extra(args.extra_metrics, logits, labels)}
        else:
            results[name] = evaluate_model(model, rows, tokenizer, args.eval_batch_size)
    if args.output_file:
        write_json(args.output_file, results)
    return results


def report(args: ReportArguments, data: DataArguments) -> dict[str, Any]:
    """Compare a dense model with compressed ones and write table, JSON and plots.

    Raises:
        ValueError: If a model or the split cannot be opened or does not fit.
    """
    task = load_task(data)
    tokenizer = open_tokenizer(args.models[0])
    rows = tokenize(task.split(args.split), task, tokenizer, data.max_length)
    opened = {}
    for name in args.models:
        model = open_classifier(name, task)
        check_vocabulary(model.config, tokenizer)
        label = Path(name).name if Path(name).name not in opened else name
        opened[label] = (model, name)
    return compare_models(
        {label: model for label, (model, _) in opened.items()},
        rows,
        tokenizer,
        task.name,
        args.output_dir,
        folders={label: name for label, (_, name) in opened.items()},
        batch_sizes=args.latency_batch_sizes,
        repeats=args.latency_repeats,
        limit=args.latency_examples,
    )
