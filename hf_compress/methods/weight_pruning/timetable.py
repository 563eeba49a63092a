"""When pruning is due in a training of a given length."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_compress.core.schedules import SparsitySchedule
from hf_compress.methods.weight_pruning.config import WeightPruningConfig
from hf_compress.methods.weight_pruning.groups import Group, groups_of
from hf_compress.methods.weight_pruning.modeling import check_reachable, warn_of_spared
from hf_compress.methods.weight_pruning.patterns import HeadPattern
from hf_compress.methods.weight_pruning.progressive import STAGES


logger = logging.getLogger(__name__)


def schedule_of(config: WeightPruningConfig, max_steps: int, steps_per_epoch: float) -> SparsitySchedule:
    """When a config prunes in a training of `max_steps` steps.

    Raises:
        ValueError: If its updates do not fit.
    """
    oneshot = config.sparsity_decay_type == "oneshot"
    start, end = config.start_step, config.end_step
    if end is None:
        # Updates come at the beginning of a step: one at `max_steps` would never come.
        end = min(int(max_steps - config.cooldown_epochs * steps_per_epoch), max_steps - 1)
        end -= _stage_steps(config)
    if start is None:
        start = int(config.warmup_epochs * steps_per_epoch)
        # The first step has no gradients to look back at. A gradual schedule prunes nothing at its first update.
        if config.needs_gradients and (oneshot or end - start < config.pruning_frequency):
            start = max(start, 1)
    schedule = SparsitySchedule(
        config.sparsity_decay_type, config.target_sparsity, start, end, config.pruning_frequency
    )
    if schedule.last + _stage_steps(config) >= max_steps or (end < start and not oneshot):
        raise ValueError(
            f"start_step, end_step, warmup_epochs and cooldown_epochs must leave room for the schedule: updates from "
            f"step {start} to {end} in a training of {max_steps} steps ({steps_per_epoch:g} an epoch, "
            f"cooldown_epochs={config.cooldown_epochs:g})"
            + (f", and {_stage_steps(config)} steps for the stages of the last update." if config.progressive else ".")
        )
    if config.needs_gradients and schedule.last == 0:
        raise ValueError(
            f"start_step must be at least 1 with criterion={config.criterion!r} and a single update, got 0: "
            "there is no gradient yet."
        )
    if schedule.num_updates == 0 and not oneshot:
        logger.warning(
            "pruning_frequency=%d leaves one update between steps %d and %d: everything is pruned at once.",
            config.pruning_frequency,
            start,
            end,
        )
    return schedule


def _stage_steps(config: WeightPruningConfig) -> int:
    """Steps from an update to its last stage."""
    return (STAGES - 1) * (config.pruning_frequency // STAGES) if config.progressive else 0


@dataclass(frozen=True, eq=False)
class PruningRun:
    """One group of layers and its schedule in the training at hand.

    Args:
        group: The layers that are trained, which alone can be pruned.
        schedule: When.
        selected: All layers that the config selects; the logged sparsity counts them all.
    """

    group: Group
    schedule: SparsitySchedule
    selected: Group

    @property
    def last(self) -> int:
        """Step at which the last zeros come: that of the last update, or of its last stage."""
        return self.schedule.last + _stage_steps(self.group.config)

    def stage(self, step: int) -> int:
        """The stage that the update before or at this step has reached; the last one where there are no stages."""
        schedule = self.schedule
        if not self.group.config.progressive or step < schedule.start:
            return STAGES
        update = min((step - schedule.start) // schedule.frequency, schedule.num_updates)
        passed = step - schedule.start - update * schedule.frequency
        return min(1 + passed // (schedule.frequency // STAGES), STAGES)

    def advances(self, step: int) -> bool:
        """Whether a later stage of an update begins at this step."""
        return self.schedule.due(step) is None and self.stage(step) > self.stage(step - 1)

    def scores_at(self, step: int) -> bool:
        """Whether zeros to come depend on this step's gradients."""
        criterion = self.group.config.criterion
        if criterion == "snip_momentum":
            return step < self.last
        soon = self.schedule.due(step + 1) is not None or self.advances(step + 1)
        return criterion != "magnitude" and soon

    def shrinks(self, step: int) -> bool:
        """Whether blocks are made smaller after this step."""
        return self.group.config.reg_type is not None and self.schedule.start <= step <= self.schedule.end


def runs_of(
    model: nn.Module, config: WeightPruningConfig, optimizer: Any, max_steps: int, steps_per_epoch: float
) -> list[PruningRun]:
    """What a training prunes, and when.

    Raises:
        ValueError: If the optimizer has none of the layers, or target or schedule are out of reach.
    """
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    runs = []
    for group in groups_of(model, config):
        layers = [layer for layer in group.layers if layer.weight in trained]
        if not layers:
            raise ValueError(
                f"op_names must select weights that are trained, got {[layer.name for layer in group.layers]}, "
                "which the optimizer does not have (frozen, or sharded by FSDP or DeepSpeed)."
            )
        if len(layers) < len(group.layers) and isinstance(group.config.parsed_pattern, HeadPattern):
            frozen = ", ".join(layer.name for layer in group.layers if layer not in layers)
            raise ValueError(f"pattern='mha' must find all attention projections trained, frozen: {frozen}.")
        warn_of_spared(group, layers, "not trained")
        alone = Group(group.config, layers)
        check_reachable(alone)
        runs.append(PruningRun(alone, schedule_of(group.config, max_steps, steps_per_epoch), group))
    return runs
