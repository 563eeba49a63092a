"""How good models are on a labelled split, and how far from each other.

Letters: B examples, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.core.batches import on_device
from hf_compress.core.modes import evaluating
from hf_compress.tasks.inputs import length_sorted
from hf_compress.tasks.metrics import task_metrics


_RESAMPLES = 200


def _unchanged(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return logits, labels


@dataclass(frozen=True)
class Measured:
    """A model and the examples as it reads them.

    Args:
        model: On the device where it is measured.
        rows: Tokenized by its tokenizer, `labels` in its order.
        tokenizer: Its own.
        arrange: Brings logits and labels from the model's order of classes into one that all models share.
        names: Of the classes in that order.
    """

    model: PreTrainedModel
    rows: Dataset
    tokenizer: PreTrainedTokenizerBase
    arrange: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]] = _unchanged
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answers:
    """What a model said.

    Args:
        logits: [B, C].
        labels: [B] what would have been right.
    """

    logits: np.ndarray
    labels: np.ndarray

    def metrics(self) -> dict[str, float]:
        return task_metrics(self.logits, self.labels)


@torch.no_grad()
def predict(
    model: PreTrainedModel, rows: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int = 32
) -> torch.Tensor:
    """Logits [rows, classes] in the order of the rows, computed on length-sorted batches in eval mode."""
    result: torch.Tensor | None = None
    with evaluating(model):
        for batch in length_sorted(rows, batch_size, tokenizer):
            index = batch.pop("index")
            batch.pop("labels", None)
            logits = model(**on_device(model, batch)).logits.float().cpu()
            if result is None:
                result = torch.empty(len(rows), logits.shape[-1])
            result[index] = logits
    if result is None:
        raise ValueError("rows must hold at least one example, got none.")
    return result


def evaluated(measured: Measured, batch_size: int = 32) -> Answers:
    """What a model says to its examples, in the order of classes that all models share."""
    logits = predict(measured.model, measured.rows, measured.tokenizer, batch_size).numpy()
    return Answers(*measured.arrange(logits, measured.rows.with_format("numpy")["labels"][:]))


def evaluate_model(
    model: PreTrainedModel, rows: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int = 32
) -> dict[str, float]:
    """The metrics of a task on tokenized rows with `labels`.

    Raises:
        ValueError: If there are no rows.
    """
    return evaluated(Measured(model, rows, tokenizer), batch_size).metrics()


def standard_error(before: Answers, after: Answers, metric: str) -> float | None:
    """How far the change of a metric between two models would vary with the examples, from a paired bootstrap.

    Args:
        before, after: Of two models on the same examples in the same order.
        metric: Of `Answers.metrics`.

    Returns:
        The standard deviation of the change over 200 samples of the examples, drawn with replacement and a fixed seed;
        None when the metric does not exist.
    """
    generator = np.random.default_rng(0)
    changes = []
    for _ in range(_RESAMPLES):
        drawn = generator.integers(len(before.labels), size=len(before.labels))
        old, new = (Answers(x.logits[drawn], x.labels[drawn]).metrics() for x in (before, after))
        if metric in old and metric in new:
            changes.append(new[metric] - old[metric])
    return float(np.std(changes)) if changes else None
