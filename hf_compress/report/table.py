"""The comparison of dense and compressed models as data and as Markdown."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_compress.core.cost import Cost
from hf_compress.report.latency import Latency, Speedup, speedups
from hf_compress.report.machine import describe, environment
from hf_compress.report.sparsity import Matrix, element_ratio, grid_of, has_zeros


REPORT_VERSION = 1
# A median below this is called "not faster": repeats of one and the same model differ by about as much.
_FASTER = 1.05
_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Entry:
    """What was found out about one model.

    Args:
        name: Its label in table and plots.
        metrics: Of the task.
        cost: Of one sequence of the report's length.
        latencies: One for each batch size.
        folder: Where it was opened, if anywhere.
        disk_bytes: Of its safetensors files; None when they are not in a local folder.
        heads, neurons: Kept in each layer.
        matrices: Zeros of each weight matrix.
        seq_len: Tokens of the sequence whose multiply-accumulates were counted; None: the report's.
        standard_error: Of the difference between its main metric and the baseline's, over the examples.
        changes: What `changed_answers` found; None for the baseline.
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


def bytes_on_disk(folder: str | os.PathLike | None) -> int | None:
    """The size of a folder's `*.safetensors`; None when it is no local folder or has none."""
    if folder is None:
        return None
    sizes = [file.stat().st_size for file in Path(folder).glob("*.safetensors")]
    return sum(sizes) if sizes else None


def verdict(batch_size: int, speedup: float, mac_ratio: float | None) -> str:
    """One plain sentence: what was measured beside what the arithmetic promises.

    Args:
        batch_size: Of the measurement.
        speedup: Measured, above 1 is faster than the baseline.
        mac_ratio: Multiply-accumulates kept, of the baseline's; None: not counted.

    Example:
        >>> verdict(32, 1.8, 0.5)
        'batch 32: 1.80x faster measured, 2.00x fewer MACs'
        >>> verdict(1, 0.98, 0.5)
        'NOT faster at batch 1: 0.98x measured, 2.00x fewer MACs'
    """
    if mac_ratio is None:
        promised = "MACs not counted"
    elif abs(mac_ratio - 1) < 0.005:
        promised = "the same MACs"
    else:
        promised = f"{1 / mac_ratio:.2f}x fewer MACs" if mac_ratio < 1 else f"{mac_ratio:.2f}x more MACs"
    if speedup < _FASTER:
        return f"NOT faster at batch {batch_size}: {speedup:.2f}x measured, {promised}"
    return f"batch {batch_size}: {speedup:.2f}x faster measured, {promised}"


def quality_verdict(metric: str, before: float, after: float, error: float | None = None) -> str:
    """One plain clause: what quality was lost or gained, and whether that is more than chance.

    Args:
        metric: Its name.
        before, after: Of the baseline and of the model.
        error: Standard error of the difference; None: not known.

    Example:
        >>> quality_verdict("accuracy", 0.77, 0.53, 0.02)
        'LOST 0.2400 accuracy (0.7700 -> 0.5300, standard error 0.0200)'
        >>> quality_verdict("accuracy", 0.92, 0.915, 0.01)
        'accuracy 0.9200 -> 0.9150 (a difference within two standard errors of 0.0100)'
    """
    change, numbers = after - before, f"{before:.4f} -> {after:.4f}"
    if change == 0:
        return f"the same {metric} ({after:.4f})"
    if error is not None and abs(change) <= 2 * error:
        return f"{metric} {numbers} (a difference within two standard errors of {error:.4f})"
    known = f", standard error {error:.4f}" if error is not None else ""
    return f"{'LOST' if change < 0 else 'gained'} {abs(change):.4f} {metric} ({numbers}{known})"


def _by_batch_size(entries: Sequence[Entry]) -> list[dict[str, Speedup]]:
    """For each batch size, the speed-ups of all models over the first."""
    sizes = [[latency.batch_size for latency in entry.latencies] for entry in entries]
    if any(own != sizes[0] for own in sizes):
        raise ValueError(f"entries must be timed at the same batch sizes, got {sizes}.")
    return [speedups(group, entries[0].name) for group in zip(*(e.latencies for e in entries), strict=True)]


def build_report(
    entries: Sequence[Entry],
    task: str,
    metric: str,
    num_examples: int,
    seq_len: float,
    settings: dict[str, Any] | None = None,
    split: str | None = None,
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

    Raises:
        ValueError: If there are no entries, names repeat, a model lacks the metric, or batch sizes differ.
    """
    if not entries:
        raise ValueError("entries must hold at least one model, got none.")
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names):
        raise ValueError(f"entries must have different names, got {names}.")
    for entry in entries:
        if metric not in entry.metrics:
            raise ValueError(f"metric must be one of {', '.join(entry.metrics)} for {entry.name!r}, got {metric!r}.")
    ratios = _by_batch_size(entries)
    baseline = entries[0]
    models = []
    for entry in entries:
        mac_ratio = _mac_ratio(entry.cost, baseline.cost)
        quality = quality_verdict(metric, baseline.metrics[metric], entry.metrics[metric], entry.standard_error)
        timed = [
            {**latency.to_dict(), "speedup": asdict(at_size[entry.name])}
            for latency, at_size in zip(entry.latencies, ratios, strict=True)
        ]
        facts = asdict(entry)
        del facts["latencies"]
        # Nobody is faster than itself; for the baseline there is nothing to judge. What was lost stands first.
        verdicts = [
            f"{quality}; {verdict(t['batch_size'], t['speedup']['median'], mac_ratio)}"
            for t in timed
            if entry is not baseline
        ]
        if entry is not baseline and not timed:
            verdicts = [quality]
        ratio = element_ratio(entry.matrices)
        models.append(
            {**facts, "element_sparsity": ratio, "mac_ratio": mac_ratio, "latency": timed, "verdicts": verdicts}
        )
    return {
        "version": REPORT_VERSION,
        "task": task,
        "split": split,
        "metric": metric,
        "num_examples": num_examples,
        "seq_len": seq_len,
        "baseline": baseline.name,
        "environment": environment(),
        "settings": settings or {},
        "models": models,
    }


def _mac_ratio(cost: Cost, baseline: Cost) -> float | None:
    if cost.macs is None or baseline.macs is None:
        return None
    return cost.macs / baseline.macs if baseline.macs else 1.0


def _or_blank(template: str, value: float | None) -> str:
    return "-" if value is None else template.format(value)


def _short(value: float | None) -> str:
    """Three digits and a unit: 12.3M."""
    if value is None:
        return "-"
    for size, unit in _UNITS:
        # The rounded number decides: 999.9 k reads 1.00 M.
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{unit}" if value < 99.95 * size else f"{value / size:.0f}{unit}"
    return f"{value:.0f}"


def _megabytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e6:.1f} MB"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown, padded to columns so that it can also be read in a terminal."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        aligned = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(aligned)} |"

    rule = "|".join(f"{'-' * (w + 2)}" if i == 0 else f"{'-' * (w + 1)}:" for i, w in enumerate(widths))
    return [line(header), f"|{rule}|", *map(line, rows)]


def render_markdown(report: dict[str, Any]) -> str:
    """The report for people: quality and size, speed, one verdict a batch size, and where it was measured."""
    metric, models = report["metric"], report["models"]
    quality = [
        [
            _cell(m["name"]), f"{m['metrics'][metric]:.4f}", _short(m["cost"]["params"]),
            _short(m["cost"]["nonzero_params"]), _short(m["cost"]["macs"]), _or_blank("{:.3f}", m["mac_ratio"]),
            _megabytes(m["disk_bytes"]),
        ]
        for m in models
    ]  # fmt: skip
    speed = [
        [
            _cell(m["name"]), str(t["batch_size"]), f"{1e3 * t['p50']:.2f}", f"{1e3 * t['p95']:.2f}",
            f"{t['throughput']:.1f}", _megabytes(t["peak_memory"]),
            _or_blank("{:.2f}x", m["mac_ratio"] and 1 / m["mac_ratio"]),
            f"{t['speedup']['median']:.2f}x ({t['speedup']['low']:.2f} to {t['speedup']['high']:.2f})",
        ]
        for place in range(len(models[0]["latency"]))
        for m in models
        for t in [m["latency"][place]]
    ]  # fmt: skip
    lines = [
        f"# {report['task']}: {report['baseline']} against compressed models",
        "",
        f"{report['num_examples']} examples{' of the ' + report['split'] + ' split' if report['split'] else ''}; "
        f"MACs of a sequence: {report['seq_len']:.1f} tokens on average.",
        "",
        *_table(["model", metric, "params", "non-zero", "MACs", "MACs kept", "on disk"], quality),
    ]
    if speed:
        header = ["model", "batch", "p50 ms", "p95 ms", "examples/s", "memory", "fewer MACs", "measured speed-up"]
        lines += ["", *_table(header, speed)]
    sentences = [f"- {m['name']}: {sentence}" for m in models for sentence in m["verdicts"]]
    if sentences:
        lines += ["", "## Verdict", "", *sentences]
    lines += [*_changes(models), *_zeros(models)]
    return "\n".join([*lines, "", "## How it was measured", "", *_measurement(report)]) + "\n"


def _changes(models: Sequence[dict[str, Any]]) -> list[str]:
    """How many answers each model changed, and examples that only the baseline answers rightly."""
    changed = [(_cell(m["name"]), m["changes"]) for m in models if m["changes"]]
    if not changed:
        return []
    keys = ("both_right", "lost", "gained", "both_wrong")
    counts = [[name, *(str(found[key]) for key in keys)] for name, found in changed]
    lines = ["", "## Answers that changed", "", *_table(["model", *(key.replace("_", " ") for key in keys)], counts)]
    examples = [
        [name, _cell(row["text"]), _cell(row["label"]), _cell(row["answer"])]
        for name, found in changed
        for row in found["examples"]
    ]
    if examples:
        header = ["model", "example that was lost", "right answer", "its answer"]
        lines += ["", *_table(header, examples)]
    return lines


def _zeros(models: Sequence[dict[str, Any]]) -> list[str]:
    """Sparsity of each layer's matrices, for the models that have zeros."""
    lines = []
    for model in models:
        matrices = [Matrix(**matrix) for matrix in model["matrices"]]
        if not has_zeros(matrices):
            continue
        if not lines:
            lines += [
                "",
                "## Zeros in weights",
                "",
                "Element-wise ratio: zeros over all linear and convolution weights.",
            ]
        layers, kinds, cells = grid_of(matrices)
        rows = [
            [str(layer), *("-" if cell is None else f"{cell:.4f}" for cell in row)]
            for layer, row in zip(layers, cells, strict=True)
        ]
        outside = [f"{m.kind} {m.zeros / max(m.weights, 1):.4f}" for m in matrices if m.layer is None]
        lines += ["", f"{model['name']}: element-wise ratio {model['element_sparsity']:.4f}"]
        lines[-1] += f" (outside the layers: {', '.join(outside)})" if outside else ""
        lines += ["", *_table(["layer", *kinds], rows)] if rows else []
    return lines


def _measurement(report: dict[str, Any]) -> list[str]:
    place, timed = report["environment"], [t for model in report["models"] for t in model["latency"]]
    lines = [
        f"- {describe(place)}",
        f"- Python {place['python']}, torch {place['torch']}, transformers {place['transformers']}",
    ]
    if timed:
        keys = ("threads", "dtype", "attention", "device")
        threads, dtype, attention, device = (", ".join(sorted({str(t[key]) for t in timed})) for key in keys)
        # Token pruning and linear attention register an attention of this name.
        attention = attention.replace("hf_compress", "hf_compress's own")
        lines += [
            f"- {threads} thread{'' if threads == '1' else 's'}, {dtype}, {attention} attention, on {device}",
            f"- Models took turns on the same length-sorted batches, {timed[0]['repeats']} rounds; "
            "p50 and p95 are a batch's; speed-up: median (range) of the ratios of rounds",
            f"- Memory: {timed[0]['memory_kind']}",
        ]
    return lines
