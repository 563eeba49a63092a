"""Blocks that a regulariser makes smaller in the course of a training, and how far it may go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hf_compress.methods.weight_pruning.groups import PrunableWeight, pruned_units, unit_counts
from hf_compress.methods.weight_pruning.modeling import expected_units
from hf_compress.methods.weight_pruning.regularizers import group_lasso, group_lasso_by_gradient
from hf_compress.methods.weight_pruning.timetable import PruningRun


class Shrinking:
    """The regularisers of a training's pruning runs.

    Args:
        runs: Those without a `reg_type` are left alone.
    """

    def __init__(self, runs: Sequence[PruningRun] = ()) -> None:
        self.runs = [run for run in runs if run.group.config.reg_type]
        self._zero_before = {run: pruned_units(run.group)[0] for run in self.runs}
        # What is left of each weight, to be multiplied after the optimizer's step.
        self._left: dict[PrunableWeight, Tensor] = {}

    def look_at_gradients(self, step: int) -> None:
        """Before the optimizer's step: what depends on the gradients."""
        self._left.clear()
        for run in self.runs:
            config = run.group.config
            if run.shrinks(step) and config.reg_type == "group_lasso_gradient":
                for layer in run.group.layers:
                    if layer.weight.grad is not None:
                        gradient = layer.matrix(layer.weight.grad.detach())
                        self._left[layer] = group_lasso_by_gradient(gradient, layer.pattern(config), config.reg_coeff)

    def shrink(self, step: int, optimizer: Any) -> None:
        """After the optimizer's step, unless it was skipped: make the blocks smaller."""
        for run in self.runs:
            config = run.group.config
            if run.shrinks(step) and config.reg_type == "group_lasso":
                rates = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
                for layer in (layer for layer in run.group.layers if layer.weight.grad is not None):
                    weight, strength = layer.matrix(layer.weight.detach()), rates[layer.weight] * config.reg_coeff
                    self._left[layer] = group_lasso(weight, layer.pattern(config), float(strength))
        for layer, left in self._left.items():
            layer.weight.data.mul_(layer.like_weight(left))
        self._left.clear()

    def check_not_emptied(self, run: PruningRun) -> None:
        """Refuse a regulariser that has pruned by itself, and more than was asked for.

        Raises:
            ValueError: Names the coefficient, and how many units are zero.
        """
        config = run.group.config
        if run not in self._zero_before:
            return
        gone, units = pruned_units(run.group)
        expected = expected_units(config, unit_counts(config, run.group.layers))
        if gone > max(expected, self._zero_before[run]):
            raise ValueError(
                f"reg_coeff={config.reg_coeff:g} is too large: {config.reg_type} has made {gone} of {units} units of "
                f"pattern {config.pattern} zero, and target_sparsity={config.target_sparsity} asks for {expected}."
            )
