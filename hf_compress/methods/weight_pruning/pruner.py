"""Prunes weights during one training: one method for each event of the training."""

from __future__ import annotations

import logging
from collections.abc import Collection

from torch import Tensor, nn
from torch.optim import Optimizer

from hf_compress.methods.weight_pruning.prunable import WeightGroup
from hf_compress.methods.weight_pruning.ranking import expected_units, warn_of_spared
from hf_compress.methods.weight_pruning.shrinking import Shrinking
from hf_compress.methods.weight_pruning.sparsity import pruned_units, sparsity_of
from hf_compress.methods.weight_pruning.state import PruningState
from hf_compress.methods.weight_pruning.timetable import ScheduledGroup
from hf_compress.methods.weight_pruning.zeros import Zeros


logger = logging.getLogger(__name__)


def _loss_scale(optimizer: Optimizer) -> float:
    """The factor that mixed precision puts on the loss; it falls when a step is skipped."""
    scaler = getattr(optimizer, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


class Pruner:
    """Prunes the weights of one training by its timetable.

    Args:
        groups: The weights to prune, and their schedules.
        optimizer: Of the training.
        model: Zeros of its earlier steps are kept where no group decides.
        global_step: Updates made so far, more than none when a training resumes.

    Raises:
        ValueError: If the checkpoint that is resumed lacks the optimizer's state or is of another pattern, or if the
            model holds the record of another package.
    """

    def __init__(self, groups: list[ScheduledGroup], optimizer: Optimizer, model: nn.Module, global_step: int) -> None:
        self.groups, self._optimizer = groups, optimizer
        self._zeros = Zeros()
        if getattr(model, "config", None) is not None:
            # A record of another package stops the training here, not at the last pruning update.
            self._zeros.hold_recorded(model, {w.weight for scheduled in groups for w in scheduled.selected.weights})
        self._shrinking = Shrinking(groups)
        self._state = PruningState(optimizer, self._zeros)
        # Groups whose pruning update waits because mixed precision skipped the steps that could have given scores.
        self._late: set[ScheduledGroup] = set()
        self._scale, self._skipped = 1.0, False
        self.sparsity = 0.0
        for scheduled in groups:
            self._state.restore(scheduled, global_step)
        self._zeros.enforce()
        self._measure()

    @property
    def last_update(self) -> int:
        """`global_step` of the last pruning update or increment of all groups."""
        return max(scheduled.last for scheduled in self.groups)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Name of a module -> which elements of its weight are pruned; missing where nothing is yet."""
        return {prunable.name: mask for prunable, mask in self._state.masks.items()}

    def is_done(self, global_step: int) -> bool:
        """Whether no more zeros come after what was due at `global_step`."""
        return global_step >= self.last_update and not self._late

    def leave(self, weights: Collection[nn.Parameter]) -> None:
        """Stop keeping zeros in these weights, because another callback prunes them."""
        self._zeros.release(weights)

    def prune(self, global_step: int) -> bool:
        """Before an update: set the weights to zero that are due.

        Returns:
            Whether anything was due.
        """
        due = [s for s in self.groups if s in self._late or s.schedule.due(global_step) is not None]
        advancing = [s for s in self.groups if s not in due and s.increments_at(global_step)]
        for scheduled in due:
            self._shrinking.check_not_emptied(scheduled)
            self._update(scheduled, global_step)
        for scheduled in advancing:
            self._state.advance(scheduled.trained, scheduled.increment(global_step))
        if due or advancing:
            self._zeros.enforce()
            self._measure()
        return bool(due or advancing)

    def _update(self, scheduled: ScheduledGroup, global_step: int) -> None:
        sparsity, group = scheduled.schedule.in_force(global_step + 1), scheduled.trained
        if sparsity == 0:
            return
        scores = self._state.scored(group)
        if not scores and self._skipped:
            logger.warning("Pruning waits for the next step: mixed precision skipped the last one (overflow).")
            self._late.add(scheduled)
            return
        if not scores:
            raise ValueError(
                f"The loss must depend on the weights to prune, got no gradient for any of {len(group.weights)}."
            )
        self._late.discard(scheduled)
        warn_of_spared(group, list(scores), "no gradient reaches them")
        self._state.prune(scheduled.config, scores, sparsity)
        if scheduled.config.progressive:
            self._state.advance(group, scheduled.increment(global_step))

    def look_at_gradients(self, global_step: int) -> None:
        """Before the optimizer's step, when gradients are accumulated and clipped."""
        self._scale = _loss_scale(self._optimizer)
        self._shrinking.look_at_gradients(global_step)
        for scheduled in self.groups:
            if scheduled.scores_at(global_step) or scheduled in self._late:
                self._state.look_at_gradients(scheduled.trained)

    def end_step(self, global_step: int) -> None:
        """After the optimizer's step: keep scores, shrink blocks, and make zero again what the step moved."""
        # After infinite gradients; `step_was_skipped` does not see that of fused optimizers.
        self._skipped = _loss_scale(self._optimizer) < self._scale
        self._state.end_step(self._skipped)
        if not self._skipped:
            self._shrinking.shrink(global_step, self._optimizer)
        self._zeros.enforce()

    def _measure(self) -> None:
        self.sparsity = self.achieved_sparsity() if self._state.masks else 0.0

    def achieved_sparsity(self) -> float:
        """The sparsity of the live weights; units that are zero by chance count too."""
        return sparsity_of([scheduled.selected for scheduled in self.groups])

    def check_targets(self) -> None:
        """At the end of a training: refuse a target that is not met, and a regulariser that has pruned by itself.

        Raises:
            ValueError: Names the target or the coefficient.
        """
        for scheduled in self.groups:
            config = scheduled.config
            weights = [prunable for prunable in scheduled.trained.weights if prunable in self._state.masks]
            gone, _ = pruned_units(WeightGroup(config, weights))
            expected = expected_units(config, weights)
            if gone < expected:
                raise ValueError(
                    f"target_sparsity={config.target_sparsity} was not kept: {gone} of {expected} units of pattern "
                    f"{config.pattern} are zero at the end of training. Something changed the weights after the last "
                    "pruning update, e.g. a checkpoint from before it was loaded."
                )
            self._shrinking.check_not_emptied(scheduled)
