"""From texts to model inputs, in batches of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hf_compress.tasks.task import Task


def tokenize(rows: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Token ids, masks and `labels` of a split, unpadded; other columns are dropped.

    Raises:
        ValueError: If `max_length` is longer than the tokenizer's model can take.
    """
    if max_length > tokenizer.model_max_length:
        raise ValueError(
            f"max_length must be at most {tokenizer.model_max_length} for this tokenizer, got {max_length}."
        )

    def encode(batch: dict[str, list]) -> dict[str, list]:
        encoded = tokenizer(*(batch[c] for c in task.text_columns), truncation=True, max_length=max_length)
        cast = float if task.is_regression else int
        return {**encoded, "labels": [cast(label) for label in batch["label"]]}

    return rows.map(encode, batched=True, remove_columns=rows.column_names, load_from_cache_file=False)


def length_sorted(rows: Dataset, batch_size: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    """Padded batches of neighbours in length: the least padding a batch size allows.

    Yields:
        Dicts of tensors with an extra `index` [B]: the row numbers, to put results back in order.
    """
    lengths = [len(ids) for ids in rows["input_ids"]]
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        yield {**padded_batch(rows, index, tokenizer), "index": torch.tensor(index)}


def padded_batch(rows: Dataset, index: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokenized rows at the places of `index`, padded to the longest, with `labels` where there are any."""
    chosen = rows.select(index)
    features = [{k: v for k, v in row.items() if k != "labels"} for row in chosen]
    batch = dict(tokenizer.pad(features, return_tensors="pt"))
    if "labels" in rows.column_names:
        batch["labels"] = torch.tensor(chosen["labels"])
    return batch


def check_draw(num_samples: int, seed: int) -> None:
    """Raise `ValueError` when no sample of rows can be drawn like this, however many rows there are."""
    if num_samples < 1:
        raise ValueError(f"calibration_samples must be in 1..N, the number of training rows, got {num_samples}.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"calibration_seed must be in 0..2**32 - 1, got {seed}.")


def calibration_batches(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, num_samples: int, seed: int, batch_size: int = 32
) -> list[dict[str, Any]]:
    """A seeded sample of rows, drawn without replacement, as length-sorted batches.

    Raises:
        ValueError: If fewer rows exist than are asked for.
    """
    if not 1 <= num_samples <= len(rows):
        raise ValueError(f"calibration_samples must be in 1..{len(rows)} (the training rows), got {num_samples}.")
    chosen = rows.shuffle(seed=seed).select(range(num_samples))
    return [{k: v for k, v in batch.items() if k != "index"} for batch in length_sorted(chosen, batch_size, tokenizer)]
