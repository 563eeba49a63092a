"""Applies the regulariser that shrinks whole blocks during a training, and limits its effect."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from hf_compress.methods.weight_pruning.patterns import BlockPattern
from hf_compress.methods.weight_pruning.prunable import PrunableWeight
from hf_compress.methods.weight_pruning.ranking import expected_units
from hf_compress.methods.weight_pruning.regularizers import group_lasso, group_lasso_by_gradient
from hf_compress.methods.weight_pruning.sparsity import pruned_units
from hf_compress.methods.weight_pruning.timetable import ScheduledGroup


def _blocks(scheduled: ScheduledGroup, prunable: PrunableWeight) -> BlockPattern:
    pattern = prunable.pattern(scheduled.config)
    assert isinstance(pattern, BlockPattern), "the config allows a regulariser with blocks and channels only"
    return pattern


class Shrinking:
    """The regularisers of a training.

    Args:
        groups: Those without a `reg_type` are left alone.
    """

    def __init__(self, groups: Sequence[ScheduledGroup]) -> None:
        self._groups = [scheduled for scheduled in groups if scheduled.config.reg_type]
        self._zero_before = {scheduled: pruned_units(scheduled.trained)[0] for scheduled in self._groups}
        # The factor of each weight's elements after the optimizer's step.
        self._factors: dict[PrunableWeight, Tensor] = {}

    def look_at_gradients(self, global_step: int) -> None:
        """Before the optimizer's step: compute what depends on the gradients."""
        self._factors.clear()
        for scheduled in self._groups:
            config = scheduled.config
            if scheduled.shrinks_at(global_step) and config.reg_type == "group_lasso_gradient":
                for prunable in scheduled.trained.weights:
                    if prunable.weight.grad is not None:
                        gradient = prunable.matrix(prunable.weight.grad.detach())
                        factors = group_lasso_by_gradient(gradient, _blocks(scheduled, prunable), config.reg_coeff)
                        self._factors[prunable] = factors

    def shrink(self, global_step: int, optimizer: Optimizer) -> None:
        """After the optimizer's step, unless it was skipped: make the blocks smaller."""
        for scheduled in self._groups:
            config = scheduled.config
            if scheduled.shrinks_at(global_step) and config.reg_type == "group_lasso":
                rates = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
                for prunable in scheduled.trained.weights:
                    if prunable.weight.grad is not None:
                        weight = prunable.matrix(prunable.weight.detach())
                        strength = float(rates[prunable.weight] * config.reg_coeff)
                        self._factors[prunable] = group_lasso(weight, _blocks(scheduled, prunable), strength)
        for prunable, factors in self._factors.items():
            prunable.weight.data.mul_(prunable.like_weight(factors))
        self._factors.clear()

    def check_not_emptied(self, scheduled: ScheduledGroup) -> None:
        """Refuse a regulariser that has made more units zero than pruning was asked for.

        Raises:
            ValueError: Names the coefficient, and how many units are zero.
        """
        config = scheduled.config
        if scheduled not in self._zero_before:
            return
        gone, units = pruned_units(scheduled.trained)
        expected = expected_units(config, scheduled.trained.weights)
        if gone > max(expected, self._zero_before[scheduled]):
            raise ValueError(
                f"reg_coeff={config.reg_coeff:g} is too large: {config.reg_type} has made {gone} of {units} units of "
                f"pattern {config.pattern} zero, and target_sparsity={config.target_sparsity} asks for {expected}."
            )
