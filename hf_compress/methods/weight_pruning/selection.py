"""Chooses the units to prune: exactly the requested number, the least important ones, within bounds for each weight.

Letters: U units of a weight, K units to prune over all weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def floor_count(number: int, fraction: float) -> int:
    """`number * fraction` rounded down, where a product that misses a whole number by rounding counts as that.

    Example:
        >>> floor_count(100, 0.29), int(100 * 0.29)
        (29, 28)
    """
    return math.floor(number * fraction + 1e-6)


def _relative_positions(indices: Tensor, sizes: Sequence[int]) -> Tensor:
    """Position within its weight, in (0, 1), of each index into the units of all weights together."""
    size = torch.tensor(sizes, device=indices.device)
    ends = size.cumsum(0)
    owner = torch.searchsorted(ends, indices, right=True)
    return (indices - (ends - size)[owner] + 0.5).double() / size[owner]


def smallest(scores: Tensor, count: int) -> Tensor:
    """The `count`-th smallest of many float32 values."""
    if scores.device.type != "cpu":
        # `kthvalue` is refused on CUDA under deterministic algorithms.
        return scores.sort().values[count - 1]
    # Ten times as fast as `kthvalue` for a million values, and a hundred times as fast as sorting.
    return torch.from_numpy(np.partition(scores.numpy(), count - 1))[count - 1]


def _lowest(scores: Tensor, pruned: Tensor, sizes: Sequence[int], count: int) -> Tensor:
    """[U] bool, exactly `count` lowest scores of weights with these numbers of units.

    At equal scores, units that are pruned already go first, then those of all weights in equal shares.
    """
    if count <= 0:
        return torch.zeros_like(pruned)
    if count >= len(scores):
        return torch.ones_like(pruned)
    threshold = smallest(scores, count)
    chosen = scores < threshold
    ties = (scores == threshold).nonzero().flatten()
    order = torch.argsort(_relative_positions(ties, sizes), stable=True)
    order = order[torch.argsort((~pruned[ties][order]).to(torch.uint8), stable=True)]
    chosen[ties[order[: count - int(chosen.sum())]]] = True
    return chosen


def select_units(
    scores: Sequence[Tensor],
    pruned: Sequence[Tensor],
    count: int,
    lower: Sequence[int],
    upper: Sequence[int],
    final: int | None = None,
) -> list[Tensor]:
    """The `count` least important units of all weights together.

    Args:
        scores: For each weight [U], finite.
        pruned: For each weight [U] bool, what is pruned now; decides ties.
        count: K, at most `final`.
        lower, upper: Units that each weight loses at least and at most in the end.
        final: Units that are pruned in the end, at least the sum of `lower` and at most the sum of `upper`; what goes
            now leaves enough of them to bring every weight to its `lower`. None: `count`.

    Returns:
        For each weight [U] bool, True for what goes.

    Source:
        Sets that can grow to `final` units within bounds on each part are the independent sets of a matroid, so taking
        the lowest score that may still go, again and again, gives the least total score.

    Example:
        >>> none = torch.zeros(2, dtype=torch.bool)
        >>> select_units([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])], [none, none], 2, [0, 0], [1, 2])
        [tensor([ True, False]), tensor([ True, False])]
    """
    sizes, final = [len(values) for values in scores], count if final is None else final
    together, gone = torch.cat(list(scores)), torch.cat(list(pruned))
    chosen = list(torch.split(_lowest(together, gone, sizes, count), sizes))
    counts = [int(units.sum()) for units in chosen]
    within = all(number <= high for number, high in zip(counts, upper, strict=True))
    if within and sum(max(low, number) for low, number in zip(lower, counts, strict=True)) <= final:
        return chosen
    bounded = []
    for values, before, size, low, high in zip(scores, pruned, sizes, lower, upper, strict=True):
        forced, allowed = (_lowest(values, before, [size], number) for number in (low, high))
        bounded.append(values.masked_fill(forced, float("-inf")).masked_fill(~allowed, float("inf")))
    # The first choices on the way to `final` units are the lowest scores among those.
    in_the_end = _lowest(torch.cat(bounded), gone, sizes, final)
    return list(torch.split(_lowest(together.masked_fill(~in_the_end, float("inf")), gone, sizes, count), sizes))
