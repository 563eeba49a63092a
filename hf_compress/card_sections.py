"""Sections of a model card: what a report measured, the papers to cite, and what to keep in mind.

The measurements are those of a `report.json`; this module reads it as plain data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_compress.core.errors import one_line


REPORT_FILE = "report.json"
# Trainer -> title and arXiv number of its paper.
_TRAINERS = {
    "DistillationTrainer": ("Distilling the Knowledge in a Neural Network", "1503.02531"),
    "ProximalTrainer": ("Follow Your Path: a Progressive Method for Knowledge Distillation", "2107.09305"),
}


def read_report(place: str | Path) -> dict[str, Any]:
    """Read the `report.json` at a place, which is the file or its folder.

    Raises:
        ValueError: If there is none, or it is no report.
    """
    file = Path(place) / REPORT_FILE if Path(place).is_dir() else Path(place)
    with one_line(f"report {str(file)!r} cannot be read", OSError, ValueError):
        found = json.loads(file.read_text(encoding="utf-8"))
    wanted = {"models", "baseline", "metric", "hardware"}
    if not isinstance(found, dict) or not wanted <= found.keys():
        raise ValueError(f"report {str(file)!r} must be a report.json of hf-compress report, got other content.")
    return found


def entry_of(report: Mapping[str, Any], folder: str | Path) -> dict[str, Any]:
    """The entry of the model in a folder: the one that was opened there, or else the one of the folder's name.

    Raises:
        ValueError: If the report measured no such model; lists those that it measured.
    """
    models: Sequence[dict[str, Any]] = report["models"]
    target = Path(folder).resolve()
    for model in models:
        if model["folder"] is not None and Path(model["folder"]).resolve() == target:
            return model
    for model in models:
        if model["name"] == target.name:
            return model
    names = ", ".join(repr(model["name"]) for model in models)
    raise ValueError(f"report must hold the model of {str(folder)!r}, got those named {names}: measure this one.")


def training_of(folder: str | Path) -> dict[str, Any] | None:
    """The `trainer` and `settings` of a training by a teacher, of which a folder's `results.json` tells; else None."""
    try:
        found = json.loads(Path(folder, "results.json").read_text(encoding="utf-8"))["training"]
        return {"trainer": str(found["trainer"]), "settings": dict(found["settings"])}
    except (OSError, ValueError, TypeError, LookupError):
        # Other programs write files of this name, too.
        return None


def training_section(training: Mapping[str, Any] | None) -> str:
    """Name the teacher that trained a model, the weights of the losses and the paper; empty without a teacher."""
    if training is None:
        return ""
    title, identifier = _TRAINERS.get(training["trainer"], ("", ""))
    paper = f" ([{title}](https://arxiv.org/abs/{identifier}))" if title else ""
    shown = ", ".join(f"`{name}={value}`" for name, value in training["settings"].items())
    return f"## How it was trained\n\nBy a teacher, with `{training['trainer']}`{paper}: {shown}"


def measured_section(report: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Describe what a report measured of one model beside its baseline, and on which hardware.

    Args:
        report: Of `report.json`.
        own: One of its models.
    """
    base = next(model for model in report["models"] if model["name"] == report["baseline"])
    columns = [own] if own["name"] == base["name"] else [base, own]
    names = [f"`{model['name']}`" if model is not own else "this model" for model in columns]
    metric = report["metric"]
    where = f" ({report['split']} split, {report['num_examples']} examples)" if report["split"] else ""
    rows = [
        [f"{metric.replace('_', ' ')} of {report['task']}{where}", *(f"{m['metrics'][metric]:.4f}" for m in columns)],
        ["parameters", *(f"{m['cost']['params']:,}" for m in columns)],
        ["multiply-accumulates of a sequence", *(_number("{:.3g}", m["cost"]["macs"]) for m in columns)],
        ["MB on disk", *(_number("{:.1f}", m["disk_bytes"] and m["disk_bytes"] / 1e6) for m in columns)],
    ]
    for place, timed in enumerate(own["latency"]):
        batch = timed["batch_size"]
        rows.append([f"p50 at batch {batch}, ms", *(f"{1e3 * m['latency'][place]['p50']:.2f}" for m in columns)])
        speedup = [m["latency"][place]["speedup"] for m in columns]
        rows.append([f"speed-up at batch {batch}", *(f"{s['median']:.2f}x" for s in speedup)])
    lines = [
        "| | " + " | ".join(names) + " |",
        "|---|" + "---:|" * len(names),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    told = [f"- {sentence}" for sentence in own["verdicts"]]
    timed = own["latency"][0] if own["latency"] else None
    how = f"; {timed['threads']} threads, {timed['dtype']}, on {timed['device']}" if timed else ""
    return "\n".join(["## What was measured", "", *lines, "", *told, "", f"Hardware: {report['hardware']}{how}."])


def _number(template: str, value: float | None) -> str:
    return "-" if value is None else template.format(value)


def citation_section(papers: Sequence[str]) -> str:
    """Papers in BibTeX, each once; empty where there are none."""
    return "\n".join(["## Papers", "", "```bibtex", *dict.fromkeys(papers), "```"]) if papers else ""


def limits_section(report: Mapping[str, Any] | None, own: Mapping[str, Any] | None) -> str:
    """What a reader must not expect of a compressed model, which a report measured or not."""
    lines = [
        "- It opens only where the package hf_compress is installed and imported.",
        "- What its base model cannot do or is biased in, it cannot do and is biased in, too; compression may have "
        "added to it, and most where examples are rare.",
    ]
    if report is None or own is None:
        lines.append(
            "- This card holds no measurements, as no report lay beside the model when it was saved: what "
            "`hf-compress report` measured of its quality and speed stands in the report's own folder."
        )
    else:
        lines.append("- Times are of the hardware above; other processors and runtimes have other ones.")
        lines += _lost_class(report, own)
    return "\n".join(["## Limits", "", *lines])


def _lost_class(report: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """The class whose recall fell most, if any did."""
    base = next(model for model in report["models"] if model["name"] == report["baseline"])
    pairs = zip(base.get("classes") or (), own.get("classes") or (), strict=False)
    fallen = [(before, after) for before, after in pairs if after["recall"] < before["recall"]]
    if not fallen:
        return []
    before, after = min(fallen, key=lambda pair: pair[1]["recall"] - pair[0]["recall"])
    return [
        f"- Recall fell most for the class {before['name']!r}: {before['recall']:.4f} -> {after['recall']:.4f} "
        f"({before['examples']} examples)."
    ]
