"""Picks the columns that a linear map keeps by removing, again and again, those whose loss hurts its output least.

Letters: n columns, D outputs, k kept columns, b columns in a unit. All matrices are float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_compress.core.surgery import unit_columns


# Share of the single columns left that goes at once: its removal changes the ranking of the others little.
_SHARE = 1 / 24
# Added to the diagonal, as a fraction of its mean: dependent columns would have no inverse.
_DAMPING = 1e-3


def eliminated_last(gram: Tensor, cross: Tensor, keep: int, size: int = 1) -> list[int]:
    """Order units of columns by backward elimination from a least-squares fit.

    The fit of targets Y to columns A is `B = (A^T A)^-1 A^T Y`. Removing unit u, and fitting the others anew, raises
    the squared error by `tr(B_u^T (H_uu)^-1 B_u)`, where H is the inverse of the Gram matrix of the columns that are
    left. The unit with the smallest rise goes; H and B follow by one step of block elimination. Heads go one by one,
    single columns a twenty-fourth of those left at a time.

    Args:
        gram: [n, n] `A^T A`. Not changed.
        cross: [n, D] `A^T Y`. Not changed.
        keep: How many units stay. All units are ordered, but those that stay not among themselves.
        size: b, neighbouring columns in a unit.

    Returns:
        All units: those that stay in ascending order, then the others, the last one removed first.

    Raises:
        ValueError: If the moments are not finite.

    Source:
        Optimal brain surgeon (Hassibi and Stork 1993) on the moments of a layer's input, as in Meng et al. 2024
        (OSSCAR, ICML), without its exchanges. Removing several columns at once is ours.

    Example:
        >>> a, weight = torch.eye(3, dtype=torch.float64), torch.tensor([[2.0], [0.1], [1.0]], dtype=torch.float64)
        >>> eliminated_last(a.T @ a, a.T @ (a @ weight), 2)
        [0, 2, 1]
    """
    if not (torch.isfinite(gram.sum()) and torch.isfinite(cross.sum())):
        raise ValueError("The moments must be finite: the layer inputs or the targets hold NaN or infinity.")
    mean = float(gram.diagonal().mean()) or 1.0
    inverse = torch.linalg.inv(gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * (_DAMPING * mean))
    fit = inverse @ cross
    left = list(range(len(gram) // size))
    removed: list[int] = []
    while len(left) > keep:
        rises = _rises(inverse, fit, size)
        number = 1 if size > 1 else min(max(1, int(len(left) * _SHARE)), len(left) - keep)
        going = torch.argsort(rises, stable=True)[:number].tolist()
        removed += [left[place] for place in going]
        gone = set(going)
        staying = [place for place in range(len(left)) if place not in gone]
        out, stay = (unit_columns(places, size).to(gram.device) for places in (going, staying))
        block = torch.linalg.solve(inverse[out][:, out], torch.cat([inverse[out][:, stay], fit[out]], 1))
        through = inverse[stay][:, out]
        fit = fit[stay] - through @ block[:, len(stay) :]
        inverse = inverse[stay][:, stay] - through @ block[:, : len(stay)]
        left = [left[place] for place in staying]
    return left + removed[::-1]


def _rises(inverse: Tensor, fit: Tensor, size: int) -> Tensor:
    """[units]: how much the squared error rises when each unit goes."""
    if size == 1:
        return fit.square().sum(1) / inverse.diagonal()
    units = len(fit) // size
    own = torch.stack([inverse[u * size : (u + 1) * size, u * size : (u + 1) * size] for u in range(units)])
    parts = fit.reshape(units, size, -1)
    rises: Tensor = (parts * torch.linalg.solve(own, parts)).sum((1, 2))
    return rises
