"""A report as Markdown, for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from hf_compress.report.sparsity import Matrix, grid_of, has_zeros


_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def _or_blank(template: str, value: float | None) -> str:
    return "-" if value is None else template.format(value)


def short(value: float | None) -> str:
    """Three digits and a unit: 12.3M."""
    if value is None:
        return "-"
    for size, unit in _UNITS:
        # The rounded number decides: 999.9 k reads 1.00 M.
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{unit}" if value < 99.95 * size else f"{value / size:.0f}{unit}"
    return f"{value:.0f}"


def megabytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e6:.1f} MB"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], others: str = "right") -> list[str]:
    """Markdown that can also be read in a terminal; the first column is text, the others are numbers by default."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    aligned = ["left", *[others] * (len(header) - 1)]
    table: str = tabulate(cells, header, tablefmt="pipe", colalign=aligned, disable_numparse=True)
    return table.splitlines()


def render_markdown(report: dict[str, Any]) -> str:
    """The report for people: quality and size, speed, one verdict a batch size, and where it was measured."""
    metric, models = report["metric"], report["models"]
    quality = [
        [
            m["name"], f"{m['metrics'][metric]:.4f}", short(m["cost"]["params"]),
            short(m["cost"]["nonzero_params"]), short(m["cost"]["macs"]), _or_blank("{:.3f}", m["mac_ratio"]),
            megabytes(m["disk_bytes"]),
        ]
        for m in models
    ]  # fmt: skip
    speed = [
        [
            m["name"], str(t["batch_size"]), f"{1e3 * t['p50']:.2f}", f"{1e3 * t['p95']:.2f}",
            f"{t['throughput']:.1f}", megabytes(t["peak_memory"]),
            _or_blank("{:.2f}x", m["mac_ratio"] and 1 / m["mac_ratio"]),
            *(_span(t[which]) for which in ("speedup", "speedup_over_second") if which in t),
        ]
        for place in range(len(models[0]["latency"]))
        for m in models
        for t in [m["latency"][place]]
    ]  # fmt: skip
    noun = "windows" if report.get("protocol") else "examples"
    lines = [
        f"# {report['task']}: {report['baseline']} against compressed models",
        "",
        f"{report['num_examples']} {noun}{' of the ' + report['split'] + ' split' if report['split'] else ''}; "
        f"MACs of a sequence: {report['seq_len']:.1f} tokens on average.",
        "",
        *_table(["model", metric, "params", "non-zero", "MACs", "MACs kept", "on disk"], quality),
    ]
    if speed:
        header = ["model", "batch", "p50 ms", "p95 ms", "examples/s", "memory", "fewer MACs", "measured speed-up"]
        second = report.get("second_baseline")
        lines += ["", *_table(header + ([f"over {second}"] if second else []), speed)]
    done = [f"- {m['name']}: {'; '.join(map(_step, m['steps']))}" for m in models if m["steps"]]
    if done:
        lines += ["", "## What was done", "", *done]
    sentences = [f"- {m['name']}: {sentence}" for m in models for sentence in m["verdicts"]]
    if sentences:
        lines += ["", "## Verdict", "", *sentences]
    lines += [*_changes(models), *_samples(models), *_zeros(models)]
    return "\n".join([*lines, "", "## How it was measured", "", *_measurement(report)]) + "\n"


def _span(speedup: dict[str, float]) -> str:
    return f"{speedup['median']:.2f}x ({speedup['low']:.2f} to {speedup['high']:.2f})"


def _step(step: dict[str, Any]) -> str:
    """A step of a model's record: the method and the settings that describe it."""
    settings = (f"{name}={setting(value)}" for name, value in step["settings"].items())
    return f"{step['method']} ({', '.join(settings)})" if step["settings"] else str(step["method"])


def setting(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _changes(models: Sequence[dict[str, Any]]) -> list[str]:
    """How many answers each model changed, and examples that only the baseline answers rightly."""
    changed = [(m["name"], m["changes"]) for m in models if m["changes"]]
    if not changed:
        return []
    keys = ("both_right", "lost", "gained", "both_wrong")
    counts = [[name, *(str(found[key]) for key in keys)] for name, found in changed]
    lines = ["", "## Answers that changed", "", *_table(["model", *(key.replace("_", " ") for key in keys)], counts)]
    examples = [
        [name, row["text"], row["label"], row["answer"]] for name, found in changed for row in found["examples"]
    ]
    if examples:
        header = ["model", "example that was lost", "right answer", "its answer"]
        lines += ["", *_table(header, examples)]
    return lines


def _samples(models: Sequence[dict[str, Any]]) -> list[str]:
    """What each model writes, below the beginning that it is given."""
    first: list[dict[str, str]] = next((m["samples"] for m in models if m.get("samples")), [])
    lines = ["", "## What the models write", ""] if first else []
    for place, sample in enumerate(first):
        rows = [[m["name"], _in_line(m["samples"][place]["continuation"])] for m in models if m.get("samples")]
        lines += [f"{_in_line(sample['prompt'])} ...", "", *_table(["model", "writes on"], rows, "left"), ""]
    return lines[:-1]


def _in_line(text: str) -> str:
    return " ".join(text.split()) or "(nothing)"


def _zeros(models: Sequence[dict[str, Any]]) -> list[str]:
    """Sparsity of each layer's matrices, for the models that have zeros."""
    lines: list[str] = []
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


def windows_line(protocol: dict[str, Any]) -> str:
    """How a text was cut where perplexity was measured, in words."""
    stride = f", each {protocol['stride']} behind the one before it" if "stride" in protocol else ""
    alone = ", no token added to any" if protocol.get("tokens_added_per_window") == 0 else ""
    size = "" if stride else "at most "
    return (
        f"Windows of {size}{protocol['context']} tokens{stride}{alone}: {protocol['windows']}, in which "
        f"{protocol['predicted_tokens']} tokens are predicted"
    )


def _measurement(report: dict[str, Any]) -> list[str]:
    place, timed = report["environment"], [t for model in report["models"] for t in model["latency"]]
    lines = [
        f"- {report['hardware']}",
        f"- Python {place['python']}, torch {place['torch']}, transformers {place['transformers']}",
    ]
    if report.get("protocol"):
        lines.append(f"- {windows_line(report['protocol'])}")
    if timed:
        keys = ("threads", "runtime", "dtype", "attention", "device")
        threads, runtime, dtype, attention, device = (", ".join(sorted({str(t[key]) for t in timed})) for key in keys)
        # Token pruning and linear attention register an attention of this name.
        attention = attention.replace("hf_compress", "hf_compress's own")
        where = device if runtime == "PyTorch" else f"{device}, in {runtime}"
        lines += [
            f"- {threads} thread{'' if threads == '1' else 's'}, {dtype}, {attention} attention, on {where}",
            f"- Models took turns on the same length-sorted batches, {timed[0]['repeats']} rounds; "
            "p50 and p95 are a batch's; speed-up: median (range) of the ratios of rounds",
            f"- Memory: {timed[0]['memory_kind']}",
        ]
    return lines
