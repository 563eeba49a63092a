"""Prunes a model at once, without training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.core.batches import on_device
from hf_compress.core.data_needs import Data, DataNeeds
from hf_compress.core.modes import evaluating
from hf_compress.core.processes import add_up_, all_told
from hf_compress.core.shares import batch_number
from hf_compress.methods.weight_pruning.calibrated import check_linear, reconstruct_, wanda_scores
from hf_compress.methods.weight_pruning.config import WeightPruningConfig
from hf_compress.methods.weight_pruning.criteria import MOMENTUM
from hf_compress.methods.weight_pruning.groups import groups_of
from hf_compress.methods.weight_pruning.prunable import PrunableWeight, WeightGroup
from hf_compress.methods.weight_pruning.ranking import (
    check_reachable,
    expected_units,
    updated_scores,
    warn_of_spared,
    zero_masks,
)
from hf_compress.methods.weight_pruning.sparsity import sparsity_of


Configured = Sequence[tuple[WeightPruningConfig, PrunableWeight]]


def check(model: PreTrainedModel, config: WeightPruningConfig) -> None:
    """Refuse configs that select nothing, ask for too much, or need inputs that a module's weight does not multiply.

    Raises:
        ValueError: Names the field.
    """
    for group in groups_of(model, config):
        check_reachable(group)
        if group.config.needs_inputs:
            check_linear(model, group.config, group.weights)


def data_needs(config: WeightPruningConfig) -> DataNeeds:
    """How `compress` reads its data."""
    entries = config.resolved()
    labels = any(entry.needs_gradients for entry in entries)
    swept = any(entry.criterion == "sparsegpt" for entry in entries)
    inputs = any(entry.needs_inputs for entry in entries)
    reading = next((entry for entry in entries if entry.needs_inputs or entry.needs_gradients), None)
    setting = f"criterion={reading.criterion!r}" if reading is not None else ""
    return DataNeeds(2 if swept else labels + inputs, labels, setting, adds_up=True)


def compress(model: PreTrainedModel, config: WeightPruningConfig, data: Data | None) -> WeightPruningConfig:
    """Prune to the target at once; the settings of schedule and regulariser have no effect.

    Args:
        model: Changed in place: weights become zero, nothing else. `sparsegpt` also changes the weights that stay.
        config: Which weights to prune, and how many.
        data: Labelled batches for the criteria that look at gradients: `gradient` and `snip` use the gradient of all
            the data, `snip_momentum` treats each batch as one optimizer step. Batches without labels are enough for
            `wanda` (read once) and `sparsegpt` (read again and again).

    Returns:
        The config with `achieved_sparsity`.

    Raises:
        ValueError: If gradients are needed and a batch has no labels, or if a score is not finite.
    """
    groups = groups_of(model, config)
    # Reconstruction comes last, so that it sees all other weights pruned.
    swept = [group for group in groups if group.config.criterion == "sparsegpt"]
    ranked = [group for group in groups if group not in swept]
    scores = _scores(model, ranked, data)
    masks: dict[PrunableWeight, Tensor] = {}
    for group in ranked:
        scored = [prunable for prunable in group.weights if prunable in scores]
        if not scored:
            raise ValueError(f"The loss must depend on a weight to prune, got none of {len(group.weights)}.")
        warn_of_spared(group, scored, "no gradient reaches them")
        kept = [scores[prunable] for prunable in scored]
        chosen = zero_masks(group.config, scored, kept, [None] * len(scored), group.config.target_sparsity)
        masks.update(zip(scored, chosen, strict=True))
    for prunable, mask in masks.items():
        # Not in place: if anything fails later, the old values are restored.
        prunable.weight.data = prunable.weight.data.masked_fill(mask, 0)
    if swept:
        assert data is not None
        entries = [(group.config, prunable) for group in swept for prunable in group.weights]
        counts = [expected_units(entry, [prunable]) for entry, prunable in entries]
        reconstruct_(model, [(*entry, count) for entry, count in zip(entries, counts, strict=True)], data)
    return dataclasses.replace(config, achieved_sparsity=sparsity_of(groups))


def _scores(model: PreTrainedModel, groups: Sequence[WeightGroup], data: Data | None) -> dict[PrunableWeight, Tensor]:
    """Scores of the units of all weights that have some; weights that the loss does not reach have none."""
    entries = [(group.config, prunable) for group in groups for prunable in group.weights]
    by_gradient = [entry for entry in entries if entry[0].needs_gradients]
    by_norm = [entry for entry in entries if entry[0].needs_inputs]
    scores: dict[PrunableWeight, Tensor] = {}
    if data is not None and by_gradient:
        scores.update(_scores_of_loss(model, by_gradient, data))
    if data is not None and by_norm:
        scores.update(wanda_scores(model, by_norm, data))
    for config, prunable in entries:
        if not (config.needs_gradients or config.needs_inputs):
            scores[prunable] = updated_scores(config, prunable)
    return scores


def _scores_of_loss(model: PreTrainedModel, entries: Configured, data: Data) -> dict[PrunableWeight, Tensor]:
    """Scores from backward passes over labelled data."""
    weights = [prunable.weight for _, prunable in entries]
    trainable = [weight.requires_grad for weight in weights]
    found: dict[PrunableWeight, Tensor] = {}
    # The batches between two of this process are those of others; they fade its scores, too.
    fading, seen = MOMENTUM ** (batch_number(1) - batch_number(0) - 1), 0
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with evaluating(model):
            for batch in data:
                loss = getattr(model(**on_device(model, batch)), "loss", None)
                if loss is None:
                    raise ValueError(
                        f"data must hold labels with criterion={entries[0][0].criterion!r}, got {sorted(batch)}."
                    )
                gradients = torch.autograd.grad(loss, weights, allow_unused=True)
                seen += 1
                for (config, prunable), gradient in zip(entries, gradients, strict=True):
                    if gradient is None:
                        continue
                    before = found.get(prunable)
                    if config.criterion == "snip_momentum":
                        faded = before if before is None or fading == 1 else before * fading
                        found[prunable] = updated_scores(config, prunable, gradient, faded)
                    else:
                        found[prunable] = gradient if before is None else before + gradient
    finally:
        for weight, flag in zip(weights, trainable, strict=True):
            weight.requires_grad_(flag)
    found = _of_all(entries, found, batch_number(seen - 1) if seen else -1)
    if not found:
        raise ValueError("data must hold at least one batch whose loss depends on the weights to prune, got none.")
    return {
        prunable: found[prunable]
        if config.criterion == "snip_momentum"
        else updated_scores(config, prunable, found[prunable])
        for config, prunable in entries
        if prunable in found
    }


def _of_all(entries: Configured, found: dict[PrunableWeight, Tensor], last: int) -> dict[PrunableWeight, Tensor]:
    """Add up what several processes found, each by its own batches.

    Args:
        entries: All weights, each with its config.
        found: Sums of gradients, or for `snip_momentum` of scores that have faded since.
        last: The number of the last batch that this process has read, among those of all; -1: it had none.
    """
    told = all_told((last, {prunable.name for prunable in found}))
    if len(told) == 1:
        return found
    reached = set().union(*(names for _, names in told))
    later = MOMENTUM ** (max(number for number, _ in told) - last) if last >= 0 else 0.0
    summed: dict[PrunableWeight, Tensor] = {}
    for config, prunable in entries:
        if prunable.name not in reached:
            continue
        momentum = config.criterion == "snip_momentum"
        if prunable in found:
            summed[prunable] = found[prunable] * later if momentum else found[prunable]
        else:
            nothing = torch.zeros_like(prunable.weight)
            summed[prunable] = updated_scores(config, prunable, nothing) if momentum else nothing
    add_up_(summed.values())
    return summed
