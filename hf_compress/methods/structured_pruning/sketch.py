"""A random projection of rows, for layers whose second moments do not fit into memory.

Letters: n columns (features), c sketch rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


class CountSketch:
    """A running random projection of rows: each row is added with a random sign to one of c rows.

    `E[(SA)^T (SA)] = A^T A`, at one addition for each entry of A.

    Args:
        width: n.
        rows: c.
        seed: Random seed of rows and signs. The same batches in the same order give the same sketch.
        device: Where the sketch is kept.

    Source:
        Clarkson and Woodruff 2013 (arXiv 1207.6365).
    """

    def __init__(self, width: int, rows: int, seed: int, device: torch.device | str = "cpu") -> None:
        self.rows = torch.zeros(rows, width, dtype=torch.float64, device=device)
        self.generator = torch.Generator().manual_seed(seed)
        self.num_rows = 0

    def update(self, batch: Tensor) -> None:
        count = len(batch)
        target = torch.randint(len(self.rows), (count,), generator=self.generator).to(batch.device)
        sign = torch.randint(2, (count, 1), generator=self.generator).to(batch.device) * 2.0 - 1.0
        self.rows.index_add_(0, target.to(self.rows.device), (batch * sign).to(self.rows))
        self.num_rows += count
