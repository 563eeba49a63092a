"""Rounds a matrix to few bits so that its products with known inputs change little (GPTQ), or to the nearest (RTN).

Columns are treated one after the other. The error of a column is made up for by the columns that are still to come;
one triangular factor says how.

Letters: R outputs (rows), C inputs (columns), G groups of columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.methods.weight_quantization.factorisation import inverse_factor
from hf_compress.methods.weight_quantization.grids import Grid, codes_on, fitted_grid, fitted_grids, largest_code


# Columns whose errors reach the columns behind them in one product. As published.
COLUMNS = 128
# How much of the correction towards the dense model is applied. As in the released code of GPTAQ.
SHARE = 0.25
# Columns within a block whose errors reach the rest of the block in one product.
_INNER = 32


@dataclass(frozen=True)
class RoundingOptions:
    """How a matrix is rounded.

    Args:
        bits: Of a code.
        group_size: Neighbouring columns that share a grid; -1: all of a row.
        symmetric: Whether grids reach as far below zero as above.
        act_order: Whether columns with larger inputs come first.
        static_groups: Whether the grids of groups are fitted before any column is rounded.
        percdamp: Added to the diagonal of H, as a fraction of its mean.
        stored_in: The dtype that holds the scales.
    """

    bits: int
    group_size: int = -1
    symmetric: bool = False
    act_order: bool = False
    static_groups: bool = False
    percdamp: float = 0.01
    stored_in: torch.dtype = torch.float32


@dataclass(frozen=True)
class Rounded:
    """A rounded matrix: `grid.scale[:, groups] * (codes - grid.zero[:, groups])`.

    Args:
        codes: [R, C] uint8, at most `2**bits - 1`.
        grid: [R, G] scales and zeros, float32.
        groups: [C] int64, the group of each column.
        loss: Half the squared error of the products with the inputs that H sums up; None where none are known.
    """

    codes: Tensor
    grid: Grid
    groups: Tensor
    loss: Tensor | None = None


def group_of_columns(columns: int, group_size: int, device: torch.device | None = None) -> Tensor:
    """[C] int64, the group of each column where groups are neighbouring columns."""
    numbers = torch.arange(columns, device=device)
    return torch.zeros_like(numbers) if group_size == -1 else numbers // group_size


@torch.no_grad()
def round_to_nearest(weight: Tensor, options: RoundingOptions) -> Rounded:
    """Round each weight to the nearest value of its grid.

    Args:
        weight: [R, C], not changed.
        options: Without `act_order`, `static_groups` and `percdamp`, which mean nothing here.
    """
    weight = weight.float()
    grid = fitted_grids(weight, options.group_size, options.bits, options.symmetric, options.stored_in)
    groups = group_of_columns(weight.shape[1], options.group_size, weight.device)
    spread = Grid(grid.scale[:, groups], grid.zero[:, groups])
    return Rounded(codes_on(weight, spread, options.bits).to(torch.uint8), grid, groups)


@dataclass(frozen=True)
class InputMoments:
    """What rounding needs to know of the inputs; the same for all matrices that read them.

    Args:
        dead: [C] bool, inputs that are always zero.
        order: [C] int64, the columns in the order in which they are rounded; None: from left to right.
        factor: [C, C] float32, in that order: the upper triangular U with `U^T U` the inverse of the damped moments.
        shift: [C, C] float32, in that order, zero on and below the diagonal: what a weight adds to those behind it to
            make up for how its input differs from that in the dense model; None: nothing.
    """

    dead: Tensor
    order: Tensor | None
    factor: Tensor
    shift: Tensor | None = None


@torch.no_grad()
def prepare_inputs(
    hessian: Tensor, options: RoundingOptions, difference: Tensor | None = None, share: float = SHARE
) -> InputMoments:
    """Factorise the second moments of inputs.

    Args:
        hessian: [C, C] float32, `X^T X` at any scale; not changed. The scale matters a little where inputs are always
            zero: these count as 1.
        options: `act_order` and `percdamp` are read.
        difference: [C, C] float32, `(X' - X)^T X` at the same scale, with X' the inputs in the dense model. None: the
            target is the product with X.
        share: How much of the difference is made up for; 1 is the least-squares solution.

    Raises:
        ValueError: If the damped matrix is not positive definite in single precision.

    Source:
        The correction: Li et al. 2025 (arXiv 2504.02692), `P = ((D U^T) strictly upper) U`.
    """
    dead = hessian.diagonal() == 0
    damped = hessian + torch.diag(dead.to(hessian.dtype))
    order = None
    if options.act_order:
        order = torch.argsort(damped.diagonal(), descending=True)
        damped = damped[order][:, order]
    damped.diagonal().add_(options.percdamp * damped.diagonal().mean())
    try:
        factor = inverse_factor(damped)
    except RuntimeError as error:
        # torch.linalg.LinAlgError, which torch does not declare.
        raise ValueError(
            f"percdamp must be larger for these inputs, got {options.percdamp}: their second moments are not positive "
            "definite. Raise it (0.1, or 1), or calibrate with more tokens."
        ) from error
    if difference is None:
        return InputMoments(dead, order, factor)
    ordered = difference if order is None else difference[order][:, order]
    return InputMoments(dead, order, factor, (ordered @ factor.T).triu_(1) @ factor * share)


@torch.no_grad()
def round_by_inputs(
    weight: Tensor, inputs: InputMoments, options: RoundingOptions, hold_zeros: bool = False, columns: int = COLUMNS
) -> Rounded:
    """Round a matrix so that its products with inputs change little.

    Args:
        weight: [R, C], not changed. Weights of inputs that are always zero become zero.
        inputs: Made with the same options.
        options: How to round.
        hold_zeros: Let weights that are zero stay zero.
        columns: Columns of a block.

    Returns:
        The codes in the order of the columns of `weight`.

    Source:
        Frantar et al. 2023 (arXiv 2210.17323), algorithm 1. The codes are those of the released code in single
        precision but for weights that lie in the middle between two of them: sums are added in another order, and the
        inverse of the moments is factorised without being computed.
    """
    work = _Work(weight, inputs, options, hold_zeros)
    loss = torch.zeros((), device=weight.device)
    for start in range(0, weight.shape[1], columns):
        stop = min(start + columns, weight.shape[1])
        errors = work.round_block(start, stop)
        loss += errors.square().sum() / 2
        work.spread_errors(errors, start, stop)
    return work.finished(loss)


class _Work:
    """The state of one matrix while its columns are rounded. Columns lie in rows here, so each is contiguous."""

    def __init__(self, weight: Tensor, inputs: InputMoments, options: RoundingOptions, hold_zeros: bool) -> None:
        self.options, self.factor, self.order, self.shift = options, inputs.factor, inputs.order, inputs.shift
        weight = weight.to(torch.float32)
        rows, columns = weight.shape
        grouped = options.group_size != -1
        # As published: the grid of a whole row is fitted before, those of groups after dead inputs lose their weights.
        grids = [] if grouped else [self._fitted(weight)]
        self.columns = weight.T.clone(memory_format=torch.contiguous_format)
        self.columns[inputs.dead] = 0
        self.size = options.group_size if grouped else columns
        if grouped and options.static_groups:
            grids = [self._fitted(part.T) for part in torch.split(self.columns, self.size)]
        groups = group_of_columns(columns, options.group_size)
        if self.order is not None:
            self.columns = self.columns[self.order]
            groups = groups[self.order.cpu()] if options.static_groups else groups
        held = self.columns == 0 if hold_zeros else None
        self.held = held if held is not None and bool(held.any()) else None
        # The group of each column in the order of the work, and the grids that are known so far.
        self.groups, self.grids = groups.tolist(), grids
        self.codes = torch.empty(columns, rows, dtype=torch.uint8, device=weight.device)

    def _fitted(self, weight: Tensor) -> Grid:
        options = self.options
        return fitted_grid(weight, options.bits, options.symmetric, options.stored_in)

    def round_block(self, start: int, stop: int) -> Tensor:
        """Round the columns of one block, and return their scaled errors: [columns of the block, R]."""
        part = self.columns[start:stop]
        # Groups that begin in this block are fitted to the weights as they are before it.
        while len(self.grids) <= self.groups[stop - 1] and not self.options.static_groups:
            begin = len(self.grids) * self.size
            self.grids.append(self._fitted(self.columns[begin : begin + self.size].T))
        inside = self.factor[start:stop, start:stop].contiguous()
        scales = inside.diagonal().tolist()
        errors, codes = torch.empty_like(part), torch.empty_like(part)
        top, held = largest_code(self.options.bits), self.held
        for first in range(0, stop - start, _INNER):
            last = min(first + _INNER, stop - start)
            for i in range(first, last):
                column, error, code = part[i], errors[i], codes[i]
                grid = self.grids[self.groups[start + i]]
                torch.div(column, grid.scale, out=code).round_().add_(grid.zero).clamp_(0, top)
                if held is not None:
                    torch.where(held[start + i], grid.zero, code, out=code)
                torch.sub(code, grid.zero, out=error).mul_(grid.scale)
                torch.sub(column, error, out=error).div_(scales[i])
                if i + 1 < last:
                    part[i + 1 : last].addr_(inside[i, i + 1 : last], error, alpha=-1)
                    if self.shift is not None:
                        part[i + 1 : last].addr_(self.shift[start + i, start + i + 1 : start + last], column)
            self._spread(part, errors, start, first, last)
        self.codes[start:stop] = codes
        return errors

    def spread_errors(self, errors: Tensor, start: int, stop: int) -> None:
        """Change the columns behind a block to make up for its errors."""
        self._spread(self.columns[start:], errors, start, 0, stop - start)

    def _spread(self, part: Tensor, errors: Tensor, start: int, first: int, last: int) -> None:
        """Change the columns of a part from `last` on to make up for the errors of those from `first` to there."""
        if last < len(part):
            rows, behind = slice(start + first, start + last), slice(start + last, start + len(part))
            part[last:].addmm_(self.factor[rows, behind].T, errors[first:last], alpha=-1)
            if self.shift is not None:
                # Rounded columns still hold what they were before.
                part[last:].addmm_(self.shift[rows, behind].T, part[first:last])

    def finished(self, loss: Tensor) -> Rounded:
        groups, codes = torch.tensor(self.groups, device=self.codes.device), self.codes
        if self.order is not None:
            inverse = torch.argsort(self.order)
            groups, codes = groups[inverse], codes[inverse]
        scale, zero = (torch.stack([getattr(grid, name) for grid in self.grids], 1) for name in ("scale", "zero"))
        return Rounded(codes.T.contiguous(), Grid(scale, zero), groups, loss)
