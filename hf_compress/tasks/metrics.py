"""The metrics of GLUE, computed locally.

Letters: B examples, C classes.
"""

from __future__ import annotations

import numpy as np
from scipy import stats


# What each task is judged by; others: accuracy, or Spearman for regression.
MAIN_METRIC = {"cola": "matthews_correlation", "stsb": "spearman"}


def main_metric(task_name: str, num_labels: int) -> str:
    """The metric that selects models and enters tables."""
    return MAIN_METRIC.get(task_name, "spearman" if num_labels == 1 else "accuracy")


def classification_metrics(
    predictions: np.ndarray, labels: np.ndarray, num_classes: int | None = None
) -> dict[str, float]:
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
        tp, tn = float(((predictions == 1) & (labels == 1)).sum()), float(((predictions == 0) & (labels == 0)).sum())
        fp, fn = float(((predictions == 1) & (labels == 0)).sum()), float(((predictions == 0) & (labels == 1)).sum())
        spread = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        result["f1"] = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0
        result["matthews_correlation"] = float((tp * tn - fp * fn) / spread) if spread else 0.0
    return result


def regression_metrics(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
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


def task_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The metrics of a task from the model's logits.

    Args:
        logits: [B, C], or [B, 1] for regression.
        labels: [B].
    """
    if logits.shape[-1] == 1:
        return regression_metrics(logits[:, 0], labels)
    return classification_metrics(logits.argmax(-1), labels, logits.shape[-1])
