"""Dense against compressed models on one task: quality, size, arithmetic and measured time."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.card_sections import training_of
from hf_compress.core.cost import CountsItself
from hf_compress.core.exported import ExportedModel
from hf_compress.core.forward_state import carries_state
from hf_compress.core.loaded import require_complete
from hf_compress.core.saving import write_json
from hf_compress.folder_card import steps_with_settings
from hf_compress.methods import METHODS
from hf_compress.report.changes import changed_answers
from hf_compress.report.counting import cost_of, counted_layers, mean_length, shapes_of
from hf_compress.report.latency import batches_by_length, batches_of, measure_latency
from hf_compress.report.machine import environment
from hf_compress.report.markdown import render_markdown
from hf_compress.report.page import render_page
from hf_compress.report.plots import plot_layer_sizes, plot_quality_latency, plot_sparsity
from hf_compress.report.quality import Measured, evaluated, standard_error, task_of_rows
from hf_compress.report.samples import Beginnings
from hf_compress.report.sparsity import Matrix, has_zeros, matrices_of
from hf_compress.report.table import Entry, build_report, bytes_on_disk
from hf_compress.report.tokens import surviving_words
from hf_compress.tasks.answers import Answers
from hf_compress.tasks.inputs import length_sorted, row_lengths


logger = logging.getLogger(__name__)

# Recipes write it beside each model.
_LINEAGE = "lineage.json"
# Texts whose surviving words are shown.
_TEXTS = 5


def compare_models(
    models: Mapping[str, Measured | PreTrainedModel | ExportedModel | str | os.PathLike[str]],
    rows: Dataset | None,
    tokenizer: PreTrainedTokenizerBase | None,
    task_name: str,
    output_dir: str | os.PathLike[str],
    *,
    split: str | None = None,
    folders: Mapping[str, str] | None = None,
    batch_sizes: Sequence[int] = (1, 32),
    repeats: int = 7,
    warmup: int = 1,
    limit: int | None = 256,
    second_baseline: str | None = None,
    command: str | None = None,
    beginnings: Beginnings | None = None,
) -> dict[str, Any]:
    """Compare models and write `report.json`, `report.md`, `report.html` and plots.

    The plots are `accuracy_latency.png`, `layer_sizes.png` and, where weights have been pruned, `sparsity.png`; the
    page `report.html` is one file that draws its own and needs no network. Where a model drops tokens, the
    multiply-accumulates of all models are means over the rows; otherwise they are of one sequence of mean length.
    Where they cannot be counted, they are left blank. Table, page and JSON are written anew after each measurement, so
    that what is known survives a later failure.

    Args:
        models: Name -> classifier, exported or not, or folder of one that is not exported, or a `Measured` with a
            tokenizer and rows of its own; the first is the baseline.
        rows: Tokenized examples with `labels`, for models that have none of their own.
        tokenizer: Of these models.
        task_name: Decides which metric is shown.
        output_dir: Created when absent.
        split: Name of the split that the rows are from.
        folders: Name -> folder whose weight files are weighed, for models that were opened by the caller.
        batch_sizes: Timed, each in one interleaved run on the same texts.
        repeats: Timed rounds over the same batches.
        warmup: Rounds before that.
        limit: Examples that are timed, evenly spread over the lengths; the quality is always of all rows. None: all.
        second_baseline: Name of another model that the speed of all models is compared with, too.
        command: The command line that asked for the report; the page shows it.
        beginnings: What the models write on, if they are language models that can; None: nothing.

    Returns:
        What `report.json` holds.

    Raises:
        ValueError: If there are no models, no rows or no batch sizes, or models have not the same examples.
    """
    if not models:
        raise ValueError("models must hold at least one model, got none.")
    if not batch_sizes:
        raise ValueError("batch_sizes must hold at least one size, got none.")
    if second_baseline is not None and second_baseline not in list(models)[1:]:
        raise ValueError(f"second_baseline must be one of {list(models)[1:]}, got {second_baseline!r}.")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}.")
    opened, weighed = {}, dict(folders or {})
    for name, model in models.items():
        if isinstance(model, str | os.PathLike):
            weighed.setdefault(name, str(model))
            model, loaded = AutoModelForSequenceClassification.from_pretrained(model, output_loading_info=True)
            require_complete(loaded)
        if not isinstance(model, Measured):
            if rows is None or tokenizer is None:
                raise ValueError(f"rows and tokenizer must be given for {name!r}, which has none of its own.")
            original = cast(PreTrainedModel, model)
            model = Measured(original, rows, tokenizer, task_of_rows(original.config, task_name), "")
        opened[name] = model
    counts = {name: len(each.rows) for name, each in opened.items()}
    if not all(counts.values()):
        raise ValueError("rows must hold at least one example, got none.")
    if len(set(counts.values())) > 1:
        raise ValueError(f"rows must be the same examples for all models, got {counts}.")
    first = next(iter(opened.values()))
    # Two sizes above the number of rows would be the same measurement under two names.
    batch_sizes = list(dict.fromkeys(min(size, len(first.rows)) for size in batch_sizes))
    places = {size: batches_by_length(first.rows, size, limit) for size in batch_sizes}
    settings = {"repeats": repeats, "warmup": warmup, "limit": limit}
    metric, place, folder = first.task.main_metric, environment(), Path(output_dir)

    # An example may be several rows: both sentences of a pair, the windows of a long text.
    known = first.split in first.task.splits
    examples = first.task.num_examples(first.split) if known else len(first.rows)
    protocol = first.task.protocol(first.rows)
    examples = protocol.get("windows", examples)

    def write(entries: Sequence[Entry]) -> dict[str, Any]:
        report = build_report(
            entries, task_name, metric, examples, seq_len, settings, split, first.task.lower_is_better,
            second_baseline if second_baseline in [entry.name for entry in entries] else None, place,
        )  # fmt: skip
        report["command"], report["protocol"] = command, protocol
        write_json(folder / "report.json", report)
        (folder / "report.md").write_text(render_markdown(report), encoding="utf-8")
        (folder / "report.html").write_text(render_page(report), encoding="utf-8")
        return report

    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    seq_len = mean_length(first, shapes_of(first.model))
    for entry in _entries(opened, weighed, metric, beginnings):
        entries.append(entry)
        write(entries)
    for size in batch_sizes:
        logger.info("Timing %d models at batch size %d, %d rounds.", len(opened), size, repeats)
        batches = {name: batches_of(each.rows, each.processor, places[size]) for name, each in opened.items()}
        timed = measure_latency({name: each.model for name, each in opened.items()}, batches, repeats, warmup)
        entries = [dataclasses.replace(e, latencies=[*e.latencies, t]) for e, t in zip(entries, timed, strict=True)]
        report = write(entries)
    _plot(report, folder)
    return report


def _entries(
    models: Mapping[str, Measured], folders: Mapping[str, str], metric: str, beginnings: Beginnings | None
) -> Iterator[Entry]:
    """Measure each model, before anything is timed."""
    # What is dropped depends on the text; all of a table is counted alike.
    drops = any(carries_state(each.model) for each in models.values())
    baseline: Answers | None = None
    first = next(iter(models.values()))

    def text_of(example: int) -> str:
        if first.split in first.task.splits:
            return first.task.text_of(first.split, example)
        if isinstance(first.processor, PreTrainedTokenizerBase):
            return str(first.processor.decode(first.rows[example]["input_ids"], skip_special_tokens=True))
        return f"example {example}"

    for name, each in models.items():
        logger.info("Evaluating %s on %d examples.", name, len(each.rows))
        answers = evaluated(each)
        baseline = baseline or answers
        shapes = shapes_of(each.model)
        layers, seq_len = counted_layers(shapes, name), mean_length(each, shapes)
        counted = (
            list(length_sorted(each.rows, 32, each.processor))
            if drops and (layers or isinstance(shapes, CountsItself))
            else None
        )
        yield Entry(
            name=name,
            metrics=answers.metrics(),
            cost=cost_of(each.model, shapes, layers, seq_len, counted, row_lengths(each.rows)),
            latencies=[],
            folder=folders.get(name),
            disk_bytes=_weighed(each.model, folders.get(name)),
            heads=[layer.num_units for layer in layers],
            neurons=[layer.num_neurons for layer in layers],
            matrices=matrices_of(each.model),
            seq_len=seq_len,
            standard_error=None if answers is baseline else standard_error(baseline, answers, metric),
            changes=None if answers is baseline else changed_answers(baseline, answers, text_of),
            steps=[*_steps(shapes), *_training(_folder(each.model, folders.get(name))), *_exported(each.model)],
            classes=answers.by_class(),
            only_answer=_only_answer(answers),
            words=_words(each),
            lineage=_lineage(_folder(each.model, folders.get(name))),
            samples=_samples(each, beginnings),
        )


def _samples(each: Measured, beginnings: Beginnings | None) -> list[dict[str, str]]:
    """What a model writes; nothing where it cannot, as exported ones."""
    if beginnings is None or not each.model.can_generate() or not isinstance(each.processor, PreTrainedTokenizerBase):
        return []
    return beginnings.continued(each.model, each.processor)


def _only_answer(answers: Answers) -> dict[str, Any] | None:
    only, right = answers.only_answer(), answers.right()
    return None if only is None or right is None else {"answer": only, "right": float(right.mean())}


def _steps(model: PreTrainedModel) -> list[dict[str, Any]]:
    """The steps of the record, without the resulting sizes."""
    return [
        {"method": name, "settings": {key: settings[key] for key in settings if key in _inputs_of(name)}}
        for name, settings in steps_with_settings(model.config)
    ]


def _folder(model: PreTrainedModel | ExportedModel, named: str | None) -> str | None:
    return str(model.file.parent) if isinstance(model, ExportedModel) else named


def _training(folder: str | None) -> list[dict[str, Any]]:
    """The training by a teacher, as one more step."""
    found = training_of(folder) if folder is not None else None
    return [] if found is None else [{"method": found["trainer"], "settings": found["settings"]}]


def _weighed(model: PreTrainedModel | ExportedModel, folder: str | None) -> int | None:
    return model.num_bytes() if isinstance(model, ExportedModel) else bytes_on_disk(folder)


def _exported(model: PreTrainedModel | ExportedModel) -> list[dict[str, Any]]:
    """The export as one more step."""
    if not isinstance(model, ExportedModel):
        return []
    settings: dict[str, Any] = {"runtime": model.runtime, "weights": model.numbers}
    if model.numbers == "int8":
        settings["layers_in_float"] = len(model.facts.get("int8", {}).get("kept", ()))
    return [{"method": "export", "settings": settings}]


def _lineage(folder: str | None) -> list[dict[str, Any]]:
    """The jobs that a recipe has noted beside a model; none where no recipe made it."""
    file = Path(folder or "", _LINEAGE)
    if folder is None or not file.is_file():
        return []
    try:
        jobs = json.loads(file.read_text(encoding="utf-8"))
        return [{key: job[key] for key in ("name", "stage", "options", "seconds")} for job in jobs]
    except (ValueError, TypeError, LookupError) as error:
        # What was measured is worth more.
        logger.warning("%s cannot be read: %s", file, error)
        return []


def _words(each: Measured) -> list[dict[str, Any]]:
    if not isinstance(each.processor, PreTrainedTokenizerBase) or "input_ids" not in each.rows.column_names:
        return []
    return surviving_words(each.model, each.processor, each.rows.select(range(min(_TEXTS, len(each.rows)))))


def _inputs_of(method: str) -> set[str]:
    fields = dataclasses.fields(METHODS[method].config_class)
    return {field.name for field in fields if not field.metadata.get("output")}


def _plot(report: dict[str, Any], folder: Path) -> None:
    try:
        plot_quality_latency(report, folder / "accuracy_latency.png")
        if any(model["heads"] for model in report["models"]):
            plot_layer_sizes(report, folder / "layer_sizes.png")
        if any(has_zeros([Matrix(**matrix) for matrix in model["matrices"]]) for model in report["models"]):
            plot_sparsity(report, folder / "sparsity.png")
    except ImportError as error:
        # The measurements took minutes; a missing optional package must not lose them.
        logger.warning("No plots were drawn. %s", error)
