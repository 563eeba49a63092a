"""Makes batches of calibration data: of tensors, rows of a prepared data set, or lists of ids or samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig


Data = Iterable[Mapping[str, Any]]

# Rows of a data set that make one batch.
_ROWS = 8
# Input -> value of its padding, where that is not zero: a label that no loss counts.
_IGNORED = -100
# Axes of one example: an image has channels, height and width, a spectrogram time and frequency, all else one.
_AXES = {"pixel_values": 3, "input_features": 2}
# Inputs that may have any length, with an attention_mask that says how much of them is real.
_PADDED = ("input_ids", "input_values")


def _tensor(value: Any) -> Tensor | None:
    """Turn a value into a tensor; None for texts and other values that no model takes."""
    if torch.is_tensor(value):
        return value
    try:
        found = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return None
    return found.float() if found.dtype == torch.float64 else found


def _padded(name: str, values: list[Tensor], config: PretrainedConfig) -> Tensor:
    first = values[0].shape
    other = next((value.shape for value in values if value.shape != first), None)
    if other is None:
        return torch.stack(values)
    if name in _AXES:
        raise ValueError(
            f"data holds {name} of different shapes, {list(first)} and {list(other)}, which cannot be stacked. Bring "
            "the "
            "examples to one size first, as the model's own processor does."
        )
    filling = {"input_ids": getattr(config, "pad_token_id", None) or 0, "labels": _IGNORED}.get(name, 0)
    return pad_sequence(values, batch_first=True, padding_value=filling)


def _collated(rows: list[Mapping[str, Any]], config: PretrainedConfig) -> dict[str, Tensor]:
    """Pad single examples on the right and stack them."""
    columns: dict[str, list[Tensor]] = {}
    for row in rows:
        for main in _PADDED:
            if main in row and "attention_mask" not in row:
                row = {**row, "attention_mask": [1] * len(row[main])}
        for name, value in row.items():
            tensor = _tensor(value)
            if tensor is not None:
                # As in transformers' own collators.
                columns.setdefault("labels" if name in ("label", "label_ids") else name, []).append(tensor)
    complete = {name: values for name, values in columns.items() if len(values) == len(rows)}
    return {name: _padded(name, values, config) for name, values in complete.items()}


def _rows_of(batch: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The examples of a batch of lists."""
    columns = {name: value for name, value in batch.items() if isinstance(value, list | tuple)}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _axes(value: Any) -> int:
    """How many axes a tensor, array or nested list has."""
    axes = 0
    while isinstance(value, list | tuple) and len(value):
        axes, value = axes + 1, value[0]
    return axes + int(getattr(value, "ndim", 0))


def batches_of(data: Data, config: PretrainedConfig, main: str = "input_ids") -> Iterator[Mapping[str, Any]]:
    """Make batches of tensors from batches or from single examples, eight in a batch.

    Texts and sounds of different lengths are padded on the right, with an `attention_mask`; images must have one size.

    Args:
        data: Dicts of tensors, as they come from a `DataLoader`; rows of a `datasets.Dataset` that holds a model's
            inputs (`input_ids`, `pixel_values`, `input_values`); dicts of lists, as they come from a tokenizer. Texts
            and other columns without numbers are left out.
        config: Names the padding token.
        main: The input that tells an example from a batch.

    Raises:
        ValueError: If images have different sizes.

    Example:
        >>> from transformers import BertConfig
        >>> (batch,) = batches_of([{"input_ids": [5, 6, 7], "label": 1}, {"input_ids": [8], "label": 0}], BertConfig())
        >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist(), batch["labels"].tolist()
        ([[5, 6, 7], [8, 0, 0]], [[1, 1, 1], [1, 0, 0]], [1, 0])
    """
    waiting: list[Mapping[str, Any]] = []
    single = _AXES.get(main, 1)
    for batch in data:
        value = batch.get(main) if isinstance(batch, Mapping) else None
        if _axes(value) == single:
            waiting.append(batch)
            if len(waiting) == _ROWS:
                yield _collated(waiting, config)
                waiting = []
        elif _axes(value) == single + 1 and isinstance(value, list | tuple):
            yield _collated(_rows_of(batch), config)
        else:
            yield batch
    if waiting:
        yield _collated(waiting, config)


class Batches:
    """The same for data that can be read again."""

    def __init__(self, data: Data, config: PretrainedConfig, main: str) -> None:
        self.data, self.config, self.main = data, config, main

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return batches_of(self.data, self.config, self.main)
