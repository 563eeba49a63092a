"""Writes what a report measured in the form in which the Hub reads evaluation results of a model.

Source:
    https://huggingface.co/docs/hub/eval-results: YAML files in the folder `.eval_results`, each a list of results. The
    older form was `model-index` in the card.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import huggingface_hub
import yaml


FOLDER = ".eval_results"


def result_file(report: Mapping[str, Any], own: Mapping[str, Any], dataset: str, task: str) -> tuple[str, bytes]:
    """Name and content of the file that tells the Hub what a model's main metric is.

    Args:
        report: Of `report.json`.
        own: One of its models.
        dataset: The Hub's name of the data set, which must be a benchmark there for the result to be listed.
        task: Name of the task within the benchmark.

    Raises:
        ValueError: If the installed huggingface_hub is too old to know this form.
    """
    if not hasattr(huggingface_hub, "EvalResultEntry"):
        raise ValueError(
            f"eval_dataset needs a newer huggingface_hub, got {huggingface_hub.__version__}: upgrade it "
            "(pip install -U huggingface_hub), or leave eval_dataset out."
        )
    metric = report["metric"]
    split = f" of the {report['split']} split" if report["split"] else ""
    entry = huggingface_hub.EvalResultEntry(
        dataset_id=dataset,
        task_id=task,
        value=own["metrics"][metric],
        notes=f"{metric} on {report['num_examples']} examples{split}, by hf-compress report",
    )
    content = yaml.safe_dump(huggingface_hub.eval_result_entries_to_yaml([entry]), sort_keys=False)
    name = re.sub(r"[^\w.-]+", "-", f"{dataset.rpartition('/')[2]}-{task}")
    return f"{FOLDER}/{name}.yaml", content.encode()
