"""The grids that weights are rounded to: one for each output, or for each group of inputs of each output.

Letters: R outputs (rows), C inputs (columns), G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Equally spaced values that contain zero: `scale * (code - zero)` for the codes `0 .. 2**bits - 1`.

    Args:
        scale: [R] or [R, G], positive.
        zero: Of the same shape and dtype, the code of the value zero: a whole number.
    """

    scale: Tensor
    zero: Tensor


def largest_code(bits: int) -> int:
    """The largest code of so many bits."""
    return (1 << bits) - 1


def _smallest(dtype: torch.dtype) -> float:
    """The smallest positive number of a dtype."""
    facts = torch.finfo(dtype)
    return facts.smallest_normal * facts.eps


def fitted_grid(weight: Tensor, bits: int, symmetric: bool, stored_in: torch.dtype | None = None) -> Grid:
    """The grid from the smallest to the largest weight of each row.

    Args:
        weight: [R, C] float32.
        bits: Of a code.
        symmetric: Let the grid reach as far below zero as above, with a fixed code for zero.
        stored_in: The dtype that holds the scales; they are rounded to it. None: that of the weight.

    Returns:
        [R] scales and zeros in the dtype of the weight.

    Source:
        The released code of Frantar et al. 2023 (arXiv 2210.17323), with its special cases: a row of zeros gets the
        range -1 to 1, and a symmetric grid of a row without negative weights ends at about half of its largest one.

    Example:
        >>> fitted_grid(torch.tensor([[-1.0, 0.5, 2.0]]), bits=2, symmetric=False)
        Grid(scale=tensor([1.]), zero=tensor([1.]))
    """
    top = largest_code(bits)
    low, high = weight.amin(1).clamp_(max=0), weight.amax(1).clamp_(min=0)
    if symmetric:
        high = torch.maximum(low.abs(), high)
        low = torch.where(low < 0, -high, low)
    empty = (low == 0) & (high == 0)
    low, high = low.masked_fill(empty, -1), high.masked_fill(empty, 1)
    scale = (high - low) / top
    if stored_in is not None and stored_in != scale.dtype:
        # A scale that the smaller dtype cannot tell from zero would divide by zero.
        scale = scale.clamp(min=_smallest(stored_in)).to(stored_in).to(scale.dtype)
    zero = torch.full_like(scale, (top + 1) / 2) if symmetric else torch.round(-low / scale).clamp_(0, top)
    return Grid(scale, zero)


def fitted_grids(
    weight: Tensor, group_size: int, bits: int, symmetric: bool, stored_in: torch.dtype | None = None
) -> Grid:
    """The grid of each group of neighbouring columns; the last group may be smaller.

    Args:
        weight: [R, C] float32.
        group_size: Columns of a group; -1: all of them.
        bits, symmetric, stored_in: As for `fitted_grid`.

    Returns:
        [R, G] scales and zeros.
    """
    size = weight.shape[1] if group_size == -1 else group_size
    grids = [fitted_grid(part, bits, symmetric, stored_in) for part in torch.split(weight, size, dim=1)]
    return Grid(torch.stack([grid.scale for grid in grids], 1), torch.stack([grid.zero for grid in grids], 1))


def codes_on(weight: Tensor, grid: Grid, bits: int) -> Tensor:
    """The codes of the nearest values of a grid, as numbers in the dtype of the weight.

    Args:
        weight: Of any shape that scales and zeros of the grid extend to.
        grid: Where to round to.
        bits: Of a code.
    """
    return weight.div(grid.scale).round_().add_(grid.zero).clamp_(0, largest_code(bits))
