"""The weights that pruning may zero, each seen as a matrix of outputs by inputs, and groups that share one config."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_compress.methods.weight_pruning.config import WeightPruningConfig
from hf_compress.methods.weight_pruning.patterns import HeadPattern, HeadUnits, MatrixPattern


@dataclass(frozen=True, eq=False)
class PrunableWeight:
    """One weight tensor that may be pruned.

    Args:
        name: Qualified name of its module.
        weight: The live parameter.
        transposed: The module stores inputs as rows (GPT-2's `Conv1D`).
        heads: For a weight of an attention that loses whole heads: the rows or columns of each attention unit.
        layer_index: For such a weight: the transformer layer that it belongs to.
    """

    name: str
    weight: nn.Parameter
    transposed: bool = False
    heads: HeadUnits | None = None
    layer_index: int | None = None

    def pattern(self, config: WeightPruningConfig) -> MatrixPattern:
        """What divides this matrix into units."""
        if self.heads is not None:
            return self.heads
        pattern = config.parsed_pattern
        assert not isinstance(pattern, HeadPattern), "weights of an attention know the rows of their heads"
        return pattern

    def matrix(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape as [outputs, inputs]; kernel positions of a convolution count as inputs."""
        if self.transposed:
            return tensor.T
        return tensor if tensor.ndim == 2 else tensor.movedim(1, -1).flatten(1)

    def like_weight(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`."""
        if self.transposed:
            return matrix.T.contiguous()
        shape = self.weight.shape
        return matrix if len(shape) == 2 else matrix.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()

    def nothing_pruned(self) -> Tensor:
        """[outputs, inputs] all False."""
        return torch.zeros(self.matrix(self.weight).shape, dtype=torch.bool, device=self.weight.device)


@dataclass(frozen=True, eq=False)
class WeightGroup:
    """Weights that share one config."""

    config: WeightPruningConfig
    weights: list[PrunableWeight]

    @property
    def num_elements(self) -> int:
        return sum(prunable.weight.numel() for prunable in self.weights)


def tied(weights: Sequence[PrunableWeight]) -> list[list[int]]:
    """Which weights lose the same units.

    Returns:
        Indices into `weights`: where heads are pruned, the weights of one attention together; every other weight
        alone.
    """
    sets: dict[Hashable, list[int]] = {}
    for index, prunable in enumerate(weights):
        key = (prunable.layer_index, None if prunable.heads else index)
        sets.setdefault(key, []).append(index)
    return list(sets.values())


def unit_counts(config: WeightPruningConfig, weights: Sequence[PrunableWeight]) -> list[int]:
    """The number of units of each set of tied weights."""
    firsts = [weights[indices[0]] for indices in tied(weights)]
    return [len(prunable.pattern(config).pruned_units(prunable.nothing_pruned())) for prunable in firsts]
