"""Interpolative decompositions from second moments: columns that span a matrix, and coefficients for the others.

Columns are picked by pivoted Cholesky of `G = A^T A` (see `pivoting`). Its factor also gives most of the coefficients.

Letters: N rows (tokens), n columns (features), k kept columns, c sketch rows. All matrices are float64.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from hf_compress.core.moments import SecondMoments
from hf_compress.methods.structured_pruning.pivoting import PivotedColumns, pivoted_cholesky, pivoted_with_factor
from hf_compress.methods.structured_pruning.sketch import CountSketch


logger = logging.getLogger(__name__)

# Pivots below this ratio to the first one are decided by the rounding of a double-precision Gram matrix (measured:
# they first disagree with pivoted QR at 3e-7 to 5e-7).
_PIVOT_FLOOR = 1e-6
# Below this ratio of the smallest to the largest pivot, the coefficients are refined once.
_REFINE = 1e-3


def interpolation_matrix(gram: Tensor, keep: Tensor, ridge: float = 0.0, cross: Tensor | None = None) -> Tensor:
    """Compute the least-squares map T from kept columns to all columns: `A ~ A[:, keep] T`.

    Args:
        gram: [n, n] float64; only `gram[keep]` is read.
        keep: [k] int64.
        ridge: Regularisation as a fraction of the mean diagonal of the kept part.
        cross: [k, n] float64, `A[:, keep]^T A`, when the whole Gram matrix was never formed.

    Returns:
        [k, n] float64; `T[:, keep]` is exactly the identity when `ridge` is 0.

    Source:
        Flynn et al. 2024 (arXiv 2406.00061). This T also makes `W T^T` the least-squares fit of the next projection W.

    Example:
        >>> a = torch.tensor([[1.0, 2.0], [2.0, 4.0]], dtype=torch.float64)
        >>> interpolation_matrix(a.T @ a, torch.tensor([1])).tolist()
        [[0.5, 1.0]]
    """
    cross = gram[keep] if cross is None else cross
    if not len(keep):
        return cross
    inner = cross[:, keep]
    scale = float(inner.diagonal().mean())
    eye = torch.eye(len(keep), dtype=inner.dtype, device=inner.device)
    lower, failed = torch.linalg.cholesky_ex(inner + ridge * scale * eye)
    if int(failed) or float(lower.diagonal().min()) < 1e-7 * float(lower.diagonal().max()):
        # Dependent or dead columns among the kept ones: the minimum-norm solution gives them no weight.
        result: Tensor = torch.linalg.pinv(inner + ridge * scale * eye, rtol=1e-12, hermitian=True) @ cross
    else:
        result = torch.cholesky_solve(cross, lower)
        if float(lower.diagonal().min()) < _REFINE * float(lower.diagonal().max()):
            # Refined once, because the Gram matrix squared the condition number.
            result += torch.cholesky_solve(cross - (inner @ result + ridge * scale * result), lower)
    if ridge == 0:
        result[:, keep] = eye
    _check_size(result)
    return result


def _interpolation_from_factor(r: Tensor, order: Tensor, k: int) -> Tensor:
    """`interpolation_matrix` of the first k columns in pivot order; most of its work is already in the factor."""
    rest = torch.linalg.solve_triangular(r[:k, :k], r[:k, k:], upper=True)
    _check_size(rest)
    result = r.new_empty(k, len(order))
    result[:, order] = torch.cat([torch.eye(k, dtype=r.dtype), rest], 1)
    return result


def _check_size(coefficients: Tensor) -> None:
    largest = float(coefficients.abs().max()) if coefficients.numel() else 0.0
    if largest > 10:
        logger.warning(
            "Interpolation coefficients reach %.1f (healthy: up to 2); the kept columns are nearly dependent.", largest
        )


def check_conditioning(columns: PivotedColumns, keep: int) -> None:
    """Warn when some of the first `keep` pivots are too small for double-precision moments to rank."""
    first = float(columns.pivots[0]) if len(columns.pivots) else 0.0
    small = int((columns.pivots[:keep] < _PIVOT_FLOOR * first).sum())
    if small:
        logger.warning(
            "%d of the %d kept columns have pivots below %.0e of the first: their order is arbitrary "
            "(numerical rank %d).", small, keep, _PIVOT_FLOOR, columns.rank,
        )  # fmt: skip


def interpolative_decomposition(
    matrix: Tensor, k: int, *, sketch_rows: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor, PivotedColumns]:
    """Pick k columns of a matrix, and compute the coefficients that express all columns by them.

    Args:
        matrix: [N, n] any float dtype and device. Not changed.
        k: Columns to keep, at most the rank.
        sketch_rows: c; if given, pivots come from a CountSketch of the rows. The coefficients always come from the
            matrix itself: from a sketch their error can be several times larger.
        seed: Random seed of the sketch.

    Returns:
        Kept columns [k] int64 in pivot order, T [k, n] float64, and all columns in order.

    Raises:
        ValueError: If k is not in 1..n or there are fewer than k independent columns.

    Example:
        >>> a = torch.randn(20, 3) @ torch.randn(3, 6)
        >>> keep, t, _ = interpolative_decomposition(a, 3)
        >>> bool(torch.allclose(a[:, keep] @ t.float(), a, atol=1e-4))
        True
    """
    n = matrix.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"k must be in 1..{n}, got {k}.")
    gram = gram_of(matrix)
    if sketch_rows is None or sketch_rows >= len(matrix):
        columns, factor = pivoted_with_factor(gram, k)
    else:
        sketch = CountSketch(n, sketch_rows, seed, matrix.device)
        sketch.update(matrix)
        columns, factor = pivoted_cholesky(gram_of(sketch.rows), k), None
    if columns.rank < k:
        raise ValueError(f"k must be at most the number of independent columns ({columns.rank}), got {k}.")
    check_conditioning(columns, k)
    keep = columns.order[:k]
    if factor is not None and float(columns.pivots[k - 1]) >= _REFINE * float(columns.pivots[0]):
        return keep, _interpolation_from_factor(factor, columns.order, k), columns
    return keep, interpolation_matrix(gram, keep), columns


def gram_of(matrix: Tensor) -> Tensor:
    """Compute `A^T A` [n, n] in float64 from a matrix in any float dtype, without a float64 copy of the matrix."""
    moments = SecondMoments(matrix.shape[1], matrix.device)
    moments.update(matrix)
    return moments.gram
