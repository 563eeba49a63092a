"""How well a model finds the text that belongs to a query, and how well sentence vectors find it among all texts.

Letters: B queries, N texts, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from hf_compress.tasks.answers import Answers
from hf_compress.tasks.metrics import Array


# Queries that are compared with all texts at once.
_QUERIES = 512


def ranks_of(queries: Array, texts: Array, wanted: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Count the texts that are nearer to each query than the one that belongs to it.

    Args:
        queries: [B, D], of length 1.
        texts: [N, D], of length 1.
        wanted: [B] in 0..N-1, the text of each query.

    Returns:
        [B] in 0..N-1. As near as the wanted one, but not nearer, does not count.

    Example:
        >>> ranks_of(np.eye(2), np.array([[0.6, 0.8], [1.0, 0.0]]), np.array([0, 0])).tolist()
        [1, 0]
    """
    found = []
    for start in range(0, len(queries), _QUERIES):
        part = slice(start, start + _QUERIES)
        cosines = queries[part] @ texts.T
        right = np.take_along_axis(cosines, wanted[part, None], axis=1)
        found.append((cosines > right).sum(1))
    return np.concatenate(found)


@dataclass(frozen=True)
class RetrievalAnswers(Answers):
    """Where the text of each query stands among those it is compared with.

    Args:
        ranks: [B], 0 for the first.
        share: How the share of queries is called whose text is among the first.
    """

    ranks: npt.NDArray[np.int64]
    share: str = "recall"

    def __len__(self) -> int:
        return len(self.ranks)

    def metrics(self) -> dict[str, float]:
        """The share of queries whose text is the first and among the first ten, and the mean reciprocal rank."""
        return {
            f"{self.share}_at_1": float((self.ranks == 0).mean()),
            f"{self.share}_at_10": float((self.ranks < 10).mean()),
            "mrr": float((1 / (1 + self.ranks)).mean()),
        }

    def at(self, examples: npt.NDArray[np.int64]) -> RetrievalAnswers:
        return replace(self, ranks=self.ranks[examples])
