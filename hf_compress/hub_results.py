"""Writes evaluation results in the form in which the Hub reads those of a model.

Source:
    https://huggingface.co/docs/hub/eval-results: YAML files in the folder `.eval_results`, each a list of results. The
    older form was `model-index` in the card.
"""

from __future__ import annotations

import re

import huggingface_hub
import yaml


FOLDER = ".eval_results"


def result_file(dataset: str, task: str, value: float, notes: str) -> tuple[str, bytes]:
    """Name and content of the file that tells the Hub what was measured of a model.

    Args:
        dataset: The Hub's name of the data set, which must be a benchmark there for the result to be listed.
        task: Name of the task within the benchmark.
        value: The metric.
        notes: Which metric it is, and on what it was measured.

    Raises:
        ValueError: If the installed huggingface_hub is too old to know this form.

    Example:
        >>> name, content = result_file("nyu-mll/glue", "sst2", 0.9, "accuracy")
        >>> print(name, content.decode(), sep="\\n")
        .eval_results/glue-sst2.yaml
        - dataset:
            id: nyu-mll/glue
            task_id: sst2
          value: 0.9
          notes: accuracy
    """
    if not hasattr(huggingface_hub, "EvalResultEntry"):
        raise ValueError(
            f"Evaluation results need a newer huggingface_hub, got {huggingface_hub.__version__}: upgrade it "
            "(pip install -U huggingface_hub), or name no data set."
        )
    entry = huggingface_hub.EvalResultEntry(dataset_id=dataset, task_id=task, value=value, notes=notes)
    content = yaml.safe_dump(huggingface_hub.eval_result_entries_to_yaml([entry]), sort_keys=False)
    name = re.sub(r"[^\w.-]+", "-", f"{dataset.rpartition('/')[2]}-{task}")
    return f"{FOLDER}/{name}.yaml", content.encode()
