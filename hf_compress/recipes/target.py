"""Chooses the fastest model of a recipe whose quality is near enough to that of the dense one, by measured speed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_compress.stages.option_files import reject_unknown


NAME = "target"
# Options of the report that measures the candidates.
_REPORT = ("split", "device", "latency_repeats", "latency_examples")
_KEYS = ("dense", "among", "max_drop", "metric", "batch_size", *_REPORT)


@dataclass(frozen=True)
class Target:
    """What is looked for.

    Args:
        dense: The stage or model that the others are compared with.
        among: The stages, mostly families, whose models are candidates.
        max_drop: How many points the chosen one may lose at most; a point is a hundredth of the metric.
        metric: The task's main metric; None: whichever that is.
        options: For the report that measures them.
    """

    dense: str
    among: tuple[str, ...]
    max_drop: float
    metric: str | None
    options: Mapping[str, Any]


def read_target(written: Any, where: str) -> Target:
    """Read the entry `target` of a recipe.

    Raises:
        ValueError: If a name is unknown or missing, or a value is out of range.
    """
    if not isinstance(written, dict):
        raise ValueError(f"{where}: target must be lines such as 'max_drop: 1.0', got {written!r}.")
    where = f"{where}, target"
    reject_unknown(written, _KEYS, where)
    among = written.get("among")
    among = [among] if isinstance(among, str) else among
    if not isinstance(among, list) or not among or not all(isinstance(name, str) for name in among):
        raise ValueError(f"{where}: among must name the stages to choose from, got {among!r}.")
    dense = written.get("dense")
    if not isinstance(dense, str):
        raise ValueError(f"{where}: dense must name the model to compare with, got {dense!r}.")
    drop = written.get("max_drop")
    if isinstance(drop, bool) or not isinstance(drop, int | float) or not 0 <= drop < math.inf:
        raise ValueError(f"{where}: max_drop must be a number of points, at least 0, got {drop!r}.")
    sizes = written.get("batch_size", [1])
    options = {"latency_batch_sizes": sizes if isinstance(sizes, list) else [sizes]}
    options |= {name: written[name] for name in _REPORT if name in written}
    return Target(dense, tuple(among), float(drop), written.get("metric"), {"models": [dense, *among], **options})


def chosen(report: Mapping[str, Any], max_drop: float) -> dict[str, Any]:
    """Choose from a report.

    Args:
        report: What `report.json` holds; its first model is the dense one.
        max_drop: How many points the chosen one may lose at most.

    Returns:
        `best`: the name of the fastest candidate that loses no more, or None; `front`: the names of those that no
        other beats in both; `models`: name, `drop` in points and `speedup` (the geometric mean over the sizes) of
        each candidate.
    """
    metric = report["metric"]
    dense, *others = report["models"]
    models = [
        {
            "name": model["name"],
            "drop": 100 * (dense["metrics"][metric] - model["metrics"][metric]),
            "speedup": _geometric_mean([timed["speedup"]["median"] for timed in model["latency"]]),
        }
        for model in others
    ]
    near = [model for model in models if model["drop"] <= max_drop]
    best = max(near, key=lambda model: model["speedup"], default=None)
    front = [model["name"] for model in models if not any(_beats(other, model) for other in models)]
    return {"metric": metric, "max_drop": max_drop, "best": best and best["name"], "front": front, "models": models}


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _beats(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    at_least = one["drop"] <= other["drop"] and one["speedup"] >= other["speedup"]
    return at_least and (one["drop"], one["speedup"]) != (other["drop"], other["speedup"])


def check_metric(target: Target, metric: str, lower_is_better: bool) -> None:
    """Raise `ValueError` for a metric that is not the task's main one, or is better when it is lower."""
    if target.metric not in (None, metric):
        raise ValueError(f"metric must be the task's main one, {metric}, got {target.metric!r}.")
    if lower_is_better:
        raise ValueError(f"target must be left out for {metric}, which is better when it is lower: it has no points.")


def verdict(found: Mapping[str, Any], sizes: Sequence[int]) -> list[str]:
    """A choice in words: each candidate, fastest first, then the verdict."""
    lines = []
    for model in sorted(found["models"], key=lambda model: -model["speedup"]):
        on_front = "  on the Pareto front" if model["name"] in found["front"] else ""
        lines.append(f"{model['name']:24s} {model['speedup']:5.2f}x  {-model['drop']:+6.2f} points{on_front}")
    at = f"at batch size {' and '.join(map(str, sizes))}"
    allowed = f"at most {found['max_drop']:g} points of {found['metric']}"
    if found["best"] is None:
        return [*lines, f"target: no model loses {allowed}; the models are kept"]
    return [*lines, f"target: {found['best']} is the fastest {at} that loses {allowed}"]
