"""Which weights become zero, by scores and counts; and pruning at once, without training."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.core.batches import on_device
from hf_compress.core.calibration import require_data
from hf_compress.core.modes import evaluating
from hf_compress.methods.weight_pruning.calibrated import check_linear, reconstruct_, wanda_scores
from hf_compress.methods.weight_pruning.config import WeightPruningConfig
from hf_compress.methods.weight_pruning.criteria import CRITERIA, accumulate
from hf_compress.methods.weight_pruning.groups import (
    Group,
    PrunableWeight,
    groups_of,
    nothing_pruned,
    sparsity_of,
    tied,
    unit_counts,
)
from hf_compress.methods.weight_pruning.selection import floor_count, select_units


logger = logging.getLogger(__name__)

# How far caps that are rounded down to whole units may push the sparsity below its target.
_ROUNDING = 0.01


@dataclasses.dataclass(frozen=True)
class _Amount:
    """Units to prune over some layers: now, in the end, and in the end of each layer at least and at most."""

    now: int
    final: int
    lower: list[int]
    upper: list[int]


def _amount(config: WeightPruningConfig, sizes: Sequence[int], sparsity: float) -> _Amount:
    ceiling, total = config.parsed_pattern.ceiling, sum(sizes)
    lower = [floor_count(size, config.min_sparsity_ratio_per_op / ceiling) for size in sizes]
    upper = [floor_count(size, min(1.0, config.max_sparsity_ratio_per_op / ceiling)) for size in sizes]
    final = min(floor_count(total, config.target_sparsity / ceiling), sum(upper))
    return _Amount(min(floor_count(total, sparsity / ceiling), final), final, lower, upper)


def expected_units(config: WeightPruningConfig, sizes: Sequence[int]) -> int:
    """Units that are pruned when the target is reached: the target rounded down, and no more than bounds allow."""
    scopes = [sizes] if config.scope == "global" else [[size] for size in sizes]
    return sum(_amount(config, scope, config.target_sparsity).final for scope in scopes)


def check_reachable(group: Group) -> None:
    """Refuse a target that layers, which lose whole units up to their cap, cannot reach together.

    Raises:
        ValueError: If they miss it by more than a hundredth.
    """
    config, sizes = group.config, unit_counts(group.config, group.layers)
    if config.scope == "local":
        return
    ceiling, total = config.parsed_pattern.ceiling, sum(sizes)
    possible = expected_units(config, sizes)
    if floor_count(total, config.target_sparsity / ceiling) - possible > _ROUNDING * total:
        raise ValueError(
            f"target_sparsity must be at most {possible / total * ceiling:.4g} with max_sparsity_ratio_per_op="
            f"{config.max_sparsity_ratio_per_op}, got {config.target_sparsity}: in whole units of pattern "
            f"{config.pattern}, the layers may lose {possible} of {total}."
        )


def warn_of_spared(group: Group, pruned: Sequence[PrunableWeight], reason: str) -> None:
    """Name the layers of a group that are not pruned, and their share of its weights."""
    spared = [layer for layer in group.layers if layer not in pruned]
    if spared:
        share = sum(layer.weight.numel() for layer in spared) / sum(layer.weight.numel() for layer in group.layers)
        names = ", ".join(layer.name for layer in spared)
        logger.warning("Not pruned, because %s: %s (%.1f%% of the selected weights)", reason, names, 100 * share)


def prune_layers(
    config: WeightPruningConfig,
    layers: Sequence[PrunableWeight],
    kept: Sequence[Tensor],
    pruned: Sequence[Tensor | None],
    sparsity: float,
) -> list[Tensor]:
    """Which weights are zero from now on, chosen anew among all of them.

    Args:
        config: Pattern, scope and bounds.
        layers: Where to prune.
        kept: Scores, in the form that `Pattern.reduce` gives.
        pruned: What is zero now, in the shape of the weights; None: nothing.
        sparsity: What is due.

    Returns:
        For each layer a bool tensor of the weight's shape, True for zero.

    Raises:
        ValueError: If a score is not finite.
    """
    patterns, reduction = [layer.pattern(config) for layer in layers], config.criterion_reduce_type
    before = [
        nothing_pruned(layer) if gone is None else layer.matrix(gone)
        for layer, gone in zip(layers, pruned, strict=True)
    ]
    scores = [
        pattern.unit_scores(k, b, reduction).float() for pattern, k, b in zip(patterns, kept, before, strict=True)
    ]
    for layer, values in zip(layers, scores, strict=True):
        if not torch.isfinite(values).all():
            raise ValueError(f"Scores must be finite, got NaN or infinity in {layer.name}: check weights and loss.")
    gone = [pattern.pruned_units(b) for pattern, b in zip(patterns, before, strict=True)]
    sets = tied(layers)
    scopes = [sets] if config.scope == "global" else [[together] for together in sets]
    result: list[Tensor] = [torch.empty(0)] * len(layers)
    for scope in scopes:
        device = scores[scope[0][0]].device
        # Tied layers lose the same units: those that matter least on average.
        ranked = [torch.stack([scores[i].to(device) for i in together]).mean(0) for together in scope]
        already = [torch.stack([gone[i].to(device) for i in together]).all(0) for together in scope]
        due = _amount(config, [len(values) for values in ranked], sparsity)
        chosen = select_units(ranked, already, due.now, due.lower, due.upper, due.final)
        for together, units in zip(scope, chosen, strict=True):
            for i in together:
                matrix = patterns[i].spread(units.to(before[i].device), kept[i], before[i])
                result[i] = layers[i].like_weight(matrix)
    return result


def step_scores(
    config: WeightPruningConfig, layer: PrunableWeight, gradient: Tensor | None, stored: Tensor | None
) -> Tensor:
    """Scores after one more step (or, for `magnitude`, of the weights as they are), in the weight's dtype."""
    pattern = layer.pattern(config)
    weight = layer.matrix(layer.weight.detach())
    gradient = None if gradient is None else layer.matrix(gradient.detach())
    scores = pattern.reduce(CRITERIA[config.criterion](weight, gradient), config.criterion_reduce_type)
    return accumulate(config.criterion, stored, scores)


def check(model: PreTrainedModel, config: WeightPruningConfig) -> None:
    """Refuse configs that select nothing, ask for too much, or for layers whose inputs a criterion cannot use."""
    for group in groups_of(model, config):
        check_reachable(group)
        if group.config.needs_inputs:
            check_linear(model, group.config, group.layers)


def compress(
    model: PreTrainedModel, config: WeightPruningConfig, data: Iterable[Mapping[str, Any]] | None
) -> WeightPruningConfig:
    """Prune to the target at once, without training; the fields of schedule and regulariser are not looked at.

    Args:
        model: Changed in place: weights become zero, nothing else. `sparsegpt` changes those that stay, too.
        config: What to make.
        data: Labelled batches for the criteria that look at gradients: `gradient` and `snip` use the gradient of the
            whole data, `snip_momentum` one step a batch. Batches without labels are enough for `wanda` (read once)
            and `sparsegpt` (read once for every set of layers that share an input).

    Returns:
        The config with `achieved_sparsity`.

    Raises:
        ValueError: If gradients are needed and the data has no labels, if inputs are needed and there is no data, or
            if a score is not finite.
    """
    groups = groups_of(model, config)
    # Reconstruction comes last, so that it sees everything else pruned.
    swept = [group for group in groups if group.config.criterion == "sparsegpt"]
    ranked = [group for group in groups if group not in swept]
    layers = [(group.config, layer) for group in ranked for layer in group.layers]
    scores: dict[PrunableWeight, Tensor] = {}
    calibrated = [(group.config, layer) for group in groups for layer in group.layers if group.config.needs_inputs]
    if calibrated and data is None:
        raise ValueError(
            f"data must be given with criterion={calibrated[0][0].criterion!r}: an iterable of batches, labels are "
            "not needed. criterion='magnitude' needs none."
        )
    if swept or (calibrated and any(entry.needs_gradients for entry, _ in layers)):
        require_data(data, 2)
    needing = [(entry, layer) for entry, layer in layers if entry.needs_gradients]
    if needing:
        if data is None:
            raise ValueError(
                f"data must be given with criterion={needing[0][0].criterion!r}: an iterable of labelled batches. "
                "criterion='magnitude' needs none."
            )
        scores = _scores_of_data(model, needing, data)
    by_norm = [(entry, layer) for entry, layer in layers if entry.needs_inputs]
    if by_norm:
        scores.update(wanda_scores(model, by_norm, data))
    for entry, layer in layers:
        if layer not in scores and not entry.needs_gradients:
            scores[layer] = step_scores(entry, layer, None, None)
    masks: dict[PrunableWeight, Tensor] = {}
    for group in ranked:
        scored = [layer for layer in group.layers if layer in scores]
        if not scored:
            raise ValueError(f"The loss must depend on a layer to prune, got none of {len(group.layers)}.")
        warn_of_spared(group, scored, "no gradient reaches them")
        kept, nothing = [scores[layer] for layer in scored], [None] * len(scored)
        chosen = prune_layers(group.config, scored, kept, nothing, group.config.target_sparsity)
        masks.update(zip(scored, chosen, strict=True))
    for layer, mask in masks.items():
        # Not in place: until all is done, the old values are what a failure goes back to.
        layer.weight.data = layer.weight.data.masked_fill(mask, 0)
    if swept:
        single = [Group(group.config, [layer]) for group in swept for layer in group.layers]
        counts = [expected_units(alone.config, [alone.num_units]) for alone in single]
        reconstruct_(
            model, [(alone.config, alone.layers[0], n) for alone, n in zip(single, counts, strict=True)], data
        )
    return dataclasses.replace(config, achieved_sparsity=sparsity_of(groups))


def _scores_of_data(
    model: PreTrainedModel,
    layers: Sequence[tuple[WeightPruningConfig, PrunableWeight]],
    data: Iterable[Mapping[str, Any]],
) -> dict[PrunableWeight, Tensor]:
    """Scores from backward passes over labelled data; layers that the loss does not reach have none."""
    weights = [layer.weight for _, layer in layers]
    trainable = [weight.requires_grad for weight in weights]
    scores: dict[PrunableWeight, Tensor] = {}
    sums: dict[PrunableWeight, Tensor] = {}
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with evaluating(model):
            for batch in data:
                loss = getattr(model(**on_device(model, batch)), "loss", None)
                if loss is None:
                    raise ValueError(
                        f"data must hold labels with criterion={layers[0][0].criterion!r}, got {sorted(batch)}."
                    )
                gradients = torch.autograd.grad(loss, weights, allow_unused=True)
                for (config, layer), gradient in zip(layers, gradients, strict=True):
                    if gradient is None:
                        continue
                    if config.criterion == "snip_momentum":
                        scores[layer] = step_scores(config, layer, gradient, scores.get(layer))
                    else:
                        sums[layer] = gradient if layer not in sums else sums[layer] + gradient
    finally:
        for weight, flag in zip(weights, trainable, strict=True):
            weight.requires_grad_(flag)
    if not (scores or sums):
        raise ValueError("data must hold at least one batch whose loss depends on the layers to prune, got none.")
    for config, layer in layers:
        if layer in sums:
            scores[layer] = step_scores(config, layer, sums[layer], None)
    return scores
