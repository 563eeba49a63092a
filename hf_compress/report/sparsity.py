"""Counts the zeros of each weight matrix of a model in the live weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D


_KINDS = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Trained weights are hardly ever exactly zero; what is below this was not pruned.
_NOTEWORTHY = 0.001


@dataclass(frozen=True)
class Matrix:
    """One weight of a linear or convolution module.

    Args:
        layer: Index of its layer; None for what stands outside the layers, as poolers and heads do.
        kind: Its name within the layer, e.g. `attention.self.query`; outside the layers its whole name.
        zeros: Elements that are exactly zero.
        weights: All its elements.
    """

    layer: int | None
    kind: str
    zeros: int
    weights: int


def matrices_of(model: nn.Module) -> list[Matrix]:
    """Every linear and convolution weight of a model in module order, shared ones once."""
    found, seen = [], set()
    for name, module in model.named_modules():
        if not isinstance(module, _KINDS) or module.weight in seen:
            continue
        seen.add(module.weight)
        parts = name.split(".")
        place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        layer, kind = (None, name) if place is None else (int(parts[place]), ".".join(parts[place + 1 :]))
        weights = module.weight.numel()
        found.append(Matrix(layer, kind, weights - int(module.weight.count_nonzero()), weights))
    return found


def element_ratio(matrices: Sequence[Matrix]) -> float:
    """Zeros over elements of all matrices together, never pruned heads and poolers included.

    Source:
        The "element-wise" ratio of Intel Neural Compressor. Theirs counts zeros of masks, this one those of weights.

    Example:
        >>> element_ratio([Matrix(0, "query", 3, 4), Matrix(None, "classifier", 0, 2)])
        0.5
    """
    return sum(matrix.zeros for matrix in matrices) / max(sum(matrix.weights for matrix in matrices), 1)


def has_zeros(matrices: Sequence[Matrix]) -> bool:
    """Whether the model has more zeros than chance explains."""
    return element_ratio(matrices) >= _NOTEWORTHY


def grid_of(matrices: Sequence[Matrix]) -> tuple[list[int], list[str], list[list[float | None]]]:
    """Sparsity by layer and kind.

    Returns:
        Layers in order, kinds in order of appearance, and [layers][kinds] fractions; None where a layer lacks a kind.

    Example:
        >>> grid_of([Matrix(0, "query", 3, 4), Matrix(2, "key", 1, 4)])
        ([0, 2], ['query', 'key'], [[0.75, None], [None, 0.25]])
    """
    inside = [(matrix.layer, matrix) for matrix in matrices if matrix.layer is not None]
    layers = sorted({layer for layer, _ in inside})
    kinds = list(dict.fromkeys(matrix.kind for _, matrix in inside))
    cells = {(layer, matrix.kind): matrix.zeros / max(matrix.weights, 1) for layer, matrix in inside}
    return layers, kinds, [[cells.get((layer, kind)) for kind in kinds] for layer in layers]
