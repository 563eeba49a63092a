"""Tables of `benchmarks/RESULTS.md` from result files of cells: a mean and its standard error over the seeds.

python benchmarks/summarise.py benchmarks/results/*.json
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any


# Facts of a cell that are no measurement of quality.
LEFT_OUT = ("seconds", "prune_seconds", "compress_seconds")


def numbers(cell: dict[str, Any], scale: bool) -> dict[str, float]:
    """Column -> number of a cell; of a split's metrics the main one, x 100."""
    found: dict[str, float] = {}
    for name, value in cell.items():
        if isinstance(value, dict):
            metric = next((x for x in ("spearman", "accuracy") if x in value), None)
            found |= {name: 100 * value[metric]} if metric else {f"{name} {k}": v for k, v in value.items()}
        elif isinstance(value, int | float) and name not in LEFT_OUT:
            found[name] = 100 * value if scale and value <= 1 and name != "params" else value
    return found


def cell_text(values: list[float]) -> str:
    digits = 0 if min(values) > 1000 else 3 if max(values) <= 1 else 2
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return f"{statistics.mean(values):,.{digits}f}" + (f" +- {spread:.{digits}f}" if spread is not None else "")


def main() -> None:
    for file in map(Path, sys.argv[1:]):
        content = json.loads(file.read_text())
        if not (cells := content.get("cells")):
            continue
        groups: dict[str, list[dict[str, float]]] = defaultdict(list)
        for name, cell in cells.items():
            kind = name.split("/", 1)[1] if name.startswith("seed") else name
            groups[kind].append(numbers(cell, scale="embeddings" in file.name))
        columns = list(dict.fromkeys(column for found in groups.values() for row in found for column in row))
        print(f"\n### {file.name}\n\n| | seeds | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 2)}")
        for kind, found in groups.items():
            shown = [[row[column] for row in found if column in row] for column in columns]
            print(f"| {kind} | {len(found)} | {' | '.join(cell_text(x) if x else '' for x in shown)} |")
        commits = sorted({cell["commit"] for cell in cells.values()})
        arguments = json.dumps(content["header"].get("arguments"))
        print(f"\nCommits of the cells: {', '.join(commits)}; arguments: `{arguments}`.")


if __name__ == "__main__":
    main()
