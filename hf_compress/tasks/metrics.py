"""The metrics of GLUE, computed locally.

Letters: B examples, C classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats
from sklearn.metrics import f1_score, matthews_corrcoef


Array = npt.NDArray[Any]

# What each task is judged by; others: accuracy, or Spearman for regression.
MAIN_METRIC = {"cola": "matthews_correlation", "stsb": "spearman"}


def main_metric(task_name: str, num_labels: int) -> str:
    """The metric that selects models and enters tables."""
    return MAIN_METRIC.get(task_name, "spearman" if num_labels == 1 else "accuracy")


def classification_metrics(predictions: Array, labels: Array, num_classes: int | None = None) -> dict[str, float]:
    """Accuracy, and for two classes F1 of class 1 and Matthews' correlation.

    Args:
        predictions: [B] class ids.
        labels: [B] class ids.
        num_classes: Of the model; None: two unless a higher id occurs.

    Example:
        >>> classification_metrics(np.array([1, 1, 0, 0]), np.array([1, 0, 0, 0]))["accuracy"]
        0.75
    """
    result = {"accuracy": float((predictions == labels).mean())}
    if num_classes == 2 or (num_classes is None and set(np.unique(labels)) | set(np.unique(predictions)) <= {0, 1}):
        # Both are 0 where they are undefined: nothing of class 1 to find, or only one class answered.
        result["f1"] = float(f1_score(labels, predictions, zero_division=0))
        result["matthews_correlation"] = _matthews(predictions, labels)
    return result


def _matthews(predictions: Array, labels: Array) -> float:
    # scikit-learn divides by zero, and warns, where a single class occurs.
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(matthews_corrcoef(labels, predictions))


def regression_metrics(predictions: Array, labels: Array) -> dict[str, float]:
    """Pearson's and Spearman's correlation; 0 when the predictions are all the same.

    Args:
        predictions: [B] scores.
        labels: [B] scores.
    """
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    return {
        "pearson": float(stats.pearsonr(predictions, labels).statistic),
        "spearman": float(stats.spearmanr(predictions, labels).statistic),
    }


def multi_label_metrics(logits: Array, labels: Array) -> dict[str, float]:
    """How well sets of classes are found: F1 over all pairs of example and class, its mean over the classes, and
    the fraction of examples whose set is exactly right.

    Args:
        logits: [B, C]; classes above 0 are answered, whose probability is above a half.
        labels: [B, C] 1 for the classes of an example.
    """
    found = logits > 0
    return {
        "f1": float(f1_score(labels, found, average="micro", zero_division=0)),
        "f1_macro": float(f1_score(labels, found, average="macro", zero_division=0)),
        "accuracy": float((found == labels.astype(bool)).all(-1).mean()),
    }


def task_metrics(logits: Array, labels: Array) -> dict[str, float]:
    """The metrics of a task from the model's logits.

    Args:
        logits: [B, C], or [B, 1] for regression.
        labels: [B].
    """
    if logits.shape[-1] == 1:
        return regression_metrics(logits[:, 0], labels)
    return classification_metrics(logits.argmax(-1), labels, logits.shape[-1])
