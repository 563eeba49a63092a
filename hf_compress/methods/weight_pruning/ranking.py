"""Chooses the weights that become zero, given their scores and the sparsity that is due."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.methods.weight_pruning.config import WeightPruningConfig
from hf_compress.methods.weight_pruning.criteria import CRITERIA, accumulate
from hf_compress.methods.weight_pruning.prunable import PrunableWeight, WeightGroup, tied, unit_counts
from hf_compress.methods.weight_pruning.selection import floor_count, select_units


logger = logging.getLogger(__name__)

# How far caps that are rounded down to whole units may push the sparsity below its target.
_ROUNDING = 0.01


@dataclass(frozen=True)
class _Quota:
    """Units to prune in one ranking.

    Args:
        now: Over all weights, at this pruning update.
        final: Over all weights, when the target is reached.
        lower, upper: For each weight, at least and at most when the target is reached.
    """

    now: int
    final: int
    lower: list[int]
    upper: list[int]


def _quota(config: WeightPruningConfig, sizes: Sequence[int], sparsity: float) -> _Quota:
    ceiling, total = config.parsed_pattern.ceiling, sum(sizes)
    lower = [floor_count(size, config.min_sparsity_ratio_per_op / ceiling) for size in sizes]
    upper = [floor_count(size, min(1.0, config.max_sparsity_ratio_per_op / ceiling)) for size in sizes]
    final = min(floor_count(total, config.target_sparsity / ceiling), sum(upper))
    return _Quota(min(floor_count(total, sparsity / ceiling), final), final, lower, upper)


def expected_units(config: WeightPruningConfig, weights: Sequence[PrunableWeight]) -> int:
    """Units that are pruned when the target is reached: the target rounded down, within the bounds of each weight."""
    sizes = unit_counts(config, weights)
    scopes = [sizes] if config.scope == "global" else [[size] for size in sizes]
    return sum(_quota(config, scope, config.target_sparsity).final for scope in scopes)


def check_reachable(group: WeightGroup) -> None:
    """Refuse a target that the weights of a group cannot reach together, because each has a cap in whole units.

    Raises:
        ValueError: If they miss it by more than a hundredth.
    """
    config = group.config
    if config.scope == "local":
        return
    ceiling, total = config.parsed_pattern.ceiling, sum(unit_counts(config, group.weights))
    possible = expected_units(config, group.weights)
    if floor_count(total, config.target_sparsity / ceiling) - possible > _ROUNDING * total:
        raise ValueError(
            f"target_sparsity must be at most {possible / total * ceiling:.4g} with max_sparsity_ratio_per_op="
            f"{config.max_sparsity_ratio_per_op}, got {config.target_sparsity}: counted in whole units of pattern "
            f"{config.pattern}, the selected weights may lose {possible} of {total}."
        )


def warn_of_spared(group: WeightGroup, pruned: Sequence[PrunableWeight], reason: str) -> None:
    """Name the weights of a group that are not pruned, and their share of the group."""
    spared = WeightGroup(group.config, [prunable for prunable in group.weights if prunable not in pruned])
    if spared.weights:
        share = 100 * spared.num_elements / group.num_elements
        names = ", ".join(prunable.name for prunable in spared.weights)
        logger.warning("Not pruned, because %s: %s (%.1f%% of the selected weights)", reason, names, share)


def updated_scores(
    config: WeightPruningConfig, prunable: PrunableWeight, gradient: Tensor | None = None, stored: Tensor | None = None
) -> Tensor:
    """The scores of a weight's units after one more optimizer step.

    Args:
        config: Criterion and pattern.
        prunable: The weight.
        gradient: Of the weight's shape; None for `magnitude`, which does not look at it.
        stored: The scores before that step; None at the first one.

    Returns:
        Scores in the form that `reduce` of the pattern gives, in the weight's dtype.
    """
    pattern = prunable.pattern(config)
    weight = prunable.matrix(prunable.weight.detach())
    gradient = None if gradient is None else prunable.matrix(gradient.detach())
    scores = pattern.reduce(CRITERIA[config.criterion](weight, gradient), config.criterion_reduce_type)
    return accumulate(config.criterion, stored, scores)


def zero_masks(
    config: WeightPruningConfig,
    weights: Sequence[PrunableWeight],
    scores: Sequence[Tensor],
    pruned: Sequence[Tensor | None],
    sparsity: float,
) -> list[Tensor]:
    """Choose the elements that are zero from now on, among all of them.

    Args:
        config: Pattern, scope and bounds.
        weights: What may be pruned.
        scores: For each weight, in the form that `reduce` of its pattern gives.
        pruned: For each weight, which elements are zero now, in the weight's shape; None: none.
        sparsity: Due now, in [0, target_sparsity].

    Returns:
        For each weight a bool tensor of its shape, True for zero.

    Raises:
        ValueError: If a score is not finite.
    """
    patterns, reduction = [prunable.pattern(config) for prunable in weights], config.criterion_reduce_type
    before = [
        prunable.nothing_pruned() if mask is None else prunable.matrix(mask)
        for prunable, mask in zip(weights, pruned, strict=True)
    ]
    importance = [
        pattern.unit_scores(kept, mask, reduction).float()
        for pattern, kept, mask in zip(patterns, scores, before, strict=True)
    ]
    for prunable, values in zip(weights, importance, strict=True):
        if not torch.isfinite(values).all():
            raise ValueError(
                f"The scores of {prunable.name} must be finite, got NaN or infinity: check its weights and the loss."
            )
    already = [pattern.pruned_units(mask) for pattern, mask in zip(patterns, before, strict=True)]
    sets = tied(weights)
    result: list[Tensor] = [torch.empty(0)] * len(weights)
    for scope in [sets] if config.scope == "global" else [[indices] for indices in sets]:
        device = importance[scope[0][0]].device
        # Tied weights lose the same units: those that matter least on average over their projections.
        ranked = [
            torch.cat([importance[i].to(device).view(-1, len(already[i])) for i in indices]).mean(0)
            for indices in scope
        ]
        gone = [torch.stack([already[i].to(device) for i in indices]).all(0) for indices in scope]
        quota = _quota(config, [len(values) for values in ranked], sparsity)
        chosen = select_units(ranked, gone, quota.now, quota.lower, quota.upper, quota.final)
        for indices, units in zip(scope, chosen, strict=True):
            for i in indices:
                matrix = patterns[i].spread(units.to(before[i].device), scores[i], before[i])
                result[i] = weights[i].like_weight(matrix)
    return result
