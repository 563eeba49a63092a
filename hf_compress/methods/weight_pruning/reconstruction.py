"""Prunes a matrix and adjusts the remaining weights, so that its products with known inputs change little.

Columns are treated from left to right. Removing a weight changes those to its right by the optimal brain surgeon's
rule; one triangular factor holds the inverse matrices of all columns.

Letters: R outputs (rows), C inputs (columns), N rows of inputs X, U units.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_compress.methods.weight_pruning.patterns import MatrixPattern, NMPattern
from hf_compress.methods.weight_pruning.selection import select_units


# Added to the diagonal, as a fraction of its mean. As published.
DAMPING = 0.01
# Columns whose units are chosen together and whose changes reach the columns behind them in one product. As published.
COLUMNS = 128


def inverse_factor(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """The upper triangular U with `U^T U` the inverse of the damped Gram matrix.

    Args:
        gram: [C, C] `X^T X`, of any scale.
        damping: Added to the diagonal, as a fraction of its mean.

    Returns:
        [C, C] in the dtype of `gram`. Inputs that are always zero need no special care: only the damping is left
        there, which makes their weights cheap to remove and changes no others.

    Source:
        Frantar and Alistarh 2023 (arXiv 2301.00774), section 3.3. The original inverts between two factorisations;
        factorising from the last column backwards gives the same U by one triangular inverse.

    Example:
        >>> inverse_factor(torch.diag(torch.tensor([4.0, 16.0])), damping=0.0).diagonal()
        tensor([0.5000, 0.2500])
    """
    # Where all inputs are zero, any positive diagonal will do: it makes this pruning by magnitude.
    ridge = damping * float(gram.diagonal().mean()) or (1.0 if not gram.any() else 0.0)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    backwards = torch.linalg.cholesky((gram + ridge * identity).flip(0, 1))
    factor: Tensor = torch.linalg.solve_triangular(backwards.flip(0, 1), identity, upper=True)
    return factor


def _num_units(pattern: MatrixPattern, rows: int, columns: int, device: torch.device) -> int:
    return len(pattern.pruned_units(torch.zeros(rows, columns, dtype=torch.bool, device=device)))


def _chosen(pattern: MatrixPattern, scores: Tensor, count: int, reduction: str) -> Tensor:
    """[U] bool, the `count` units of some columns with the lowest scores."""
    nothing = torch.zeros_like(scores, dtype=torch.bool)
    values = pattern.unit_scores(pattern.reduce(scores, reduction), nothing, reduction)
    (units,) = select_units([values], [torch.zeros_like(values, dtype=torch.bool)], count, [0], [len(values)])
    return units


def prune_and_reconstruct(
    weight: Tensor, factor: Tensor, pattern: MatrixPattern, count: int, reduction: str = "mean", columns: int = COLUMNS
) -> Tensor:
    """Prune exactly `count` units of a matrix and change the other weights to make up for them.

    Columns are treated in panels. Every panel loses an equal share of the units, chosen from the weights as they are
    by then; which elements of an N:M group go is decided when its first column is reached.

    Args:
        weight: [R, C], not changed.
        factor: [C, C] of `inverse_factor`.
        pattern: `N:M`, or blocks of one column.
        count: Units to prune.
        reduction: How scores of a unit become one, as in `WeightPruningConfig`.
        columns: Width of a panel; rounded to whole N:M groups.

    Returns:
        [R, C] in the dtype of `weight`, computed in at least single precision.

    Source:
        Frantar and Alistarh 2023 (arXiv 2301.00774), algorithm 1. The shares of the panels add up to `count`;
        the original's threshold takes one unit more in each.
    """
    group = pattern.group if isinstance(pattern, NMPattern) else 1
    width = max(columns // group, 1) * group
    # Columns of the weight lie in rows here: the inner loop runs over contiguous memory.
    work = weight.T.to(torch.promote_types(weight.dtype, torch.float32), copy=True).contiguous()
    factor = factor.to(work)
    scale = factor.diagonal()[:, None]
    num_columns, num_rows = work.shape
    total = _num_units(pattern, num_rows, num_columns, work.device)
    seen = 0
    for start in range(0, num_columns, width):
        stop = min(start + width, num_columns)
        part = work[start:stop]
        here = _num_units(pattern, num_rows, stop - start, work.device)
        share = count * (seen + here) // total - count * seen // total
        seen += here
        units = _chosen(pattern, (part / scale[start:stop]).square_().T, share, reduction)
        errors = torch.zeros_like(part)
        step = group if isinstance(pattern, NMPattern) else stop - start
        for left in range(0, stop - start, step):
            right = min(left + step, stop - start)
            inside = slice(start + left, start + right)
            if isinstance(pattern, NMPattern):
                # The weights have changed since the panel began.
                scores = (work[inside] / scale[inside]).square_().T
                picked = units.view(num_rows, -1)[:, left // step]
            else:
                scores, picked = work[inside].T, units
            nothing = torch.zeros_like(scores, dtype=torch.bool)
            mask = pattern.spread(picked, scores, nothing).T.contiguous()
            for column in range(left, right):
                gone = mask[column - left]
                torch.mul(part[column], gone, out=errors[column]).div_(scale[start + column])
                part[column:].addr_(factor[start + column, start + column : stop], errors[column], alpha=-1)
            part[left:right].masked_fill_(mask, 0)
        work[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return work.T.to(weight.dtype).contiguous()
