"""Dense against compressed models on one task: quality, size, arithmetic and measured time."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.core.architectures import blocks_of
from hf_compress.core.cost import count_cost
from hf_compress.core.layers import carries_state
from hf_compress.core.saving import write_json
from hf_compress.report.latency import Latency, measure_latency, unpadded_batches
from hf_compress.report.machine import environment
from hf_compress.report.plots import plot_layer_sizes, plot_quality_latency, plot_sparsity
from hf_compress.report.quality import evaluate_model
from hf_compress.report.sparsity import has_zeros, matrices_of
from hf_compress.report.table import Entry, build_report, bytes_on_disk, render_markdown
from hf_compress.tasks.inputs import length_sorted
from hf_compress.tasks.metrics import main_metric


logger = logging.getLogger(__name__)


def compare_models(
    models: Mapping[str, PreTrainedModel | str | os.PathLike],
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    task_name: str,
    output_dir: str | os.PathLike,
    *,
    folders: Mapping[str, str] | None = None,
    batch_sizes: Sequence[int] = (1, 32),
    repeats: int = 7,
    warmup: int = 1,
    limit: int | None = 256,
) -> dict[str, Any]:
    """Compare models and write `report.json`, `report.md`, `accuracy_latency.png` and `layer_sizes.png`.

    Where weights have been pruned, the report has their sparsity by layer, and `sparsity.png` shows it. Where a model
    drops tokens, the multiply-accumulates of all models are means over the rows; otherwise they are of one sequence
    of mean length.

    Args:
        models: Name -> classifier or folder of one; the first is the baseline.
        rows: Tokenized examples with `labels`.
        tokenizer: Of all the models.
        task_name: Decides which metric is shown.
        output_dir: Created when absent.
        folders: Name -> folder whose weight files are weighed, for models that were opened by the caller.
        batch_sizes: Timed, each in one interleaved run.
        repeats: Timed rounds over the same batches.
        warmup: Rounds before that.
        limit: Examples that are timed, evenly spread over the lengths; the quality is always of all rows. None: all.

    Returns:
        What `report.json` holds.

    Raises:
        ValueError: If there are no models, no rows or no batch sizes, or a model is not supported.
    """
    if not models:
        raise ValueError("models must hold at least one model, got none.")
    if not batch_sizes:
        raise ValueError("batch_sizes must hold at least one size, got none.")
    if not len(rows):
        raise ValueError("rows must hold at least one example, got none.")
    # Two sizes above the number of rows would be the same measurement under two names.
    batch_sizes = list(dict.fromkeys(min(size, len(rows)) for size in batch_sizes))
    place = environment()
    opened, weighed = {}, dict(folders or {})
    for name, model in models.items():
        if isinstance(model, str | os.PathLike):
            weighed.setdefault(name, str(model))
            model = AutoModelForSequenceClassification.from_pretrained(model)
        opened[name] = model
    timed = _latencies(opened, rows, tokenizer, batch_sizes, repeats, warmup, limit)
    seq_len = sum(len(ids) for ids in rows["input_ids"]) / len(rows)
    # What is dropped depends on the text; all of a table is counted alike.
    drops = any(carries_state(model) for model in opened.values())
    counted = list(length_sorted(rows, 32, tokenizer)) if drops else None
    entries = []
    for name, model in opened.items():
        logger.info("Evaluating %s on %d examples.", name, len(rows))
        entries.append(
            Entry(
                name=name,
                metrics=evaluate_model(model, rows, tokenizer),
                cost=count_cost(model, seq_len, data=counted),
                latencies=timed[name],
                folder=weighed.get(name),
                disk_bytes=bytes_on_disk(weighed.get(name)),
                heads=[block.num_units for block in blocks_of(model)],
                neurons=[block.num_neurons for block in blocks_of(model)],
                matrices=matrices_of(model),
            )
        )
    num_labels = next(iter(opened.values())).config.num_labels
    settings = {"repeats": repeats, "warmup": warmup, "limit": limit}
    report = build_report(entries, task_name, main_metric(task_name, num_labels), len(rows), seq_len, settings)
    report["environment"] = place
    _write(report, Path(output_dir), any(has_zeros(entry.matrices) for entry in entries))
    return report


def _latencies(
    models: Mapping[str, PreTrainedModel], rows: Dataset, tokenizer: PreTrainedTokenizerBase,
    batch_sizes: Sequence[int], repeats: int, warmup: int, limit: int | None,
) -> dict[str, list[Latency]]:  # fmt: skip
    timed: dict[str, list[Latency]] = {name: [] for name in models}
    for size in batch_sizes:
        logger.info("Timing %d models at batch size %d, %d rounds.", len(models), size, repeats)
        batches = unpadded_batches(rows, tokenizer, size, limit)
        for latency in measure_latency(models, batches, repeats, warmup):
            timed[latency.name].append(latency)
    return timed


def _write(report: dict[str, Any], folder: Path, with_zeros: bool) -> None:
    write_json(folder / "report.json", report)
    (folder / "report.md").write_text(render_markdown(report))
    try:
        plot_quality_latency(report, folder / "accuracy_latency.png")
        plot_layer_sizes(report, folder / "layer_sizes.png")
        if with_zeros:
            plot_sparsity(report, folder / "sparsity.png")
    except ImportError as error:
        # The numbers are what took minutes; they must not be lost for want of an optional package.
        logger.warning("No plots were drawn. %s", error)
