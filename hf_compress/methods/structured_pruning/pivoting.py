"""Orders columns by second moments: single columns by pivots, units of several columns, or a given order.

Pivoted Cholesky of `G = A^T A` picks the same columns as column-pivoted QR of A and costs `n^3/3` in matrix products
instead of `2 N n^2` in matrix-vector products. There are two implementations: LAPACK's on the CPU, and one in torch
for other devices.

Letters: N rows (tokens), n columns (features), k kept columns. All matrices are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.linalg.lapack import dpstrf
from torch import Tensor


_PANEL = 64


@dataclass(frozen=True)
class PivotedColumns:
    """Columns in order of importance.

    Args:
        order: [n] int64, most important first.
        residual: [n + 1] float64; entry k is the squared Frobenius norm of what the first k columns leave unexplained.
        pivots: [n] float64, `|R_jj|` of the equivalent pivoted QR; 0 beyond the rank.
        rank: Number of numerically independent columns.
    """

    order: Tensor
    residual: Tensor
    pivots: Tensor
    rank: int


def pivoted_cholesky(gram: Tensor, max_rank: int | None = None) -> PivotedColumns:
    """Order the columns of A by diagonal pivoting on its Gram matrix.

    Args:
        gram: [n, n] float64, symmetric positive semi-definite. Not changed.
        max_rank: How many pivots are needed; None: all. The CPU finds all of them anyway; an accelerator stops there
            and orders the other columns by their remaining norm.

    Raises:
        ValueError: If the matrix is not square or not finite.

    Source:
        Higham 2002, Accuracy and Stability of Numerical Algorithms, section 10.3.

    Example:
        >>> a = torch.tensor([[3.0, 0.0, 3.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
        >>> pivoted_cholesky(a.T @ a).order.tolist()
        [2, 1, 0]
    """
    return pivoted_with_factor(gram, max_rank)[0]


def pivoted_with_factor(gram: Tensor, max_rank: int | None = None) -> tuple[PivotedColumns, Tensor | None]:
    """The columns in order and, on the CPU, the factor R [rank, n] of the pivoted QR of A (up to signs)."""
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"gram must be a square matrix, got shape {tuple(gram.shape)}.")
    _require_finite(gram)
    if gram.device.type == "cpu":
        return _pivoted_by_lapack(gram)
    return pivoted_by_panels(gram, max_rank), None


def _require_finite(gram: Tensor) -> None:
    # NaN and infinity survive a sum, and a sum needs no second matrix.
    if not torch.isfinite(gram.sum()):
        raise ValueError("gram must be finite: the layer inputs hold NaN or infinity.")


def _smallest_pivot(gram: Tensor) -> float:
    """The squared norm above which the remainder of a column counts as independent of the other columns."""
    largest = float(gram.diagonal().max().clamp(min=0)) if len(gram) else 0.0
    return len(gram) * torch.finfo(torch.float64).eps * largest


def _pivoted_by_lapack(gram: Tensor) -> tuple[PivotedColumns, Tensor]:
    # LAPACK stores by columns. The transposed view is the same symmetric matrix in that order without a copy, and its
    # lower factor, transposed back, is R by rows. LAPACK's default tolerance is half of the one here.
    by_columns = gram.detach().double().numpy().T
    factor, order, rank, _ = dpstrf(by_columns, tol=_smallest_pivot(gram), lower=1)
    r = torch.from_numpy(factor.T)[:rank].triu_()
    # Row j of R is what column j explains of every column: after k of them, the rows from k on are unexplained.
    explained = r.new_zeros(len(gram) + 1)
    explained[:rank] = torch.linalg.vector_norm(r, dim=1).square()
    residual = explained.flip(0).cumsum(0).flip(0)
    pivots = r.new_zeros(len(gram))
    pivots[:rank] = r.diagonal()
    return PivotedColumns(torch.from_numpy(order).long() - 1, residual, pivots, rank), r


def pivoted_by_panels(gram: Tensor, max_rank: int | None = None) -> PivotedColumns:
    """`pivoted_cholesky` in torch, for devices other than the CPU.

    Right-looking and blocked: within a panel of columns only matrix-vector products with the panel are needed, then
    one matrix product updates the remaining columns, which become fewer with every panel.
    """
    n = gram.shape[0]
    max_rank = n if max_rank is None else min(max_rank, n)
    rest = gram.to(torch.float64).clone()
    floor = _smallest_pivot(gram)
    ids = torch.arange(n, device=gram.device)
    diagonal = rest.diagonal().clone()
    taken = torch.zeros(n, dtype=torch.bool, device=gram.device)
    order: list[int] = []
    pivots: list[float] = []
    residual = [diagonal.clamp(min=0).sum()]
    exhausted = n == 0
    while len(order) < max_rank and not exhausted:
        steps = min(_PANEL, max_rank - len(order))
        panel = rest.new_zeros(steps, len(ids))
        used = 0
        for used in range(steps):
            best = int(diagonal.argmax())
            value = float(diagonal[best])
            if value <= floor:
                exhausted = True
                break
            column = panel[used]
            torch.addmv(rest[best], panel[:used].T, panel[:used, best], alpha=-1, out=column)
            column *= value**-0.5
            diagonal.addcmul_(column, column, value=-1)
            # Taken columns stay at minus infinity, so neither the search nor the profile sees them.
            diagonal[best] = -torch.inf
            taken[best] = True
            order.append(int(ids[best]))
            pivots.append(value**0.5)
            residual.append(diagonal.clamp(min=0).sum())
        else:
            used = steps
        if exhausted or len(order) == max_rank:
            break
        rest.addmm_(panel[:used].T, panel[:used], alpha=-1)
        if int(taken.sum()) * 4 >= len(ids):
            # Dropping taken columns costs a copy, which pays once they are a quarter of the matrix.
            kept = (~taken).nonzero().flatten()
            rest, ids, taken = rest[kept][:, kept], ids[kept], taken[kept]
        diagonal = torch.where(taken, -torch.inf, rest.diagonal())
    rank = len(order)
    ids, diagonal = ids[~taken], diagonal[~taken]
    by_norm = torch.argsort(diagonal, descending=True, stable=True)
    complete = torch.cat([torch.tensor(order, dtype=torch.int64, device=ids.device), ids[by_norm]])
    tail_energy = diagonal[by_norm].clamp(min=0).flip(0).cumsum(0).flip(0)
    profile = torch.stack([r.cpu() for r in residual])
    if rank < n:
        profile = torch.cat([profile, tail_energy[1:].cpu(), profile.new_zeros(1)])
        if exhausted:
            profile[rank:] = 0.0
    padded = torch.tensor(pivots + [0.0] * (n - rank), dtype=torch.float64)
    return PivotedColumns(complete, profile.cummin(0).values, padded, rank)


def residual_along(gram: Tensor, groups: Sequence[Tensor]) -> Tensor:
    """Compute the energy that is unexplained after each group of columns, kept one after the other in the given order.

    Args:
        gram: [n, n] float64.
        groups: Index tensors that together hold every column once.

    Returns:
        [len(groups) + 1] float64, squared Frobenius norms, non-increasing.
    """
    order = torch.cat(list(groups)).to(gram.device)
    ordered = gram[order][:, order]
    # The factor of the ordered matrix carries the whole profile: column j of L explains its own squared norm.
    lower = torch.linalg.cholesky(ordered + _jitter(ordered))
    explained = lower.square().sum(0).cpu()
    ends = torch.tensor([len(g) for g in groups]).cumsum(0)
    total = explained.cumsum(0)
    kept = torch.cat([total.new_zeros(1), total[ends - 1]])
    unexplained: Tensor = (total[-1] - kept).clamp(min=0)
    return unexplained


def _jitter(matrix: Tensor) -> Tensor:
    mean = float(matrix.diagonal().mean()) or 1.0
    return torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device) * (1e-10 * mean)


def pivoted_units(gram: Tensor, size: int) -> tuple[list[int], Tensor]:
    """Order units of neighbouring columns (attention heads) by pivoted elimination.

    The unit with the largest remaining energy is taken next; directions inside a unit whose energy is below
    1e-10 of the largest diagonal entry are dropped before it is eliminated.

    Args:
        gram: [H size, H size] float64.
        size: Columns in a unit.

    Returns:
        The indices of the units, and [H + 1] float64 residual traces.

    Raises:
        ValueError: If the matrix is not finite.

    Source:
        Block-pivoted Cholesky. The rule of Flynn et al. 2024 (arXiv 2406.00061) for heads is not known.
    """
    _require_finite(gram)
    rest = gram.to(torch.float64).clone()
    num_units = rest.shape[0] // size
    floor = 1e-10 * float(gram.diagonal().max())
    remaining = list(range(num_units))
    order: list[int] = []
    residual = [rest.diagonal().clamp(min=0).sum().cpu()]
    while remaining:
        energy = rest.diagonal().reshape(num_units, size).sum(1)
        best = max(remaining, key=lambda unit: (float(energy[unit]), -unit))
        inside = slice(best * size, (best + 1) * size)
        values, vectors = torch.linalg.eigh(rest[inside, inside])
        strong = values > floor
        factor = (rest[:, inside] @ vectors[:, strong]) * values[strong].rsqrt()
        rest.addmm_(factor, factor.T, alpha=-1)
        remaining.remove(best)
        order.append(best)
        unexplained = rest.diagonal().reshape(num_units, size)[remaining]
        residual.append(unexplained.clamp(min=0).sum().cpu())
    return order, torch.stack(residual).cummin(0).values
