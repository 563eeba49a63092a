"""Retraining-free pruning by squared mask gradients: the baseline of Kwon et al. 2022 (arXiv 2204.09656).

Four parts, each usable alone: gradients of the loss with respect to masks of ones, a search for the masks that keep
the most Fisher information within a budget, an exchange of units inside each layer, and the tuning of the masks
(in `mask_tuning`) with a less pruned teacher.

Letters: B batches, H attention units, F neurons, n units or neurons of a layer, k kept ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.core.architectures import TransformerLayer
from hf_compress.core.batches import on_device
from hf_compress.core.data_needs import Data, require_batches
from hf_compress.core.modes import evaluating
from hf_compress.core.processes import all_told
from hf_compress.core.shared_passes import measured_once
from hf_compress.methods.structured_pruning.allocation import budget_too_small
from hf_compress.methods.structured_pruning.mask_tuning import Masks, masked, tune_masks


@dataclass(frozen=True)
class KeptUnits:
    """The units and neurons that one layer keeps, and the factors for the columns of its output projections.

    Args:
        units: Ascending indices of the attention units that stay.
        neurons: [k] int64, ascending indices of the neurons that stay.
        unit_scales: [len(units)] float64, one for all columns of a unit.
        neuron_scales: [k] float64.
    """

    units: list[int]
    neurons: Tensor
    unit_scales: Tensor
    neuron_scales: Tensor


def collect_gradients(
    model: PreTrainedModel, layers: Sequence[TransformerLayer], data: Data
) -> tuple[list[Tensor], list[Tensor]]:
    """Compute, for every batch, the derivatives of the loss with respect to masks of ones on all units.

    Args:
        model: With a task head. Runs in eval mode with frozen parameters; mode and `requires_grad` are restored.
        layers: Its layers.
        data: Input dicts with labels; read once.

    Returns:
        The gradients of each batch's mean loss, float64 on the CPU: [B, H] for each layer, and [B, F] for each layer.

    Raises:
        ValueError: If the data is empty or has no labels, or if a gradient is not finite.
    """
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    ones = Masks(
        [torch.ones(x.num_units, dtype=dtype, device=x.attention_out.weight.device) for x in layers],
        [torch.ones(x.num_neurons, dtype=dtype, device=x.ffn_out.weight.device) for x in layers],
    )
    leaves = [mask.requires_grad_() for mask in ones.units + ones.neurons]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rows: list[list[Tensor]] = []
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        with evaluating(model), masked(layers, ones), torch.enable_grad():
            for batch in data:
                loss = getattr(model(**on_device(model, batch)), "loss", None)
                if loss is None:
                    raise ValueError(
                        f"data must hold labels with which {type(model).__name__} returns a loss, "
                        f"got the keys {sorted(batch)}."
                    )
                rows.append([g.to("cpu", torch.float64) for g in torch.autograd.grad(loss, leaves)])
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
    # Of several processes each has every n-th batch.
    turns = itertools.zip_longest(*all_told(rows))
    ordered = [row for turn in turns for row in turn if row is not None]
    require_batches(len(ordered))
    grads = [torch.stack(column) for column in zip(*ordered, strict=True)]
    if not all(torch.isfinite(g).all() for g in grads):
        raise ValueError(
            "The loss must have finite gradients on the calibration data, got NaN or infinity. Check the weights, or "
            "calibrate in a dtype with a larger range."
        )
    return grads[: len(layers)], grads[len(layers) :]


def fisher_information(grads: Sequence[Tensor]) -> list[Tensor]:
    """Sum the squared gradients [B, n] of each layer over the batches: [n], the importance of its units.

    Example:
        >>> fisher_information([torch.tensor([[1.0, 2.0], [3.0, 0.0]])])
        [tensor([10.,  4.])]
    """
    return [g.square().sum(0) for g in grads]


def _ranked(fisher: Sequence[Tensor], macs: Sequence[float], minimum: int) -> tuple[Tensor, int, Tensor, Tensor]:
    """Rank all units of a kind: (order, number of those that must stay, information and cost of the first j)."""
    information = torch.cat([f.double() for f in fisher])
    cost = torch.cat([torch.full_like(f, m, dtype=torch.float64) for f, m in zip(fisher, macs, strict=True)])
    ranks = [f.argsort(descending=True, stable=True).argsort() for f in fisher]
    forced = torch.cat([rank < minimum for rank in ranks])
    worth = torch.where(forced, torch.inf, information / (cost / max(macs)))
    order = worth.argsort(descending=True, stable=True)
    zero = cost.new_zeros(1)
    gained, spent = (torch.cat([zero, values[order].cumsum(0)]) for values in (information, cost))
    return order, int(forced.sum()), gained, spent


def _best_mask(order: Tensor, count: int, fisher: Sequence[Tensor]) -> list[Tensor]:
    keep = torch.zeros(len(order), dtype=torch.bool)
    keep[order[:count]] = True
    return list(torch.split(keep, [len(f) for f in fisher]))


def search_masks(
    unit_fisher: Sequence[Tensor],
    neuron_fisher: Sequence[Tensor],
    unit_macs: Sequence[float],
    neuron_macs: Sequence[float],
    mac_ratio: float,
    min_units: int = 0,
    min_neurons: int = 0,
) -> Masks:
    """Find the masks that keep the most Fisher information within a budget of multiply-accumulates.

    Args:
        unit_fisher, neuron_fisher: Importance of the units [H] and of the neurons [F] of each layer.
        unit_macs, neuron_macs: Multiply-accumulates of one unit and of one neuron of each layer.
        mac_ratio: Fraction of the cost of all of them that may stay, in (0, 1].
        min_units, min_neurons: How many each layer keeps at least (all of them if it has fewer); the best ones stay.

    Returns:
        Bool masks on the CPU. At least one attention unit stays in the model, as in the original.

    Raises:
        ValueError: If the minima alone exceed the budget.

    Source:
        Algorithm 1 of the paper. Deviations: numbers of units that exceed the budget are rejected (the released code
        scores them with no neurons), minima exist, and with unequal costs the rank is information per cost.
    """
    units, forced_units, unit_gain, unit_cost = _ranked(unit_fisher, unit_macs, min_units)
    neurons, forced_neurons, neuron_gain, neuron_cost = _ranked(neuron_fisher, neuron_macs, min_neurons)
    full = float(unit_cost[-1] + neuron_cost[-1])
    fewest = min(max(forced_units, 1), len(units))
    # The slack covers the rounding of the running sums, which could otherwise cost a neuron at mac_ratio = 1.
    left = mac_ratio * full * (1 + 1e-12) - unit_cost
    affordable = torch.searchsorted(neuron_cost, left, right=True) - 1
    score = unit_gain + neuron_gain[affordable.clamp(min=0)]
    score[affordable < forced_neurons] = -torch.inf
    score[:fewest] = -torch.inf
    best = int(score.argmax())
    if score[best] == -torch.inf:
        least = float(unit_cost[fewest] + neuron_cost[forced_neurons])
        raise budget_too_small(least, full, mac_ratio * full)
    return Masks(_best_mask(units, best, unit_fisher), _best_mask(neurons, int(affordable[best]), neuron_fisher))


def rearrange_mask(grads: Tensor, keep: Tensor) -> Tensor:
    """Exchange removed units of one layer for kept ones as long as that lowers their joint effect on the loss.

    Args:
        grads: [B, n] gradients.
        keep: [n] bool. Not changed.

    Returns:
        [n] bool with as many kept units, whose removed set M never has a larger `||sum of grads over M||^2`.

    Source:
        Section 4.2 of the paper, with the greedy order of the released code: kept units join M from the least
        important on, and each time the member leaves whose absence is best.
    """
    removed = ~keep.cpu()
    if removed.all() or not removed.any():
        return keep.clone()
    vectors = grads.to("cpu", torch.float64).T.contiguous()
    fisher = vectors.square().sum(1)
    total = vectors[removed].sum(0)
    for unit in fisher.argsort(stable=True)[~removed[fisher.argsort(stable=True)]].tolist():
        removed[unit] = True
        total = total + vectors[unit]
        # ||total - v||^2 without the part that all members share.
        leaving = int(torch.where(removed, fisher - 2 * (vectors @ total), torch.inf).argmin())
        removed[leaving] = False
        total = total - vectors[leaving]
    return ~removed.to(keep.device)


def fisher_selection(
    model: PreTrainedModel,
    layers: Sequence[TransformerLayer],
    data: Data,
    seq_len: float,
    mac_ratio: float,
    min_heads: int,
    min_neurons: int,
    prune_heads: bool,
    prune_neurons: bool,
    tune: bool,
) -> list[KeptUnits]:
    """Choose the units and neurons of a model that stay, and their scales. The model is not changed.

    Args:
        data: Input dicts with labels, read once, and twice a layer more with `tune`.
        seq_len: Tokens in a sequence, for the MAC count.
        mac_ratio: Fraction of the multiply-accumulates of the layers that stays, in (0, 1].
        min_heads, min_neurons: How many each layer keeps at least; heads are counted as key-value heads.
        prune_heads, prune_neurons: Whether heads and neurons may be removed. Tuning scales both.
        tune: Compute scales, with the masks for `sqrt(mac_ratio)` as the teacher; otherwise all are 1.

    Raises:
        ValueError: If the budget cannot be met, or the data has no labels or gives a gradient that is not finite.
    """
    unit_grads, neuron_grads = measured_once(
        "mask gradients", (), model, data, lambda: collect_gradients(model, layers, data)
    )

    def search(ratio: float) -> Masks:
        return search_masks(
            fisher_information(unit_grads),
            fisher_information(neuron_grads),
            [layer.macs_per_unit(seq_len) for layer in layers],
            [layer.macs_per_neuron(seq_len) for layer in layers],
            ratio,
            min_heads if prune_heads else max(layer.num_units for layer in layers),
            min_neurons if prune_neurons else max(layer.num_neurons for layer in layers),
        )

    searched = search(mac_ratio)
    student = Masks(
        [rearrange_mask(g, m) for g, m in zip(unit_grads, searched.units, strict=True)],
        [rearrange_mask(g, m) for g, m in zip(neuron_grads, searched.neurons, strict=True)],
    )
    # If nothing was removed, the scales are exactly 1, not 1 within the tolerance of a solver.
    tune = tune and not all(mask.all() for mask in student.units + student.neurons)
    scales = tune_masks(model, layers, data, search(mac_ratio**0.5), student) if tune else student
    return [
        KeptUnits(keep.nonzero().flatten().tolist(), kept.nonzero().flatten(), a[keep].double(), b[kept].double())
        for keep, kept, a, b in zip(student.units, student.neurons, scales.units, scales.neurons, strict=True)
    ]
