"""The real inputs that an exported graph is recorded with and compared on.

Letters: B batch, S padded length.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.core.batches import main_input, on_device


# Pairs of an input and the mask that says where its tokens are.
_LENGTHS = {"input_ids": "attention_mask", "second_input_ids": "second_attention_mask"}

Inputs = dict[str, Tensor]


def read_inputs(model: PreTrainedModel, data: Iterable[Mapping[str, Any]], limit: int) -> list[Inputs]:
    """Read batches as a model takes them, without labels.

    Args:
        model: The model to export.
        data: Batches: dicts of tensors.
        limit: Examples that are read at most, in whole batches; at least one batch.

    Raises:
        ValueError: If there is no batch, or one lacks the model's main input.
    """
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise ValueError(f"data must be batches (an iterable of dicts of tensors), got one {type(data).__name__}.")
    main, found, count = main_input(model), [], 0
    for batch in data:
        if not isinstance(batch, Mapping) or not torch.is_tensor(batch.get(main)) or not len(batch[main]):
            held = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(f"data must hold dicts with a tensor {main} of at least one example, got {held}.")
        found.append(on_device(model, {name: value for name, value in batch.items() if name != "labels"}))
        count += len(batch[main])
        if count >= limit:
            break
    if not found:
        raise ValueError("data must hold at least one batch of real inputs, got none.")
    if any(list(batch) != list(found[0]) for batch in found):
        raise ValueError("data must hold the same inputs in every batch.")
    return found


def example_inputs(batch: Inputs) -> Inputs:
    """The inputs that a graph is recorded with: at least two examples, whose axes are free then."""
    size = len(next(iter(batch.values())))
    return {name: value if size > 1 else torch.cat([value, value]) for name, value in batch.items()}


def _lengths(batch: Inputs) -> list[int]:
    """Tokens of each example up to its last one, in both texts of a pair; 1 where examples are no texts."""
    total: list[int] | None = None
    for ids, mask in _LENGTHS.items():
        if ids in batch and batch[ids].ndim == 2:
            ends = _ends(batch[ids], batch.get(mask))
            total = ends if total is None else [one + other for one, other in zip(total, ends, strict=True)]
    return total if total is not None else [1] * len(next(iter(batch.values())))


def _ends(ids: Tensor, mask: Tensor | None) -> list[int]:
    if mask is None:
        return [ids.shape[1]] * len(ids)
    places = torch.arange(1, ids.shape[1] + 1, device=mask.device)
    ends: list[int] = (mask.bool() * places).amax(1).clamp(min=1).tolist()
    return ends


def _part(batch: Inputs, rows: Sequence[int]) -> Inputs:
    """Some examples of a batch, without the padding that none of them needs."""
    part = {name: value[list(rows)] for name, value in batch.items()}
    widths = {}
    for ids, mask in _LENGTHS.items():
        if ids in part and part[ids].ndim == 2:
            widths[part[ids].shape[1], ids.startswith("second_")] = max(_ends(part[ids], part.get(mask)))
    for name, value in part.items():
        width = widths.get((value.shape[1] if value.ndim == 2 else 0, name.startswith("second_")))
        if width is not None:
            part[name] = value[:, :width]
    return part


def checked_inputs(batches: Sequence[Inputs]) -> list[Inputs]:
    """The batches that outputs are compared on: the given ones, and parts of the first one of other sizes.

    The parts are the shortest example alone, the longest one alone, both together, and three examples.
    """
    first = batches[0]
    lengths = _lengths(first)
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    parts = dict.fromkeys([(order[0],), (order[-1],), (order[0], order[-1]), tuple(sorted(order[-3:]))])
    return [*(_part(first, part) for part in parts), *batches]


def size_of(batch: Inputs) -> list[int]:
    """[B, S] of the first input of a batch; of images, B alone."""
    value = next(iter(batch.values()))
    return list(value.shape[:2]) if value.ndim <= 3 else [len(value)]
