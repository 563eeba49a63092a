"""Batches of encoded rows, of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_compress.tasks.pair_inputs import SECOND_IDS, PairCollator
from hf_compress.tasks.task import Batch, Processor


# What stands for "no label" in the losses of torch and transformers.
IGNORED = -100
# A teacher's rows may hold inputs that its student's tokenizer does not name.
_TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def tokenizer_for(processor: Processor, max_length: int | None = None) -> PreTrainedTokenizerBase:
    """Check that a processor reads texts of up to `max_length` tokens.

    Raises:
        ValueError: If it reads images, or its model can take fewer tokens.
    """
    if not isinstance(processor, PreTrainedTokenizerBase):
        raise ValueError(f"Texts need a tokenizer; {type(processor).__name__} prepares images.")
    if max_length is not None and max_length > processor.model_max_length:
        limit = processor.model_max_length
        raise ValueError(f"max_length must be at most {limit} for this tokenizer, got {max_length}.")
    return processor


def row_lengths(rows: Dataset) -> list[int]:
    """The tokens of each encoded row, in both texts of a pair; 1 where rows are images, which all have one size."""
    if "input_ids" not in rows.column_names:
        return [1] * len(rows)
    texts = [rows[name] for name in ("input_ids", SECOND_IDS) if name in rows.column_names]
    return [sum(map(len, both)) for both in zip(*texts, strict=True)]


def length_sorted(rows: Dataset, batch_size: int, processor: Processor) -> Iterator[Batch]:
    """Padded batches of neighbours in length: the least padding a batch size allows.

    Yields:
        Dicts of tensors with an extra `index` [B]: the row numbers, to put results back in order.
    """
    lengths = row_lengths(rows)
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        yield {**padded_batch(rows, index, processor), "index": torch.tensor(index)}


def padded_batch(rows: Dataset, index: Sequence[int], processor: Processor) -> Batch:
    """The encoded rows whose numbers are in `index`, padded to the longest, with `labels` where there are any."""
    return collated(list(rows.select(index)), processor)


def collated(features: Sequence[Mapping[str, Any]], processor: Processor) -> Batch:
    """A batch of rows: what the processor's model takes, padded to the longest, with `labels` where there are any.

    Args:
        features: Encoded rows; columns that no model takes are left out.
        processor: That encoded them. It may have no padding token.
    """
    if SECOND_IDS in features[0]:
        return dict(PairCollator(tokenizer_for(processor))(features))
    taken = {*processor.model_input_names, *_TEXT_INPUTS}
    inputs = [{name: value for name, value in row.items() if name in taken} for row in features]
    batch: Batch
    if isinstance(processor, PreTrainedTokenizerBase):
        # The values of padded positions are not read; a tokenizer without a padding token has none.
        padded = processor.pad(inputs, return_tensors="pt") if processor.pad_token else _padded_with_zeros(inputs)
        batch = dict(padded)
    else:
        batch = {name: torch.tensor(np.array([row[name] for row in inputs])) for name in inputs[0]}
    if "labels" in features[0]:
        batch["labels"] = _labels([row["labels"] for row in features], getattr(processor, "padding_side", "right"))
    return batch


def _padded_with_zeros(features: Sequence[dict[str, list[int]]]) -> Batch:
    return {name: _labels([row[name] for row in features], "right", 0) for name in features[0]}


def _labels(values: list[Any], side: str, filler: int = IGNORED) -> Tensor:
    """Labels, or lists of them that are padded to the longest."""
    if not isinstance(values[0], list) or len({len(value) for value in values}) == 1:
        return torch.tensor(values)
    rows = [torch.tensor(value) for value in values]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler, padding_side=side)


def check_draw(num_samples: int, seed: int) -> None:
    """Raise `ValueError` when no sample of rows can be drawn like this, however many rows there are."""
    if num_samples < 1:
        raise ValueError(f"calibration_samples must be in 1..N, the number of training rows, got {num_samples}.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"calibration_seed must be in 0..2**32 - 1, got {seed}.")


def calibration_batches(
    rows: Dataset, processor: Processor, num_samples: int, seed: int, batch_size: int = 32
) -> list[Batch]:
    """Draw a seeded sample of rows without replacement, as batches of similar lengths.

    Args:
        rows: As `task.encode` gives them.
        processor: The tokenizer or image processor that encoded them.
        num_samples: Rows to draw.
        seed: Of the draw; the same seed gives the same rows.
        batch_size: Rows of one batch at most.

    Returns:
        Batches for `data=` of `compress`: tensors by name, padded to the longest row of the batch.

    Raises:
        ValueError: If fewer rows exist than are asked for.

    Example:
        >>> from transformers import ViTImageProcessor
        >>> rows = Dataset.from_dict({"pixel_values": [[[[0.0]]], [[[1.0]]], [[[2.0]]]], "labels": [0, 1, 0]})
        >>> [batch] = calibration_batches(rows, ViTImageProcessor(), num_samples=2, seed=0)
        >>> batch["pixel_values"].shape, batch["labels"].shape
        (torch.Size([2, 1, 1, 1]), torch.Size([2]))
    """
    if not 1 <= num_samples <= len(rows):
        raise ValueError(f"calibration_samples must be in 1..{len(rows)} (the training rows), got {num_samples}.")
    chosen = rows.shuffle(seed=seed).select(range(num_samples))
    return [{k: v for k, v in batch.items() if k != "index"} for batch in length_sorted(chosen, batch_size, processor)]
