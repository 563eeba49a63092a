"""Which units go: exactly as many as asked for, the least important ones, within bounds for each layer.

Letters: U units of a layer, K units to prune over all layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def floor_count(number: int, fraction: float) -> int:
    """`number * fraction` rounded down, where a product that misses a whole number by rounding counts as that.

    Example:
        >>> floor_count(100, 0.29), int(100 * 0.29)
        (29, 28)
    """
    return math.floor(number * fraction + 1e-6)


def _lowest(scores: Tensor, pruned: Tensor, place: Tensor, count: int) -> Tensor:
    """[U] bool, exactly `count` lowest scores; at ties first what is pruned already, then by `place`."""
    if count <= 0:
        return torch.zeros_like(pruned)
    if count >= len(scores):
        return torch.ones_like(pruned)
    threshold = scores.kthvalue(count).values
    chosen = scores < threshold
    ties = (scores == threshold).nonzero().flatten()
    order = torch.argsort(place[ties], stable=True)
    order = order[torch.argsort((~pruned[ties][order]).to(torch.uint8), stable=True)]
    chosen[ties[order[: count - int(chosen.sum())]]] = True
    return chosen


def _places(scores: Tensor) -> Tensor:
    """[U] position within the layer, in (0, 1): equal scores of several layers are pruned in equal shares."""
    return (torch.arange(len(scores), device=scores.device, dtype=torch.float64) + 0.5) / len(scores)


def select_units(
    scores: Sequence[Tensor],
    pruned: Sequence[Tensor],
    count: int,
    lower: Sequence[int],
    upper: Sequence[int],
) -> list[Tensor]:
    """The `count` least important units of all layers together.

    Args:
        scores: For each layer [U], finite.
        pruned: For each layer [U] bool, what is pruned now; decides ties.
        count: K, at least the sum of `lower` and at most the sum of `upper`.
        lower, upper: Units that each layer loses at least and at most.

    Returns:
        For each layer [U] bool, True for what goes.

    Source:
        Pruning the lowest within bounds on each part is a greedy choice in a matroid, hence of least total score.

    Example:
        >>> none = torch.zeros(2, dtype=torch.bool)
        >>> select_units([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])], [none, none], 2, [0, 0], [1, 2])
        [tensor([ True, False]), tensor([ True, False])]
    """
    places = [_places(layer) for layer in scores]
    sizes = [len(layer) for layer in scores]
    gone, place = torch.cat(list(pruned)), torch.cat(places)
    chosen = list(_lowest(torch.cat(list(scores)), gone, place, count).split(sizes))
    counts = [int(layer.sum()) for layer in chosen]
    if all(low <= number <= high for low, number, high in zip(lower, counts, upper, strict=True)):
        return chosen
    bounded = []
    for index, layer in enumerate(scores):
        forced = _lowest(layer, pruned[index], places[index], lower[index])
        allowed = _lowest(layer, pruned[index], places[index], upper[index])
        bounded.append(layer.masked_fill(forced, float("-inf")).masked_fill(~allowed, float("inf")))
    return list(_lowest(torch.cat(bounded), gone, place, count).split(sizes))
