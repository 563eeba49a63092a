"""Spreads the zeros of a pruning update over four increments, the least important ones first.

In between, the rest of the model learns to do without a quarter of them, then without half, before all are zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_compress.methods.weight_pruning.config import WeightPruningConfig
from hf_compress.methods.weight_pruning.patterns import HeadUnits
from hf_compress.methods.weight_pruning.prunable import PrunableWeight
from hf_compress.methods.weight_pruning.selection import smallest


INCREMENTS = 4
# A plan says of an element: 0 it stays, 1 it becomes zero, 2 it was zero and comes back at the end, 3 it stays zero.
_GOES, _RETURNS = 1, 2


def plan_of(before: Tensor | None, after: Tensor) -> Tensor:
    """Make the plan of a pruning update: what happens to each element.

    Args:
        before: Bool, True for zero, when the update is made; None: nothing is zero.
        after: The same when it is complete.

    Returns:
        uint8, of the same shape.
    """
    plan = after.to(torch.uint8)
    return plan if before is None else plan + 2 * before.to(torch.uint8)


def _element_scores(config: WeightPruningConfig, prunable: PrunableWeight, kept: Tensor, plan: Tensor) -> Tensor:
    """The score of its unit for each element, in the weight's shape."""
    pattern = prunable.pattern(config)
    assert not isinstance(pattern, HeadUnits), "the config allows no increments with heads"
    return prunable.like_weight(pattern.expand(kept.float(), prunable.matrix(plan).shape))


def masks_at(
    config: WeightPruningConfig,
    weights: Sequence[PrunableWeight],
    plans: Sequence[Tensor],
    scores: Sequence[Tensor],
    now: Sequence[Tensor | None],
    increment: int,
) -> list[Tensor]:
    """Which elements are zero after an increment.

    Args:
        config: Of the weights, which share one ranking whatever the scope.
        weights: Where a pruning update is under way.
        plans: For each weight, from `plan_of`.
        scores: For each weight, as `reduce` of its pattern gives them, now.
        now: For each weight, what is zero already; it stays so until the last increment.
        increment: From 1 to `INCREMENTS`.

    Returns:
        For each weight a bool tensor of its shape, True for zero.

    Source:
        Neural Compressor 2.6: of `n` elements that go, those no more important than the `floor(n increment / 4)`-th.

    Example:
        >>> import torch
        >>> weight = PrunableWeight("w", torch.nn.Parameter(torch.tensor([[4.0, 1.0, 3.0, 2.0]])))
        >>> plan = plan_of(None, torch.tensor([[True, True, True, True]]))
        >>> masks_at(WeightPruningConfig(pattern="1x1"), [weight], [plan], [weight.weight.detach()], [None], 2)
        [tensor([[False,  True, False,  True]])]
    """
    if increment >= INCREMENTS:
        return [plan % 2 == 1 for plan in plans]
    goes = [plan == _GOES for plan in plans]
    importance = [
        _element_scores(config, prunable, kept, plan)
        for prunable, kept, plan in zip(weights, scores, plans, strict=True)
    ]
    device = plans[0].device
    pool = torch.cat([values[new].to(device) for values, new in zip(importance, goes, strict=True)])
    count = len(pool) * increment // INCREMENTS
    bound = smallest(pool, count) if count else pool.new_tensor(-torch.inf)
    masks = []
    for plan, new, values, zero in zip(plans, goes, importance, now, strict=True):
        mask = (plan >= _RETURNS) | (new & (values <= bound.to(values.device)))
        masks.append(mask if zero is None else mask | zero)
    return masks
