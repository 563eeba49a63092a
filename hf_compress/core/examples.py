"""Calibration data as people have it: batches of tensors, rows of a tokenized data set, lists of ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig


# Rows of a data set that make one batch.
_ROWS = 8
# What padding holds where it is not zero: positions that no loss counts.
_IGNORED = -100


def _tensor(value: Any) -> Tensor | None:
    """A value as a tensor; None for texts and the like, which no model takes."""
    if torch.is_tensor(value):
        return value
    try:
        found = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return None
    return found.float() if found.dtype == torch.float64 else found


def _padded(name: str, values: list[Tensor], config: PretrainedConfig) -> Tensor:
    if all(value.shape == values[0].shape for value in values):
        return torch.stack(values)
    filling = {"input_ids": getattr(config, "pad_token_id", None) or 0, "labels": _IGNORED}.get(name, 0)
    return pad_sequence(values, batch_first=True, padding_value=filling)


def _collated(rows: list[Mapping[str, Any]], config: PretrainedConfig) -> dict[str, Tensor]:
    """One batch of single examples, padded on the right."""
    columns: dict[str, list[Tensor]] = {}
    for row in rows:
        if "input_ids" in row and "attention_mask" not in row:
            row = {**row, "attention_mask": [1] * len(row["input_ids"])}
        for name, value in row.items():
            tensor = _tensor(value)
            if tensor is not None:
                # As in transformers' own collators.
                columns.setdefault("labels" if name in ("label", "label_ids") else name, []).append(tensor)
    complete = {name: values for name, values in columns.items() if len(values) == len(rows)}
    return {name: _padded(name, values, config) for name, values in complete.items()}


def _rows_of(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The examples of a batch of lists."""
    columns = {name: value for name, value in batch.items() if isinstance(value, list | tuple)}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _axes(value: Any) -> int:
    """How many axes a tensor, array or nested list has."""
    axes = 0
    while isinstance(value, list | tuple) and len(value):
        axes, value = axes + 1, value[0]
    return axes + getattr(value, "ndim", 0)


def batches_of(
    data: Iterable[Mapping[str, Any]], config: PretrainedConfig, main: str = "input_ids"
) -> Iterator[Mapping[str, Any]]:
    """Batches of tensors from batches or from single examples, which are padded on the right, eight in a batch.

    Args:
        data: Dicts of tensors, as they come from a `DataLoader`; rows of a tokenized `datasets.Dataset`; dicts of
            lists, as they come from a tokenizer. Texts and other columns that are no numbers are left out.
        config: Names the padding token.
        main: The input that tells an example from a batch.

    Example:
        >>> from transformers import BertConfig
        >>> (batch,) = batches_of([{"input_ids": [5, 6, 7], "label": 1}, {"input_ids": [8], "label": 0}], BertConfig())
        >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist(), batch["labels"].tolist()
        ([[5, 6, 7], [8, 0, 0]], [[1, 1, 1], [1, 0, 0]], [1, 0])
    """
    waiting: list[Mapping[str, Any]] = []
    # Batches of images have channels, height and width, others one axis.
    batched = 4 if main == "pixel_values" else 2
    for batch in data:
        value = batch.get(main) if isinstance(batch, Mapping) else None
        if _axes(value) == batched - 1:
            waiting.append(batch)
            if len(waiting) == _ROWS:
                yield _collated(waiting, config)
                waiting = []
        elif _axes(value) == batched and isinstance(value, list | tuple):
            yield _collated(_rows_of(batch), config)
        else:
            yield batch
    if waiting:
        yield _collated(waiting, config)


class Batches:
    """The same for data that can be read again."""

    def __init__(self, data: Iterable[Mapping[str, Any]], config: PretrainedConfig, main: str) -> None:
        self.data, self.config, self.main = data, config, main

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return batches_of(self.data, self.config, self.main)
