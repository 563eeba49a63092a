"""The pruning updates of a training of a given length. Everything here is a function of `global_step` alone."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from hf_compress.core.engines import is_sharded
from hf_compress.core.schedules import SparsitySchedule
from hf_compress.methods.weight_pruning.config import WeightPruningConfig
from hf_compress.methods.weight_pruning.groups import groups_of
from hf_compress.methods.weight_pruning.patterns import HeadPattern
from hf_compress.methods.weight_pruning.progressive import INCREMENTS
from hf_compress.methods.weight_pruning.prunable import WeightGroup
from hf_compress.methods.weight_pruning.ranking import check_reachable, warn_of_spared


logger = logging.getLogger(__name__)


def schedule_of(config: WeightPruningConfig, max_steps: int, steps_per_epoch: float) -> SparsitySchedule:
    """Plan the pruning updates of a config in a training of `max_steps` updates.

    Raises:
        ValueError: If its pruning updates do not fit.
    """
    oneshot = config.sparsity_decay_type == "oneshot"
    start, end, after = config.start_step, config.end_step, _steps_of_increments(config)
    if end is None:
        # Pruning comes before an update: it would never come before the one numbered `max_steps`.
        end = min(int(max_steps - config.cooldown_epochs * steps_per_epoch), max_steps - 1) - after
    if start is None:
        start = int(config.warmup_epochs * steps_per_epoch)
        # The first update has no gradients to look back at. A gradual schedule prunes nothing at its beginning.
        if config.needs_gradients and (oneshot or end - start < config.pruning_frequency):
            start = max(start, 1)
    schedule = SparsitySchedule(
        config.sparsity_decay_type, config.target_sparsity, start, end, config.pruning_frequency
    )
    if schedule.last + after >= max_steps or (end < start and not oneshot):
        raise ValueError(
            f"start_step, end_step, warmup_epochs and cooldown_epochs must leave room for the schedule: it prunes "
            f"from step {start} to {end} in a training of {max_steps} steps ({steps_per_epoch:g} an epoch, "
            f"cooldown_epochs={config.cooldown_epochs:g})"
            + (f", and {after} steps for the increments of the last pruning update." if config.progressive else ".")
        )
    if config.needs_gradients and schedule.last == 0:
        raise ValueError(
            f"start_step must be at least 1 with criterion={config.criterion!r} and a single pruning update, got 0: "
            "there is no gradient yet."
        )
    if schedule.num_updates == 0 and not oneshot:
        logger.warning(
            "pruning_frequency=%d leaves one pruning update between steps %d and %d: everything is pruned at once.",
            config.pruning_frequency,
            start,
            end,
        )
    return schedule


def _steps_of_increments(config: WeightPruningConfig) -> int:
    """Updates from a pruning update to its last increment."""
    return (INCREMENTS - 1) * (config.pruning_frequency // INCREMENTS) if config.progressive else 0


@dataclass(frozen=True, eq=False)
class ScheduledGroup:
    """One group of weights and its schedule in this training.

    Args:
        trained: The weights that the optimizer has, which alone can be pruned.
        selected: All weights that the config selects; the logged sparsity counts them all.
        schedule: When.
    """

    trained: WeightGroup
    selected: WeightGroup
    schedule: SparsitySchedule

    @property
    def config(self) -> WeightPruningConfig:
        return self.trained.config

    @property
    def last(self) -> int:
        """`global_step` at which the last weights become zero: of the last pruning update or its last increment."""
        return self.schedule.last + _steps_of_increments(self.config)

    def increment(self, global_step: int) -> int:
        """The increment that the latest pruning update has reached; the last one where there are no increments."""
        schedule = self.schedule
        if not self.config.progressive or global_step < schedule.start:
            return INCREMENTS
        number = min((global_step - schedule.start) // schedule.frequency, schedule.num_updates)
        passed = global_step - schedule.start - number * schedule.frequency
        return min(1 + passed // (schedule.frequency // INCREMENTS), INCREMENTS)

    def increments_at(self, global_step: int) -> bool:
        """Whether a later increment of a pruning update is due."""
        due = self.schedule.due(global_step)
        return due is None and self.increment(global_step) > self.increment(global_step - 1)

    def scores_at(self, global_step: int) -> bool:
        """Whether zeros to come depend on the gradients of this update."""
        if self.config.criterion == "snip_momentum":
            return global_step < self.last
        soon = self.schedule.due(global_step + 1) is not None or self.increments_at(global_step + 1)
        return self.config.criterion != "magnitude" and soon

    def shrinks_at(self, global_step: int) -> bool:
        """Whether the regulariser makes blocks smaller after this update."""
        return self.config.reg_type is not None and self.schedule.start <= global_step <= self.schedule.end


def scheduled_groups(
    model: nn.Module, config: WeightPruningConfig, optimizer: Optimizer, max_steps: int, steps_per_epoch: int
) -> list[ScheduledGroup]:
    """Plan which weights a training prunes, and when.

    Raises:
        ValueError: If the optimizer has none of the weights, or target or schedule are out of reach.
    """
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    scheduled = []
    for group in groups_of(model, config):
        weights = [prunable for prunable in group.weights if prunable.weight in trained]
        if not weights:
            raise ValueError(
                f"op_names must select weights that are trained, got {[w.name for w in group.weights]}, "
                "which the optimizer does not have (frozen, or flattened by FSDP1 or DeepSpeed)."
            )
        if len(weights) < len(group.weights) and isinstance(group.config.parsed_pattern, HeadPattern):
            frozen = ", ".join(prunable.name for prunable in group.weights if prunable not in weights)
            raise ValueError(f"pattern='mha' must find all attention projections trained, frozen: {frozen}.")
        if any(is_sharded(prunable.weight) for prunable in weights):
            raise ValueError(
                f"Weight pruning in training must see whole weights, got those of {weights[0].name} in shards (FSDP). "
                "Prune without fsdp (torchrun alone trains with DDP); the pruned model keeps its zeros under FSDP2."
            )
        warn_of_spared(group, weights, "not trained")
        alone = WeightGroup(group.config, weights)
        check_reachable(alone)
        schedule = schedule_of(group.config, max_steps, steps_per_epoch)
        scheduled.append(ScheduledGroup(alone, group, schedule))
    return scheduled
