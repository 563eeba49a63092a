"""Regularisers that shrink whole blocks of a weight before they are pruned.

Letters: R outputs, C inputs of a weight seen as a matrix; b elements of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_compress.methods.weight_pruning.patterns import BlockPattern


def _norms(matrix: Tensor, pattern: BlockPattern) -> Tensor:
    """The norm of each block, in at least single precision: squares of small numbers vanish in half precision."""
    precise = matrix if matrix.dtype == torch.float64 else matrix.float()
    return pattern.reduce(precise.square(), "sum").sqrt()


def group_lasso(weight: Tensor, pattern: BlockPattern, strength: float) -> Tensor:
    """What is left of every weight after one proximal step on the sum of the blocks' norms.

    Args:
        weight: [R, C].
        pattern: Its blocks.
        strength: Learning rate times coefficient.

    Returns:
        [R, C] factors in [0, 1]: `max(0, 1 - strength sqrt(b) / |W_b|)`, 0 for blocks that are zero.

    Source:
        Yuan and Lin 2006, as a proximal step.

    Example:
        >>> import torch
        >>> group_lasso(torch.tensor([[3.0, 0.1], [4.0, 0.1]]), BlockPattern(2, 1), 0.5)
        tensor([[0.8586, 0.0000],
                [0.8586, 0.0000]])
    """
    size = pattern.reduce(torch.ones_like(weight, dtype=torch.float32), "sum")
    left = (1 - strength * size.sqrt() / _norms(weight, pattern).clamp(min=1e-12)).clamp(min=0)
    return pattern.expand(left, weight.shape)


def group_lasso_by_gradient(gradient: Tensor, pattern: BlockPattern, strength: float) -> Tensor:
    """What the original's regulariser leaves: blocks with small gradients shrink most.

    Args:
        gradient: [R, C].
        pattern: Its blocks.
        strength: Coefficient.

    Returns:
        [R, C] factors in [0, 1]: `1 - strength / |G_b|`; 1 for blocks without gradient, which the original makes
        infinite.

    Source:
        Neural Compressor 2.6.

    Example:
        >>> import torch
        >>> group_lasso_by_gradient(torch.tensor([[0.3, 0.0], [0.4, 0.0]]), BlockPattern(2, 1), 0.1)
        tensor([[0.8000, 1.0000],
                [0.8000, 1.0000]])
    """
    norms = _norms(gradient, pattern)
    left = (1 - strength / norms.clamp(min=1e-12)).clamp(min=0).masked_fill(norms == 0, 1.0)
    return pattern.expand(left, gradient.shape)
