"""How weight pruning enters a model: which layers, which of their weights, once or in the course of training."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_compress.core.calibration import accepted_arguments, require_data
from hf_compress.methods.weight_pruning.calibrated import check_linear, reconstruct_, wanda_scores
from hf_compress.methods.weight_pruning.config import WeightPruningConfig
from hf_compress.methods.weight_pruning.criteria import CRITERIA, accumulate
from hf_compress.methods.weight_pruning.selection import floor_count, select_units


@dataclass(frozen=True, eq=False)
class Layer:
    """One weight that may be pruned, seen as a matrix with outputs as rows.

    Args:
        name: Qualified module name.
        weight: The live parameter.
        transposed: The module stores inputs as rows (GPT-2's `Conv1D`).
    """

    name: str
    weight: nn.Parameter
    transposed: bool = False

    def matrix(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape as [outputs, inputs]; a convolution's inputs run with its positions."""
        if self.transposed:
            return tensor.T
        return tensor if tensor.ndim == 2 else tensor.movedim(1, -1).flatten(1)

    def like_weight(self, matrix: Tensor) -> Tensor:
        """The way back from `matrix`."""
        if self.transposed:
            return matrix.T.contiguous()
        shape = self.weight.shape
        return matrix if len(shape) == 2 else matrix.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()


@dataclass(frozen=True, eq=False)
class Group:
    """Layers that share one config."""

    config: WeightPruningConfig
    layers: list[Layer]

    @property
    def num_units(self) -> int:
        pattern = self.config.parsed_pattern
        return sum(len(pattern.pruned_units(_dense(layer))) for layer in self.layers)


def _dense(layer: Layer) -> Tensor:
    return torch.zeros(layer.matrix(layer.weight).shape, dtype=torch.bool, device=layer.weight.device)


def _matches(name: str, expressions: Sequence[str]) -> bool:
    return any(re.search(expression, name) for expression in expressions)


def _select(model: nn.Module, config: WeightPruningConfig, taken: set[nn.Parameter]) -> list[Layer]:
    everything = config.op_names is None and config.excluded_op_names is None
    base = getattr(model, "base_model_prefix", "") if getattr(model, "base_model", model) is not model else ""
    layers = []
    for name, module in model.named_modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        # A parametrised weight is computed, not stored: zeros in it would not last.
        weight = module._parameters.get("weight")
        if kinds.isdisjoint(config.pruning_op_types) or weight is None or weight.ndim < 2 or weight in taken:
            continue
        if config.op_names is not None and not _matches(name, config.op_names):
            continue
        if _matches(name, config.excluded_op_names or ()):
            continue
        if everything and ("pooler" in name or (base and not name.startswith(f"{base}."))):
            continue
        taken.add(weight)
        layers.append(Layer(name, weight, isinstance(module, Conv1D)))
    return layers


def groups_of(model: nn.Module, config: WeightPruningConfig) -> list[Group]:
    """The sets of layers that a config prunes; no layer is in two.

    Raises:
        ValueError: If one of them is empty.
    """
    if hasattr(model, "peft_config"):
        raise ValueError("model must not hold adapters, got a PEFT model. Merge them (merge_and_unload) first.")
    if config.heads_per_layer is not None:
        # A copy of a finished step: what training would record of it says nothing about this model.
        raise ValueError(
            f"heads_per_layer and neurons_per_layer must be None before pruning (slim fills them in), got "
            f"{config.heads_per_layer} and {config.neurons_per_layer}."
        )
    taken: set[nn.Parameter] = set()
    groups = []
    for entry in config.resolved():
        layers = _select(model, entry, taken)
        if not layers:
            raise ValueError(
                f"op_names must select a layer of {', '.join(entry.pruning_op_types)}, got {entry.op_names} without "
                f"{entry.excluded_op_names} (and without layers of earlier local_configs), which selects none."
            )
        groups.append(Group(entry, layers))
    return groups


def _targets(config: WeightPruningConfig, sizes: Sequence[int], sparsity: float) -> tuple[int, list[int], list[int]]:
    """Units to prune over some layers, and what each of them loses at least and at most."""
    ceiling = config.parsed_pattern.ceiling
    total = sum(sizes)
    upper = [floor_count(size, min(1.0, config.max_sparsity_ratio_per_op / ceiling)) for size in sizes]
    last = min(floor_count(total, config.target_sparsity / ceiling), sum(upper))
    count = min(floor_count(total, sparsity / ceiling), last)
    lower = [floor_count(size, config.min_sparsity_ratio_per_op / ceiling) for size in sizes]
    # What is still to come may go to layers below their minimum; only what it cannot fill is demanded now.
    demanded = 1 - (last - count) / sum(lower) if sum(lower) else 0.0
    return count, [floor_count(low, max(0.0, demanded)) for low in lower], upper


def expected_units(config: WeightPruningConfig, sizes: Sequence[int]) -> int:
    """Units that are pruned when the target is reached: the target rounded down, and no more than bounds allow."""
    scopes = [sizes] if config.scope == "global" else [[size] for size in sizes]
    return sum(_targets(config, scope, config.target_sparsity)[0] for scope in scopes)


def prune_layers(
    config: WeightPruningConfig,
    layers: Sequence[Layer],
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
    pattern, reduction = config.parsed_pattern, config.criterion_reduce_type
    before = [
        _dense(layer) if gone is None else layer.matrix(gone) for layer, gone in zip(layers, pruned, strict=True)
    ]
    scores = [pattern.unit_scores(k, b, reduction).float() for k, b in zip(kept, before, strict=True)]
    for layer, values in zip(layers, scores, strict=True):
        if not torch.isfinite(values).all():
            raise ValueError(f"Scores must be finite, got NaN or infinity in {layer.name}: check weights and loss.")
    gone = [pattern.pruned_units(b) for b in before]
    indices = range(len(layers))
    scopes = [list(indices)] if config.scope == "global" else [[index] for index in indices]
    result: list[Tensor] = [torch.empty(0)] * len(layers)
    for scope in scopes:
        count, lower, upper = _targets(config, [len(scores[i]) for i in scope], sparsity)
        device = scores[scope[0]].device
        chosen = select_units(
            [scores[i].to(device) for i in scope], [gone[i].to(device) for i in scope], count, lower, upper
        )
        for i, units in zip(scope, chosen, strict=True):
            matrix = pattern.spread(units.to(before[i].device), kept[i], before[i])
            result[i] = layers[i].like_weight(matrix)
    return result


def step_scores(config: WeightPruningConfig, layer: Layer, gradient: Tensor | None, stored: Tensor | None) -> Tensor:
    """Scores after one more step (or, for `magnitude`, of the weights as they are), in the weight's dtype."""
    pattern = config.parsed_pattern
    weight = layer.matrix(layer.weight.detach())
    gradient = None if gradient is None else layer.matrix(gradient.detach())
    scores = pattern.reduce(CRITERIA[config.criterion](weight, gradient), config.criterion_reduce_type)
    return accumulate(config.criterion, stored, scores)


def pruned_units(group: Group) -> tuple[int, int]:
    """How many of a group's units are zero in the live weights, and how many it has."""
    pattern = group.config.parsed_pattern
    units = [pattern.pruned_units(layer.matrix(layer.weight.detach() == 0)) for layer in group.layers]
    return sum(int(gone.sum()) for gone in units), sum(len(gone) for gone in units)


def sparsity_of(groups: Sequence[Group]) -> float:
    """Pruned units over all units, times N/M for N:M; groups count by their weights."""
    weights = [sum(layer.weight.numel() for layer in group.layers) for group in groups]
    total = 0.0
    for group, weight in zip(groups, weights, strict=True):
        gone, units = pruned_units(group)
        total += weight * group.config.parsed_pattern.ceiling * gone / units
    return total / sum(weights)


def sparsity_by_layer(model: nn.Module, config: WeightPruningConfig) -> dict[str, float]:
    """Pruned units over units of each layer that a config selects (times N/M for N:M), by module name."""
    return {
        layer.name: sparsity_of([Group(group.config, [layer])])
        for group in groups_of(model, config)
        for layer in group.layers
    }


def element_sparsity(model: nn.Module) -> float:
    """Zeros over elements of all linear and convolution weights, never pruned heads included, each weight once.

    Source:
        The "element-wise" ratio that the original reports.
    """
    kinds = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    weights = {module.weight for module in model.modules() if isinstance(module, kinds)}
    return 1 - sum(int(w.count_nonzero()) for w in weights) / max(sum(w.numel() for w in weights), 1)


def check(model: PreTrainedModel, config: WeightPruningConfig) -> None:
    """Refuse configs that select nothing, or layers whose inputs a criterion cannot use."""
    for group in groups_of(model, config):
        if group.config.needs_inputs:
            check_linear(model, group.config, group.layers)


def compress(
    model: PreTrainedModel, config: WeightPruningConfig, data: Iterable[Mapping[str, Any]] | None
) -> WeightPruningConfig:
    """Prune to the target at once, without training; the schedule's fields are not looked at.

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
    scores: dict[Layer, Tensor] = {}
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
    masks: dict[Layer, Tensor] = {}
    for group in ranked:
        scored = [layer for layer in group.layers if layer in scores]
        if not scored:
            raise ValueError(f"The loss must depend on a layer to prune, got none of {len(group.layers)}.")
        kept, nothing = [scores[layer] for layer in scored], [None] * len(scored)
        chosen = prune_layers(group.config, scored, kept, nothing, group.config.target_sparsity)
        masks.update(zip(scored, chosen, strict=True))
    for layer, mask in masks.items():
        layer.weight.data.masked_fill_(mask, 0)
    if swept:
        single = [Group(group.config, [layer]) for group in swept for layer in group.layers]
        counts = [expected_units(alone.config, [alone.num_units]) for alone in single]
        reconstruct_(
            model, [(alone.config, alone.layers[0], n) for alone, n in zip(single, counts, strict=True)], data
        )
    return dataclasses.replace(config, achieved_sparsity=sparsity_of(groups))


def _scores_of_data(
    model: PreTrainedModel, layers: Sequence[tuple[WeightPruningConfig, Layer]], data: Iterable[Mapping[str, Any]]
) -> dict[Layer, Tensor]:
    """Scores from backward passes over labelled data; layers that the loss does not reach have none."""
    weights = [layer.weight for _, layer in layers]
    trainable = [weight.requires_grad for weight in weights]
    was_training = model.training
    scores: dict[Layer, Tensor] = {}
    sums: dict[Layer, Tensor] = {}
    model.eval()
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for batch in data:
            inputs = {k: v.to(model.device) for k, v in accepted_arguments(model, batch).items() if torch.is_tensor(v)}
            loss = getattr(model(**inputs), "loss", None)
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
        model.train(was_training)
    if not (scores or sums):
        raise ValueError("data must hold at least one batch whose loss depends on the layers to prune, got none.")
    for config, layer in layers:
        if layer in sums:
            scores[layer] = step_scores(config, layer, sums[layer], None)
    return scores
