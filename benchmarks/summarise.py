"""Tables of `benchmarks/RESULTS.md` from the result files of `structured_pruning.py`.

python benchmarks/summarise.py benchmarks/results/*.json
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path


def value(cell: dict, split: str, metric: str) -> float:
    return 100 * cell[split][metric]


def main() -> None:
    for file in map(Path, sys.argv[1:]):
        content = json.loads(file.read_text())
        cells = content.get("cells")
        if not cells:
            continue
        metric = "spearman" if "spearman" in next(iter(cells.values()))["validation"] else "accuracy"
        groups: dict[str, list[dict]] = defaultdict(list)
        for name, cell in cells.items():
            groups[name.split("/", 1)[1]].append(cell)
        header = content["header"]
        print(f"\n### {header['data']}, {header['model']} ({metric} x 100)\n")
        print("| model | seeds | validation | test | parameters kept | pruning s |\n|---|---|---|---|---|---|")
        for name, found in groups.items():
            columns = [name, str(len(found))]
            for split in ("validation", "test"):
                if split not in found[0]:
                    columns.append("-")
                    continue
                scores = [value(cell, split, metric) for cell in found]
                spread = f" +- {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
                columns.append(f"{statistics.mean(scores):.2f}{spread}")
            for key, digits in (("params", 3), ("prune_seconds", 1)):
                known = [cell[key] for cell in found if key in cell]
                columns.append(f"{statistics.mean(known):.{digits}f}" if known else "")
            print("| " + " | ".join(columns) + " |")
        commits = sorted({cell["commit"] for cell in cells.values()})
        print(f"\nCommits of the cells: {', '.join(commits)}; arguments: `{json.dumps(header['arguments'])}`.")


if __name__ == "__main__":
    main()
