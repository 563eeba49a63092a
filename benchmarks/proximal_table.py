"""The table of `proximal.py`: means over seeds with their standard errors, and paired differences to distillation."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from typing import Any


Cell = dict[str, Any]
# What tells cells of one row of the table apart.
_WITHIN_A_ROW = ("task", "seed", "learning_rate", "rows")
_BASELINE = "distillation"


def rows_of(cells: Iterable[Cell]) -> dict[tuple[str, str], list[Cell]]:
    """(settings, student and method) -> cells, at the rate that did best on held-out rows with the first seed."""
    groups: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        key = {name: value for name, value in cell["key"].items() if name not in _WITHIN_A_ROW}
        student, method = key.pop("student"), key.pop("method")
        if "proximal_weight" in key:
            method = f"{method} {key.pop('proximal_weight'):g}"
        common = {name: key.pop(name) for name in ("teacher", "epochs", "max_steps", "batch_size")}
        if method != "proximal":
            # The rate of a fixed teacher stands in the teacher's own row.
            key.pop("teacher_learning_rate", None)
        extra = " ".join(f"{name}={value}" for name, value in key.items())
        name = f"{method} {extra}".strip()
        groups[json.dumps(common), f"{student}: {name}"].append(cell)
    return {place: _at_best_rate(found) for place, found in groups.items()}


def _at_best_rate(cells: list[Cell]) -> list[Cell]:
    first = min(cell["key"]["seed"] for cell in cells)
    scores: dict[float, list[float]] = defaultdict(list)
    for cell in cells:
        if cell["key"]["seed"] == first:
            scores[cell["key"]["learning_rate"]].append(cell["heldout"]["accuracy"])
    # A rate that was tried on fewer tasks than another was not a candidate.
    most = max(len(found) for found in scores.values())
    means = {rate: statistics.mean(found) for rate, found in scores.items() if len(found) == most}
    best = max(means, key=lambda rate: (means[rate], -rate))
    return [cell for cell in cells if cell["key"]["learning_rate"] == best]


def _shown(values: list[float]) -> str:
    """Mean and standard error, in points."""
    text = f"{100 * statistics.mean(values):.2f}"
    if len(values) > 1:
        text += f" +- {100 * statistics.stdev(values) / math.sqrt(len(values)):.2f}"
    return text


def _by_seed(cells: list[Cell], split: str, tasks: list[str]) -> dict[int, float]:
    """Seed -> mean accuracy over the tasks, for seeds that have finished all of them."""
    found: dict[int, dict[str, float]] = defaultdict(dict)
    for cell in cells:
        found[cell["key"]["seed"]][cell["key"]["task"]] = cell[split]["accuracy"]
    return {seed: statistics.mean(scores.values()) for seed, scores in found.items() if set(scores) == set(tasks)}


def print_table(cells: Iterable[Cell]) -> None:
    """Print a table for every student and setting: each task, the mean over tasks, the difference to distillation."""
    tables: dict[tuple[str, str], dict[str, list[Cell]]] = defaultdict(dict)
    cells = list(cells)
    for (settings, name), found in rows_of(cells).items():
        student, method = name.split(": ", 1)
        tables[student, settings][method] = found
    for (student, settings), methods in sorted(tables.items()):
        tasks = sorted({cell["key"]["task"] for found in methods.values() for cell in found})
        print(f"\n### {student}, {settings}\n")
        columns = [f"{task} {split}" for task in tasks for split in ("validation", "test")]
        head = ["method", "rate", "seeds", *columns, "mean, validation", "mean, test", "minus distillation", "on test"]
        print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
        for method, found in methods.items():
            row = [method, f"{found[0]['key']['learning_rate']:g}", str(len({cell["key"]["seed"] for cell in found}))]
            for task in tasks:
                for split in ("validation", "test"):
                    scores = [
                        cell[split]["accuracy"] for cell in found if cell["key"]["task"] == task and split in cell
                    ]
                    row.append(_shown(scores) if scores else "")
            means = {split: _by_seed(found, split, tasks) for split in ("validation", "test")}
            row += [_shown(list(mean.values())) if mean else "" for mean in means.values()]
            for split, mean in means.items():
                other = _by_seed(base, split, tasks) if (base := methods.get(_BASELINE)) else {}
                change = [mean[seed] - other[seed] for seed in mean if seed in other]
                row.append(_shown(change) if change and method != _BASELINE else "")
            print("| " + " | ".join(row) + " |")
