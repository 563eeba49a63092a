"""The state of a training that prunes weights: masks, scores, and the plan of an unfinished pruning update.

State that cannot be computed again is also kept in the optimizer's state, so that checkpoints hold it and a resumed
training continues exactly.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_compress.methods.weight_pruning.config import WeightPruningConfig
from hf_compress.methods.weight_pruning.progressive import masks_at, plan_of
from hf_compress.methods.weight_pruning.prunable import PrunableWeight, WeightGroup
from hf_compress.methods.weight_pruning.ranking import updated_scores, zero_masks
from hf_compress.methods.weight_pruning.timetable import ScheduledGroup
from hf_compress.methods.weight_pruning.zeros import Zeros


# Keys in `optimizer.state[weight]`: scores of units; bool, True where the weight is zero; what an update that comes in
# increments does to each element.
SCORE, PRUNED, PLAN = "prune_score", "pruned", "prune_plan"


class PruningState:
    """Masks and scores of the weights of one training.

    Args:
        optimizer: Its state is what checkpoints carry.
        zeros: Keeps zero what the masks say.
    """

    def __init__(self, optimizer: Optimizer, zeros: Zeros) -> None:
        self._optimizer, self._zeros = optimizer, zeros
        self.masks: dict[PrunableWeight, Tensor] = {}
        self._plans: dict[PrunableWeight, Tensor] = {}
        # `magnitude` looks at the weights as they were at the pruning update, through all its increments.
        self._plan_scores: dict[PrunableWeight, Tensor] = {}
        # From the gradients of this update, until it is clear that the optimizer makes it.
        self._fresh_scores: dict[PrunableWeight, Tensor] = {}

    def restore(self, scheduled: ScheduledGroup, global_step: int) -> None:
        """Take up what a checkpoint's optimizer state holds; loading has cast its bools to the weights' dtype.

        Raises:
            ValueError: If it holds nothing although pruning has begun, or was written with another pattern.
        """
        config, group = scheduled.config, scheduled.trained
        for prunable in group.weights:
            stored = self._optimizer.state.get(prunable.weight, {})
            if PRUNED in stored:
                stored[PRUNED] = stored[PRUNED].bool()
            require_pattern(config, prunable, stored.get(PRUNED), stored.get(SCORE))
            if PRUNED in stored:
                self._set_mask(prunable, stored[PRUNED])
            if PLAN in stored:
                self._plans[prunable] = stored[PLAN] = stored[PLAN].to(torch.uint8)
                if config.criterion == "magnitude":
                    self._plan_scores[prunable] = stored[SCORE]
        if scheduled.schedule.in_force(global_step) == 0:
            return
        if not any(prunable in self.masks for prunable in group.weights):
            raise ValueError(
                "resume_from_checkpoint must hold the optimizer's state, where masks and scores are: step "
                f"{global_step} comes after the first pruning update. Checkpoints written with save_only_model cannot "
                "be resumed."
            )
        if config.criterion == "magnitude":
            # Weights that no gradient has reached yet were pruned as well, but the optimizer has no state of them.
            for prunable in group.weights:
                if prunable not in self.masks:
                    self._set_mask(prunable, prunable.weight.detach() == 0)

    def scored(self, group: WeightGroup) -> dict[PrunableWeight, Tensor]:
        """The scores of those weights of a group that have some now."""
        found: dict[PrunableWeight, Tensor] = {}
        for prunable in group.weights:
            if group.config.criterion == "magnitude":
                found[prunable] = updated_scores(group.config, prunable)
            elif SCORE in (stored := self._optimizer.state.get(prunable.weight, {})):
                found[prunable] = stored[SCORE]
        return found

    def prune(self, config: WeightPruningConfig, scores: dict[PrunableWeight, Tensor], sparsity: float) -> None:
        """Decide which elements are zero; with `progressive`, `advance` brings them."""
        weights, before = list(scores), [self.masks.get(prunable) for prunable in scores]
        masks = zero_masks(config, weights, list(scores.values()), before, sparsity)
        for prunable, mask in zip(weights, masks, strict=True):
            if not config.progressive:
                self._set_mask(prunable, mask)
                continue
            self._plans[prunable] = plan_of(self.masks.get(prunable), mask)
            if config.criterion == "magnitude":
                self._plan_scores[prunable] = scores[prunable]
        self._save(weights)

    def advance(self, group: WeightGroup, increment: int) -> None:
        """Apply the next increments of the last pruning update."""
        weights = [prunable for prunable in group.weights if prunable in self._plans]
        if not weights:
            return
        plans = [self._plans[prunable] for prunable in weights]
        scores = [
            self._plan_scores[prunable]
            if prunable in self._plan_scores
            else self._optimizer.state[prunable.weight][SCORE]
            for prunable in weights
        ]
        now = [self.masks.get(prunable) for prunable in weights]
        masks = masks_at(group.config, weights, plans, scores, now, increment)
        for prunable, mask in zip(weights, masks, strict=True):
            self._set_mask(prunable, mask)
        self._save(weights)

    def look_at_gradients(self, group: WeightGroup) -> None:
        """Before the optimizer's step: compute scores from the gradients that it is about to use."""
        for prunable in group.weights:
            # Without the loss scale, which `Trainer` undoes to measure the norm, whether it clips or not.
            gradient = prunable.weight.grad
            if gradient is not None:
                stored = self._optimizer.state.get(prunable.weight, {}).get(SCORE)
                self._fresh_scores[prunable] = updated_scores(group.config, prunable, gradient, stored)

    def end_step(self, skipped: bool) -> None:
        """After the optimizer's step: keep what the gradients said, unless mixed precision skipped the step."""
        if not skipped:
            for prunable, score in self._fresh_scores.items():
                self._optimizer.state[prunable.weight][SCORE] = score
            self._save(self.masks, stepped=True)
        self._fresh_scores.clear()

    def _set_mask(self, prunable: PrunableWeight, mask: Tensor) -> None:
        self.masks[prunable] = mask
        self._zeros.hold(prunable, mask)

    def _save(self, weights: Iterable[PrunableWeight], stepped: bool = False) -> None:
        """Put the state that cannot be computed again into the optimizer's state."""
        state = self._optimizer.state
        for prunable in weights:
            # Optimizers set their state up at their first step, and only where there is none at all.
            if state.get(prunable.weight) or (stepped and prunable.weight.grad is not None):
                for key, values in ((PRUNED, self.masks), (PLAN, self._plans), (SCORE, self._plan_scores)):
                    if prunable in values:
                        state[prunable.weight][key] = values[prunable]


def require_pattern(
    config: WeightPruningConfig, prunable: PrunableWeight, mask: Tensor | None, scores: Tensor | None
) -> None:
    """Refuse the state of a weight in a checkpoint that was made with another pattern.

    Args:
        config: The config of the resumed training.
        prunable: Which weight.
        mask: Of the weight's shape, True for zero; None when nothing was pruned.
        scores: In the form that `reduce` of the pattern gives; None when there are none.

    Raises:
        ValueError: If they do not fit.
    """
    pattern = prunable.pattern(config)
    reduced = pattern.reduce(prunable.matrix(prunable.weight.detach()), config.criterion_reduce_type)
    fits = scores is None or scores.shape == reduced.shape
    # Between the increments of a progressive update, units are zero in part.
    if fits and mask is not None and not config.progressive:
        matrix = prunable.matrix(mask)
        whole = pattern.spread(pattern.pruned_units(matrix), reduced, prunable.nothing_pruned())
        fits = int(whole.sum()) == int(matrix.sum())
    if not fits:
        raise ValueError(
            f"resume_from_checkpoint was written with another pattern than {config.pattern!r}: its state of "
            f"{prunable.name} has another shape. Resume with that pattern, or begin anew."
        )
