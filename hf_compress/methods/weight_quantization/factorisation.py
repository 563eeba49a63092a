"""The triangular factor of the inverse of a positive definite matrix, by products of blocks.

On processors, matrix products run several times as fast as the factorisations of linear algebra packages.

Letters: C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor


# Columns of a block: what is factorised in one piece.
_BLOCK = 128


def inverse_factor(matrix: Tensor) -> Tensor:
    """The upper triangular U with `U^T U` the inverse of a positive definite matrix.

    It is the inverse of the factor that begins with the last column: one factorisation and one triangular inverse,
    where the inverse itself and another factorisation of it would round more often.

    Args:
        matrix: [C, C] symmetric.

    Returns:
        [C, C] in its dtype, contiguous.

    Raises:
        RuntimeError: If the matrix is not positive definite (`torch.linalg.LinAlgError`).

    Example:
        >>> inverse_factor(torch.diag(torch.tensor([4.0, 16.0])))
        tensor([[0.5000, 0.0000],
                [0.0000, 0.2500]])
    """
    return _inverse_of_lower(_cholesky(matrix.flip(0, 1))).flip(0, 1).contiguous()


def _cholesky(matrix: Tensor) -> Tensor:
    """The lower triangular L with `L L^T` the matrix."""
    factor, columns = torch.zeros_like(matrix), len(matrix)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        panel = torch.addmm(matrix[start:, start:stop], factor[start:, :start], factor[start:stop, :start].T, alpha=-1)
        corner: Tensor = torch.linalg.cholesky(panel[: stop - start])
        factor[start:stop, start:stop] = corner
        below = panel[stop - start :].T
        factor[stop:, start:stop] = torch.linalg.solve_triangular(corner, below, upper=False).T
    return factor


def _inverse_of_lower(factor: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix, from those of its halves."""
    columns = len(factor)
    if columns <= _BLOCK:
        identity = torch.eye(columns, dtype=factor.dtype, device=factor.device)
        small: Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
        return small
    half = columns // 2
    first, last = _inverse_of_lower(factor[:half, :half]), _inverse_of_lower(factor[half:, half:])
    inverse = torch.zeros_like(factor)
    inverse[:half, :half], inverse[half:, half:] = first, last
    inverse[half:, :half] = -(last @ (factor[half:, :half] @ first))
    return inverse
