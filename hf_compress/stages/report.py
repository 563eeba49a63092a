"""Compare a dense model with compressed ones on a task."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hf_compress.report.comparison import compare_models
from hf_compress.report.quality import Measured
from hf_compress.report.samples import Beginnings, places_of
from hf_compress.stages.arguments import DeviceArguments, OutputArguments, StageArguments
from hf_compress.stages.evaluate import opened_task
from hf_compress.stages.measured import common_device, label_of, measured
from hf_compress.tasks.arguments import DataArguments, WindowArguments
from hf_compress.tasks.language_modeling import LanguageModeling


@dataclass
class ReportArguments:
    """Which models are compared and how.

    Args:
        models: Hub names or folders of the models to compare; the first is the dense baseline. A folder that was
            exported stands for its model.onnx; name the file to have another one, as in small_onnx/model_int8.onnx.
        second_baseline: One of the models, not the first, that the speed of all models is compared with, too; for
            exported models the dense one in the same runtime.
        split: Which split is measured: train, validation or test. Left out: validation, or test where there is none.
        latency_batch_sizes: Batch sizes whose latency is timed.
        latency_repeats: How many rounds are timed; the models take turns in each.
        latency_examples: How many examples are timed, evenly spread over the lengths.
        sample_prompts: Beginnings that every language model writes on, for the report. Left out: three places of the
            measured text.
        sample_tokens: How many tokens they write on each, always the likeliest; 0: none.
    """

    models: list[str]
    second_baseline: str | None = None
    split: str | None = None
    latency_batch_sizes: list[int] = field(default_factory=lambda: [1, 32])
    latency_repeats: int = 7
    latency_examples: int = 256
    sample_prompts: list[str] | None = None
    sample_tokens: int = 32

    def __post_init__(self) -> None:
        if self.sample_tokens < 0:
            raise ValueError(f"sample_tokens must be at least 0, got {self.sample_tokens}.")
        if self.sample_prompts is not None:
            Beginnings(tuple(self.sample_prompts), self.sample_tokens)


@dataclass(frozen=True, kw_only=True)
class Report(StageArguments):
    """What `report` takes.

    Args:
        comparison: Which models are compared and how.
        data: The task.
        windows: How the text of a language model is cut.
        output: Where table, JSON and plots go.
        device: Where the models run.
    """

    comparison: ReportArguments
    data: DataArguments
    windows: WindowArguments = field(default_factory=WindowArguments)
    output: OutputArguments
    device: DeviceArguments = DeviceArguments()


def report(arguments: Report) -> dict[str, Any]:
    """Compare a dense model with compressed ones and write `report.html`, `report.md`, `report.json` and plots.

    Returns:
        What `report.json` holds.

    Raises:
        ValueError: If a model or the split cannot be opened or does not fit.
    """
    wanted, second = arguments.comparison, arguments.comparison.second_baseline
    if second is not None and second not in wanted.models[1:]:
        raise ValueError(f"second_baseline must be one of the models after the first, got {second!r}.")
    device = common_device(wanted.models, arguments.device.device)
    task, split = opened_task(arguments.data, wanted.split, wanted.models, arguments.windows)
    models, folders = {}, {}
    for name in wanted.models:
        label = label_of(name)
        label = label if label not in models else name
        if label in models:
            raise ValueError(f"models must be different ones, got {name!r} twice.")
        models[label] = measured(name, task, split, arguments.data.max_length, device)
        folders[label] = name
    return compare_models(
        models,
        None,
        None,
        task.name,
        arguments.output.output_dir,
        split=split,
        folders=folders,
        batch_sizes=wanted.latency_batch_sizes,
        repeats=wanted.latency_repeats,
        limit=wanted.latency_examples,
        second_baseline=next((label for label, name in folders.items() if name == second), None),
        command=arguments.command_line(),
        beginnings=_beginnings(arguments, next(iter(models.values()))),
    )


def _beginnings(arguments: Report, first: Measured) -> Beginnings | None:
    """What language models write on; None for other models, or where nothing is wanted."""
    wanted, chosen = arguments.comparison, arguments.chosen()
    if not isinstance(first.task, LanguageModeling):
        for name in ("sample_prompts", "sample_tokens"):
            if name in chosen:
                raise ValueError(f"{name} must be left out for {first.task.kind}: only language models write texts.")
        return None
    if not wanted.sample_tokens:
        return None
    prompts = places_of(first) if wanted.sample_prompts is None else tuple(wanted.sample_prompts)
    return Beginnings(prompts, wanted.sample_tokens)
