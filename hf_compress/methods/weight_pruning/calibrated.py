"""Pruning at once with a look at what layers are fed: data streams by, statistics stay.

Letters: R outputs, C inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_compress.core.calibration import call_order, collect_inputs
from hf_compress.core.moments import SecondMoments, device_of_doubles
from hf_compress.core.sweep import sweep
from hf_compress.methods.weight_pruning.config import WeightPruningConfig
from hf_compress.methods.weight_pruning.criteria import wanda
from hf_compress.methods.weight_pruning.prunable import PrunableWeight
from hf_compress.methods.weight_pruning.reconstruction import inverse_factor, prune_and_reconstruct


Data = Iterable[Mapping[str, Any]]


class ColumnNorms:
    """Euclidean norm of every column over the rows seen so far.

    Args:
        width: C.
        device: Where to accumulate; devices without float64 are replaced by the CPU.

    Example:
        >>> norms = ColumnNorms(2)
        >>> norms.update(torch.tensor([[3.0, 1.0], [4.0, 0.0]]))
        >>> norms.value.tolist()
        [5.0, 1.0]
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self._squares = torch.zeros(width, dtype=torch.float64, device=device_of_doubles(device))

    def update(self, rows: Tensor) -> None:
        rows = rows.detach().to(self._squares.device)
        self._squares += torch.linalg.vector_norm(rows, dim=0, dtype=torch.float64).square_()

    @property
    def value(self) -> Tensor:
        """[C] float64."""
        return self._squares.sqrt()


def _width(layer: PrunableWeight) -> int:
    return layer.matrix(layer.weight).shape[1]


def check_linear(model: nn.Module, config: WeightPruningConfig, layers: Sequence[PrunableWeight]) -> None:
    """Refuse layers that do not multiply their input by their weight.

    Raises:
        ValueError: Names the first one.
    """
    for layer in layers:
        module = model.get_submodule(layer.name)
        if not isinstance(module, nn.Linear | Conv1D):
            raise ValueError(
                f"pruning_op_types must be linear layers (Linear, Conv1D) with criterion={config.criterion!r}, got "
                f"{type(module).__name__} at {layer.name}."
            )


def _require_called(names: Iterable[str], called: set[str], criterion: str) -> None:
    for name in names:
        if name not in called:
            raise ValueError(
                f"op_names must select layers that the base model runs with criterion={criterion!r}, got {name}, "
                "which no token reaches."
            )


def wanda_scores(
    model: PreTrainedModel, layers: Sequence[tuple[WeightPruningConfig, PrunableWeight]], data: Data
) -> dict[PrunableWeight, Tensor]:
    """Scores of the patterns' units from one pass of the data through the model as it is.

    Args:
        model: Not changed.
        layers: Linear layers, each with its config.
        data: Batches of inputs, read once. Padding does not count.

    Returns:
        For each layer what `Pattern.reduce` makes of its scores, float32.

    Raises:
        ValueError: If a layer is not reached, sees something else than tokens, or gets non-finite inputs.
    """
    modules = {layer.name: model.get_submodule(layer.name) for _, layer in layers}
    norms = {layer.name: ColumnNorms(_width(layer), layer.weight.device) for _, layer in layers}
    called: set[str] = set()
    handles = [m.register_forward_pre_hook(lambda *_, n=n: called.add(n)) for n, m in modules.items()]
    try:
        collect_inputs(model, modules, norms, data, description="input norms", whole=True)
    finally:
        for handle in handles:
            handle.remove()
    _require_called(modules, called, "wanda")
    scores = {}
    for config, layer in layers:
        weight = layer.matrix(layer.weight.detach()).float()
        elements = wanda(weight, norms[layer.name].value.to(weight))
        scores[layer] = layer.pattern(config).reduce(elements, config.criterion_reduce_type)
    return scores


def reconstruct_(
    model: PreTrainedModel, layers: Sequence[tuple[WeightPruningConfig, PrunableWeight, int]], data: Data
) -> None:
    """Prune layers in the order in which they run; each one sees the inputs that the pruned ones before it make.

    One Gram matrix exists at a time; layers with the same input (query, key and value) share it.

    Args:
        model: Changed in place.
        layers: Linear layers, each with its config and the number of units to prune.
        data: Batches of inputs that can be read again and again. Padding does not count.

    Raises:
        ValueError: If a layer is not reached, sees something else than tokens, or gets non-finite inputs.
    """
    modules = {layer.name: model.get_submodule(layer.name) for _, layer, _ in layers}
    entries = {layer.name: (config, layer, count) for config, layer, count in layers}
    first = next(iter(data), None)
    if first is None:
        raise ValueError("data must hold at least one batch, got none.")
    calls = call_order(model, modules, first)
    _require_called(modules, {name for name, _ in calls}, "sparsegpt")
    for names, observe in sweep(model, calls, data):
        leader = entries[names[0]][1]
        moments = SecondMoments(_width(leader), leader.weight.device)
        observe(moments)
        factor = inverse_factor(moments.gram)
        del moments
        for name in names:
            config, layer, count = entries[name]
            weight, reduction = layer.matrix(layer.weight.detach()), config.criterion_reduce_type
            pruned = prune_and_reconstruct(weight, factor, config.parsed_pattern, count, reduction)
            # Not in place: until all is done, the old values are what a failure goes back to.
            layer.weight.data = layer.like_weight(pruned)
