"""Counts the units of a model's weights that are zero."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from hf_compress.methods.weight_pruning.config import WeightPruningConfig
from hf_compress.methods.weight_pruning.groups import selected
from hf_compress.methods.weight_pruning.prunable import WeightGroup, tied


def pruned_units(group: WeightGroup) -> tuple[int, int]:
    """Count the units of a group that are zero in the live weights, and all its units."""
    units = [
        prunable.pattern(group.config).pruned_units(prunable.matrix(prunable.weight.detach() == 0))
        for prunable in group.weights
    ]
    sets = [torch.stack([units[index] for index in indices]).all(0) for indices in tied(group.weights)]
    return sum(int(gone.sum()) for gone in sets), sum(len(gone) for gone in sets)


def sparsity_of(groups: Sequence[WeightGroup]) -> float:
    """Pruned units over all units (times N/M for N:M), averaged over groups by their number of weights."""
    total = 0.0
    for group in groups:
        gone, units = pruned_units(group)
        total += group.num_elements * group.config.parsed_pattern.ceiling * gone / units
    return total / sum(group.num_elements for group in groups)


def sparsity_by_layer(model: PreTrainedModel, config: WeightPruningConfig) -> dict[str, float]:
    """Pruned units over units (times N/M for N:M) of each weight that a config selects, by the name of its module."""
    return {
        prunable.name: sparsity_of([WeightGroup(group.config, [prunable])])
        for group in selected(model, config)
        for prunable in group.weights
    }
