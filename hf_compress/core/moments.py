"""Accumulates second moments of rows in double precision.

Letters: N rows, F their width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from scipy.linalg.blas import dsyrk
from torch import Tensor


# Rows in double precision at a time: enough for matrix products near the machine's peak, few enough for its caches.
_ROWS = 1024
# Columns in one part of the symmetric product: smaller parts waste less, larger ones run nearer to the peak.
_COLUMNS = 384


def _in_double(rows: Tensor) -> Iterator[Tensor]:
    """Yield the rows in double precision, in chunks of bounded size; each chunk overwrites the one before it.

    A copy of everything would be the largest tensor of the whole run, and fresh memory for every chunk costs as much
    time as the conversion.
    """
    buffer = torch.empty(min(_ROWS, len(rows)), rows.shape[1], dtype=torch.float64, device=rows.device)
    for chunk in torch.split(rows, _ROWS):
        yield buffer[: len(chunk)].copy_(chunk)


def add_gram_(gram: Tensor, rows: Tensor) -> None:
    """Add `rows.T @ rows` to the upper triangle of `gram`; the entries below it are undefined afterwards.

    Args:
        gram: [F, F] float64, contiguous.
        rows: [N, F] float64, on the same device.
    """
    if gram.device.type == "cpu":
        # The symmetric product of BLAS, which torch does not offer, computes only the half that is needed. BLAS stores
        # by columns: to it, both arrays are the transposes of what they are here, and upper is lower.
        dsyrk(1.0, rows.numpy().T, beta=1.0, c=gram.numpy().T, lower=1, overwrite_c=1)
    else:
        add_gram_in_parts_(gram, rows)


def add_gram_in_parts_(gram: Tensor, rows: Tensor) -> None:
    """`add_gram_` by general matrix products, for devices other than the CPU."""
    for start in range(0, gram.shape[0], _COLUMNS):
        part = slice(start, start + _COLUMNS)
        gram[part, start:].addmm_(rows[:, part].T, rows[:, start:])


def mirror_upper_(matrix: Tensor) -> None:
    """Write the entries above the diagonal of a square matrix below it.

    Example:
        >>> matrix = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
        >>> mirror_upper_(matrix)
        >>> matrix.tolist()
        [[1.0, 2.0], [2.0, 3.0]]
    """
    for start in range(0, len(matrix), _COLUMNS):
        part = slice(start, start + _COLUMNS)
        block = matrix[part, part]
        block.copy_(block.triu() + block.triu(1).T)
        matrix[part, :start] = matrix[:start, part].T


def device_of_doubles(device: torch.device | str) -> torch.device:
    """The device itself, or the CPU if the device has no double precision."""
    return torch.device("cpu") if torch.device(device).type == "mps" else torch.device(device)


class SecondMoments:
    """The sum of outer products, the sum and the number of the rows so far.

    Args:
        width: F.
        device: Where to accumulate; devices without float64 are replaced by the CPU.

    Example:
        >>> moments = SecondMoments(2)
        >>> moments.update(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> moments.gram.tolist()
        [[10.0, 14.0], [14.0, 20.0]]
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        device = device_of_doubles(device)
        self._upper = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.total = torch.zeros(width, dtype=torch.float64, device=device)
        self._rows = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, rows: Tensor) -> None:
        for chunk in _in_double(rows.detach().to(self._upper.device)):
            if chunk.shape[1]:
                add_gram_(self._upper, chunk)
            self.total += chunk.sum(0)
            self._rows += len(chunk)

    def sums(self) -> Iterable[Tensor]:
        return [self._upper, self.total, self._rows]

    @property
    def num_rows(self) -> int:
        return int(self._rows)

    @property
    def gram(self) -> Tensor:
        """[F, F] float64, `X^T X`: not a copy, so it must not be changed and is valid until further rows come."""
        # Copies of it would be the largest tensors of a whole run.
        mirror_upper_(self._upper)
        return self._upper

    def centred_gram(self) -> Tensor:
        """[F, F] float64, the Gram matrix of the rows minus their mean."""
        return self.gram - torch.outer(self.total, self.total) / self.num_rows

    @property
    def mean(self) -> Tensor:
        return self.total / self.num_rows


class PairedMoments:
    """Second moments of a module's inputs, and their products with the inputs of its twin in another model.

    Args:
        dense_width: E, columns of the other model's rows.
        width: F, columns of the module's own rows.
        device: Where to accumulate; devices without float64 are replaced by the CPU.

    Example:
        >>> moments = PairedMoments(1, 2)
        >>> moments.update(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 0.0], [4.0, 5.0]]))
        >>> moments.cross.tolist(), moments.own.gram.tolist()
        ([[11.0, 10.0]], [[25.0, 20.0], [20.0, 25.0]])
    """

    def __init__(self, dense_width: int, width: int, device: torch.device | str = "cpu") -> None:
        self.own = SecondMoments(width, device)
        device = self.own.total.device
        self._cross = torch.zeros(dense_width, width, dtype=torch.float64, device=device)
        # The squared norm of the other model's rows.
        self.dense_energy = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, dense_rows: Tensor, rows: Tensor) -> None:
        """Add rows of both models.

        Args:
            dense_rows: [N, E], rows of the other model.
            rows: [N, F], rows of the same tokens.

        Raises:
            ValueError: If the numbers of rows differ.
        """
        if len(dense_rows) != len(rows):
            raise ValueError(
                f"The two models must be fed the same tokens, got {len(dense_rows)} and {len(rows)} rows."
            )
        self.own.update(rows)
        pairs = zip(*(_in_double(part.detach().to(self._cross.device)) for part in (dense_rows, rows)), strict=True)
        for dense_chunk, chunk in pairs:
            self._cross.addmm_(dense_chunk.T, chunk)
            self.dense_energy += dense_chunk.square().sum()

    def sums(self) -> Iterable[Tensor]:
        return [*self.own.sums(), self._cross, self.dense_energy]

    @property
    def cross(self) -> Tensor:
        """[E, F] float64, `X_dense^T X`."""
        return self._cross
