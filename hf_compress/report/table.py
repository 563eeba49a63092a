"""The comparison of dense and compressed models as data."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_compress.core.cost import Cost
from hf_compress.report.latency import Latency, Speedup, speedups
from hf_compress.report.machine import describe, environment
from hf_compress.report.sparsity import Matrix, element_ratio
from hf_compress.report.verdicts import only_answer_verdict, quality_verdict, second_verdict, verdict


REPORT_VERSION = 1


@dataclass(frozen=True)
class Entry:
    """The measurements of one model.

    Args:
        name: Its label in table and plots.
        metrics: Of the task.
        cost: Of one sequence of the report's length.
        latencies: One for each batch size.
        folder: Where it was opened, if anywhere.
        disk_bytes: Of its safetensors files, or of its exported file; None when they are not in a local folder.
        heads, neurons: Kept in each layer.
        matrices: Zeros of each weight matrix.
        seq_len: Tokens of the sequence whose multiply-accumulates were counted; None: the report's.
        standard_error: Of the difference between its main metric and the baseline's, over the examples.
        changes: What `changed_answers` found; None for the baseline.
        steps: What its record says was done to it: `method` and its telling `settings`; then, where its folder tells
            of them, its training by a teacher and its export.
        classes: Precision, recall and F1 of each class, as `Answers.by_class` gives them; None: no classes.
        lineage: The jobs of the recipe that made it, the first one first: `name`, `stage`, `options` and `seconds`.
        only_answer: The class that it answers to every example: `answer`, and the fraction of examples for which that
            is `right`; None where answers differ, or are no classes.
        samples: What it wrote: `prompt` and `continuation`; only of language models.
        words: For some texts `tokens` and, for each of them, how many layers it leaves (`layers`), and of how many.
    """

    name: str
    metrics: dict[str, float]
    cost: Cost
    latencies: list[Latency]
    folder: str | None = None
    disk_bytes: int | None = None
    heads: list[int] = field(default_factory=list)
    neurons: list[int] = field(default_factory=list)
    matrices: list[Matrix] = field(default_factory=list)
    seq_len: float | None = None
    standard_error: float | None = None
    changes: dict[str, Any] | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    classes: list[dict[str, Any]] | None = None
    only_answer: dict[str, Any] | None = None
    words: list[dict[str, Any]] = field(default_factory=list)
    lineage: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)


def bytes_on_disk(folder: str | os.PathLike[str] | None) -> int | None:
    """The size of a folder's `*.safetensors`; None when it is no local folder or has none."""
    if folder is None:
        return None
    sizes = [file.stat().st_size for file in Path(folder).glob("*.safetensors")]
    return sum(sizes) if sizes else None


def _by_batch_size(entries: Sequence[Entry], baseline: str) -> list[dict[str, Speedup]]:
    """For each batch size, the speed-ups of all models over the one named `baseline`."""
    sizes = [[latency.batch_size for latency in entry.latencies] for entry in entries]
    if any(own != sizes[0] for own in sizes):
        raise ValueError(f"entries must be timed at the same batch sizes, got {sizes}.")
    return [speedups(group, baseline) for group in zip(*(e.latencies for e in entries), strict=True)]


def build_report(
    entries: Sequence[Entry],
    task: str,
    metric: str,
    num_examples: int,
    seq_len: float,
    settings: dict[str, Any] | None = None,
    split: str | None = None,
    lower_is_better: bool = False,
    second_baseline: str | None = None,
    place: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Put models side by side; everything in the result is plain JSON.

    Args:
        entries: The first is the baseline.
        task: Its name.
        metric: The entry of `metrics` that is shown.
        num_examples: That the metrics were computed on.
        seq_len: Tokens of the sequence whose MACs are counted.
        settings: Further facts to write down.
        split: That the metrics were computed on.
        lower_is_better: Whether a lower value of the metric is the better one.
        second_baseline: Name of another entry that the speed of all models is compared with, too, such as the dense
            model in the runtime that the compressed ones shall run in.
        place: The `environment()` when the measurements began; None: as it is now.

    Raises:
        ValueError: If there are no entries, names repeat, a model lacks the metric, batch sizes differ, or the second
            baseline is none of the other models.
    """
    if not entries:
        raise ValueError("entries must hold at least one model, got none.")
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names):
        raise ValueError(f"entries must have different names, got {names}.")
    for entry in entries:
        if metric not in entry.metrics:
            raise ValueError(f"metric must be one of {', '.join(entry.metrics)} for {entry.name!r}, got {metric!r}.")
    baseline, place = entries[0], place or environment()
    if second_baseline is not None and second_baseline not in names[1:]:
        raise ValueError(f"second_baseline must be one of {names[1:]}, got {second_baseline!r}.")
    ratios = _by_batch_size(entries, baseline.name)
    seconds = _by_batch_size(entries, second_baseline) if second_baseline is not None else None
    models = []
    for entry in entries:
        mac_ratio = _mac_ratio(entry.cost, baseline.cost)
        quality = quality_verdict(
            metric, baseline.metrics[metric], entry.metrics[metric], entry.standard_error, lower_is_better
        )
        same = only_answer_verdict(baseline.name, baseline.only_answer, entry.only_answer, entry is baseline)
        if same:
            # Where both are constant, their metrics only count classes.
            quality = f"{same}; {quality}" if None in (baseline.only_answer, entry.only_answer) else same
        timed = [
            {**latency.to_dict(), "speedup": asdict(at_size[entry.name])}
            for latency, at_size in zip(entry.latencies, ratios, strict=True)
        ]
        for size, at_size in enumerate(seconds or ()):
            timed[size]["speedup_over_second"] = asdict(at_size[entry.name])
        facts = asdict(entry)
        del facts["latencies"]
        # The baseline is not compared with itself. The change of quality comes first.
        verdicts = [
            f"{quality}; {verdict(t['batch_size'], t['speedup']['median'], mac_ratio, t['speedup']['low'])}"
            for t in timed
            if entry is not baseline
        ]
        if entry is not baseline and not timed:
            verdicts = [quality]
        if entry is baseline and same:
            verdicts = [same]
        verdicts += [
            second_verdict(t["batch_size"], over["median"], second_baseline, over["low"])
            for t in timed
            if second_baseline is not None and entry.name not in (baseline.name, second_baseline)
            for over in [t["speedup_over_second"]]
        ]
        ratio = element_ratio(entry.matrices)
        models.append(
            {
                **facts,
                "element_sparsity": ratio,
                "mac_ratio": mac_ratio,
                "quality_change": entry.metrics[metric] - baseline.metrics[metric],
                "latency": timed,
                "verdicts": verdicts,
            }
        )
    return {
        "version": REPORT_VERSION,
        "task": task,
        "split": split,
        "metric": metric,
        "num_examples": num_examples,
        "seq_len": seq_len,
        "baseline": baseline.name,
        "second_baseline": second_baseline,
        "lower_is_better": lower_is_better,
        "environment": place,
        "hardware": describe(place),
        "settings": settings or {},
        "models": models,
    }


def _mac_ratio(cost: Cost, baseline: Cost) -> float | None:
    if cost.macs is None or baseline.macs is None:
        return None
    return cost.macs / baseline.macs if baseline.macs else 1.0
