"""Zeros of one update that come in four stages: the least important of the new ones first.

Between two updates weights that are about to go can still be missed less: the rest of the model learns without a
quarter of them, then without half, before all are gone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_compress.methods.weight_pruning.config import WeightPruningConfig
from hf_compress.methods.weight_pruning.groups import PrunableWeight
from hf_compress.methods.weight_pruning.selection import smallest


STAGES = 4
# A plan says of a weight: 0 it stays, 1 it becomes zero, 2 it was zero and comes back at the end, 3 it stays zero.
_GOES, _RETURNS = 1, 2


def staged(before: Tensor | None, after: Tensor) -> Tensor:
    """What an update does to each weight, uint8: what its stages have to know.

    Args:
        before: Bool, True for zero, when the update is made; None: nothing is zero.
        after: The same when it is complete.
    """
    plan = after.to(torch.uint8)
    return plan if before is None else plan + 2 * before.to(torch.uint8)


def zeros_at(
    config: WeightPruningConfig,
    layers: Sequence[PrunableWeight],
    plans: Sequence[Tensor],
    scores: Sequence[Tensor],
    now: Sequence[Tensor | None],
    stage: int,
) -> list[Tensor]:
    """Which weights are zero at a stage.

    Args:
        config: Of the layers, which share one ranking whatever the scope.
        layers: Where an update is under way.
        plans: From `staged`.
        scores: As `Pattern.reduce` gives them, now.
        now: What is zero already; it stays so until the last stage.
        stage: From 1 to `STAGES`.

    Returns:
        Bool tensors of the weights' shapes, True for zero.

    Source:
        Neural Compressor 2.6: of `n` weights that go, those no more important than the `floor(n stage / 4)`-th.

    Example:
        >>> import torch
        >>> layer = PrunableWeight("w", torch.nn.Parameter(torch.tensor([[4.0, 1.0, 3.0, 2.0]])))
        >>> plan = staged(None, torch.tensor([[True, True, True, True]]))
        >>> zeros_at(WeightPruningConfig(pattern="1x1"), [layer], [plan], [layer.weight.detach()], [None], 2)
        [tensor([[False,  True, False,  True]])]
    """
    if stage >= STAGES:
        return [plan % 2 == 1 for plan in plans]
    goes = [plan == _GOES for plan in plans]
    importance = [
        layer.like_weight(layer.pattern(config).expand(kept.float(), layer.matrix(plan).shape))
        for layer, kept, plan in zip(layers, scores, plans, strict=True)
    ]
    device = plans[0].device
    pool = torch.cat([values[new].to(device) for values, new in zip(importance, goes, strict=True)])
    count = len(pool) * stage // STAGES
    bound = smallest(pool, count) if count else pool.new_tensor(-torch.inf)
    masks = []
    for plan, new, values, zero in zip(plans, goes, importance, now, strict=True):
        mask = (plan >= _RETURNS) | (new & (values <= bound.to(values.device)))
        masks.append(mask if zero is None else mask | zero)
    return masks
