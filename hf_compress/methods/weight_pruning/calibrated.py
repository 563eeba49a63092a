"""Prunes at once by the inputs of the modules: it reads the data once and keeps only statistics.

Letters: C inputs of a module.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_compress.core.calibration import call_order, collect_inputs
from hf_compress.core.data_needs import Data
from hf_compress.core.moments import SecondMoments, device_of_doubles
from hf_compress.core.processes import all_told, first_told
from hf_compress.core.sweep import sweep
from hf_compress.core.watching import Before, watched
from hf_compress.methods.weight_pruning.config import WeightPruningConfig
from hf_compress.methods.weight_pruning.criteria import wanda
from hf_compress.methods.weight_pruning.prunable import PrunableWeight
from hf_compress.methods.weight_pruning.reconstruction import inverse_factor, prune_and_reconstruct


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

    def sums(self) -> Iterable[Tensor]:
        return [self._squares]

    @property
    def value(self) -> Tensor:
        """[C] float64."""
        return self._squares.sqrt()


def _width(prunable: PrunableWeight) -> int:
    return prunable.matrix(prunable.weight).shape[1]


def check_linear(model: nn.Module, config: WeightPruningConfig, weights: Sequence[PrunableWeight]) -> None:
    """Refuse weights of modules that are not linear.

    Raises:
        ValueError: Names the first one.
    """
    for prunable in weights:
        module = model.get_submodule(prunable.name)
        if not isinstance(module, nn.Linear | Conv1D):
            raise ValueError(
                f"pruning_op_types must be linear layers (Linear, Conv1D) with criterion={config.criterion!r}, got "
                f"{type(module).__name__} at {prunable.name}."
            )


def _require_called(names: Iterable[str], called: set[str], criterion: str) -> None:
    for name in names:
        if name not in called:
            raise ValueError(
                f"op_names must select layers that the base model runs with criterion={criterion!r}, got {name}, "
                "which no token reaches."
            )


def wanda_scores(
    model: PreTrainedModel, weights: Sequence[tuple[WeightPruningConfig, PrunableWeight]], data: Data
) -> dict[PrunableWeight, Tensor]:
    """Scores of the patterns' units from one pass of the data through the model as it is.

    Args:
        model: Not changed.
        weights: Of linear modules, each with its config.
        data: Batches of inputs, read once. Padding does not count.

    Returns:
        For each weight what `Pattern.reduce` makes of its scores, float32.

    Raises:
        ValueError: If a module does not run, sees something else than tokens, or gets non-finite inputs.
    """
    modules = {prunable.name: model.get_submodule(prunable.name) for _, prunable in weights}
    norms = {prunable.name: ColumnNorms(_width(prunable), prunable.weight.device) for _, prunable in weights}
    called: set[str] = set()

    def caller(name: str) -> Before:
        return lambda args, kwargs: called.add(name)

    with watched(before=[(module, caller(name)) for name, module in modules.items()]):
        collect_inputs(model, modules, norms, data, description="input norms", whole=True)
    _require_called(modules, set().union(*all_told(called)), "wanda")
    scores = {}
    for config, prunable in weights:
        weight = prunable.matrix(prunable.weight.detach()).float()
        elements = wanda(weight, norms[prunable.name].value.to(weight))
        scores[prunable] = prunable.pattern(config).reduce(elements, config.criterion_reduce_type)
    return scores


def reconstruct_(
    model: PreTrainedModel, weights: Sequence[tuple[WeightPruningConfig, PrunableWeight, int]], data: Data
) -> None:
    """Prune weights in the order in which their modules run, each with the inputs of the pruned model.

    One Gram matrix exists at a time; modules with the same input (query, key and value) share it.

    Args:
        model: Changed in place.
        weights: Of linear modules, each with its config and the number of units to prune.
        data: Batches of inputs that can be read again and again. Padding does not count.

    Raises:
        ValueError: If a module does not run, sees something else than tokens, or gets non-finite inputs.
    """
    modules = {prunable.name: model.get_submodule(prunable.name) for _, prunable, _ in weights}
    entries = {prunable.name: (config, prunable, count) for config, prunable, count in weights}
    first = next(iter(data), None)
    calls = first_told(None if first is None else call_order(model, modules, first))
    if calls is None:
        raise ValueError("data must hold at least one batch, got none.")
    _require_called(modules, {name for name, _ in calls}, "sparsegpt")
    for names, observe in sweep(model, calls, data):
        leader = entries[names[0]][1]
        moments = SecondMoments(_width(leader), leader.weight.device)
        observe(moments)
        factor = inverse_factor(moments.gram)
        del moments
        for name in names:
            config, prunable, count = entries[name]
            pattern, reduction = prunable.pattern(config), config.criterion_reduce_type
            pruned = prune_and_reconstruct(
                prunable.matrix(prunable.weight.detach()), factor, pattern, count, reduction
            )
            # Not in place: if anything fails later, the old values are restored.
            prunable.weight.data = prunable.like_weight(pruned)
