"""Takes the result of a model out of a report, as the Hub reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_compress.hub_results import result_file


def reported_result(report: Mapping[str, Any], own: Mapping[str, Any], dataset: str, task: str) -> tuple[str, bytes]:
    """Name and content of the file that tells the Hub what a model's main metric is.

    Args:
        report: Of `report.json`.
        own: One of its models.
        dataset: As for `result_file`, like task.

    Raises:
        ValueError: As `result_file`.
    """
    metric = report["metric"]
    split = f" of the {report['split']} split" if report["split"] else ""
    notes = f"{metric} on {report['num_examples']} examples{split}, by hf-compress report"
    return result_file(dataset, task, own["metrics"][metric], notes)
