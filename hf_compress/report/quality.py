"""How good a model is on a labelled split."""

from __future__ import annotations

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.core.batches import on_device
from hf_compress.core.modes import evaluating
from hf_compress.tasks.inputs import length_sorted
from hf_compress.tasks.metrics import task_metrics


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


def evaluate_model(
    model: PreTrainedModel, rows: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int = 32
) -> dict[str, float]:
    """The metrics of a task on tokenized rows with `labels`.

    Raises:
        ValueError: If there are no rows.
    """
    logits = predict(model, rows, tokenizer, batch_size)
    return task_metrics(logits.numpy(), rows.with_format("numpy")["labels"][:])
