"""How training prunes: one callback for any `Trainer`, stock or ours.

What is due at a step is a pure function of the step. What cannot be computed again (accumulated scores, which weights
are pruned) lives in the optimizer's state, so that checkpoints carry it and resumed training goes on exactly.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from hf_compress.core.own_config import own_config_
from hf_compress.core.record import append_step, record_of
from hf_compress.methods.weight_pruning.config import NAME, WeightPruningConfig
from hf_compress.methods.weight_pruning.criteria import CRITERIA
from hf_compress.methods.weight_pruning.groups import (
    Group,
    PrunableWeight,
    pruned_units,
    require_pattern,
    sparsity_of,
    unit_counts,
)
from hf_compress.methods.weight_pruning.modeling import expected_units, prune_layers, step_scores, warn_of_spared
from hf_compress.methods.weight_pruning.progressive import staged, zeros_at
from hf_compress.methods.weight_pruning.shrinking import Shrinking
from hf_compress.methods.weight_pruning.timetable import PruningRun, runs_of
from hf_compress.methods.weight_pruning.zeros import HeldZerosCallback, Zeros, decide, decided_elsewhere, forget


logger = logging.getLogger(__name__)

# Keys in `optimizer.state[weight]`: scores, a bool tensor that is True where the weight is zero, and what an update
# that comes in stages makes of each weight.
SCORE, PRUNED, PLAN = "prune_score", "pruned", "prune_plan"


def keep_zeros(callbacks: Sequence[TrainerCallback]) -> TrainerCallback | None:
    """What training a pruned model needs besides the callbacks it has."""
    decided = any(isinstance(callback, (WeightPruningCallback, HeldZerosCallback)) for callback in callbacks)
    return None if decided else HeldZerosCallback()


def _loss_scale(optimizer: Any) -> float:
    """The factor that mixed precision puts on the loss; it falls when a step is skipped."""
    scaler = getattr(optimizer, "scaler", None)
    return 1.0 if scaler is None else scaler.get_scale()


class WeightPruningCallback(TrainerCallback):
    """Prunes the weights of a model in training and keeps them zero; add it to any Trainer script.

    Zeros of earlier steps stay in the layers that it does not select; those that it selects are decided anew. Several
    of these callbacks may prune one model, in different layers.

    Logs `prune/sparsity`: in our trainers everywhere, in a stock `Trainer` in `state.log_history` and in callbacks
    that were added later. With `load_best_model_at_end`, checkpoints from before the last update do not compete.

    Args:
        config: What to reach, and when. The finished step is recorded in the model's config.

    Raises:
        ValueError: When training begins, if the config does not fit model or number of steps, or the checkpoint it
            resumes from lacks the optimizer's state; when it ends, if the target is not reached.

    Source:
        Order of events of Intel Neural Compressor 2.6: an update at the beginning of a step, scores from the weights
        and (clipped, accumulated) gradients right before the optimizer's step, zeros restored right after it.

    Example:
        >>> callback = WeightPruningCallback(WeightPruningConfig(pattern="2:4", target_sparsity=0.5))
        >>> # Trainer(model, args, train_dataset=..., callbacks=[callback]).train()
    """

    def __init__(self, config: WeightPruningConfig) -> None:
        if not isinstance(config, WeightPruningConfig):
            raise ValueError(f"config must be a WeightPruningConfig, got {type(config).__name__}.")
        for entry in config.resolved():
            if entry.needs_inputs:
                raise ValueError(
                    f"criterion must be one of {', '.join(CRITERIA)} in training, got {entry.criterion!r}: it needs "
                    "calibration data. Use hf_compress.compress(model, config, data=...)."
                )
        self.config = config
        self._clear()

    def _clear(self) -> None:
        forget(self)
        self._runs: list[PruningRun] = []
        self._shrinking = Shrinking()
        self._pruned: dict[PrunableWeight, Tensor] = {}
        self._zeros = Zeros()
        self._fresh: dict[PrunableWeight, Tensor] = {}
        self._plans: dict[PrunableWeight, Tensor] = {}
        # `magnitude` looks at the weights as they were at the update, through all its stages.
        self._update_scores: dict[PrunableWeight, Tensor] = {}
        self._sparsity = 0.0
        self._scale, self._skipped = 1.0, False
        self._late: set[PruningRun] = set()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        self._clear()
        # As `Trainer` counts: data without a length are one epoch.
        steps_per_epoch = state.max_steps
        if has_length(train_dataloader):
            steps_per_epoch = max(-(-len(train_dataloader) // args.gradient_accumulation_steps), 1)
        self._runs = runs_of(model, self.config, optimizer, state.max_steps, steps_per_epoch)
        decide(optimizer, self, [layer for run in self._runs for layer in run.selected.layers])
        if getattr(model, "config", None) is not None:
            # A record of another package stops the training here, not at the last update.
            self._zeros.hold_recorded(model, {layer.weight for run in self._runs for layer in run.selected.layers})
        self._shrinking = Shrinking(self._runs)
        self._restore(optimizer, state.global_step)
        if state.global_step > self._last_update:
            self._record(model)

    @property
    def _last_update(self) -> int:
        return max(run.last for run in self._runs)

    def _restore(self, optimizer: Any, step: int) -> None:
        """Take up what a checkpoint's optimizer state says; loading has cast its bools to the weights' dtype."""
        for run in self._runs:
            for layer in run.group.layers:
                stored = optimizer.state.get(layer.weight, {})
                if PRUNED in stored:
                    stored[PRUNED] = stored[PRUNED].bool()
                require_pattern(run.group.config, layer, stored.get(PRUNED), stored.get(SCORE))
                if PRUNED in stored:
                    self._set_mask(layer, stored[PRUNED])
                if PLAN in stored:
                    self._plans[layer] = stored[PLAN] = stored[PLAN].to(torch.uint8)
                    if run.group.config.criterion == "magnitude":
                        self._update_scores[layer] = stored[SCORE]
            if run.schedule.in_force(step) > 0 and not any(layer in self._pruned for layer in run.group.layers):
                raise ValueError(
                    f"resume_from_checkpoint must hold the optimizer's state, where masks and scores are: step {step} "
                    "comes after the first update. Checkpoints written with save_only_model cannot be resumed."
                )
            if run.group.config.criterion == "magnitude" and run.schedule.in_force(step) > 0:
                # Layers that no gradient has reached yet were pruned as well, but the optimizer knows nothing of them.
                for layer in run.group.layers:
                    if layer not in self._pruned:
                        self._set_mask(layer, layer.weight.detach() == 0)
        self._zeros.enforce()
        self._measure()

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        step = state.global_step
        # Known when every callback has begun.
        self._zeros.release(decided_elsewhere(optimizer, self))
        due = [run for run in self._runs if run in self._late or run.schedule.due(step) is not None]
        for run in due:
            self._shrinking.check_not_emptied(run)
            self._update(run, run.schedule.in_force(step + 1), run.stage(step), optimizer)
        advancing = [run for run in self._runs if run not in due and run.advances(step)]
        for run in advancing:
            self._advance(run, run.stage(step), optimizer)
        if due or advancing:
            self._zeros.enforce()
            self._measure()
            if step >= self._last_update and not self._late:
                self._record(model)

    def _update(self, run: PruningRun, sparsity: float, stage: int, optimizer: Any) -> None:
        if sparsity == 0:
            return
        config, layers, scores = run.group.config, [], []
        for layer in run.group.layers:
            if config.criterion == "magnitude":
                score = step_scores(config, layer, None, None)
            else:
                score = optimizer.state.get(layer.weight, {}).get(SCORE)
            if score is not None:
                layers.append(layer)
                scores.append(score)
        if not layers:
            if self._skipped:
                logger.warning("Pruning waits for the next step: mixed precision skipped the last one (overflow).")
                self._late.add(run)
                return
            raise ValueError(
                f"The loss must depend on the layers to prune, got no gradient for any of {len(run.group.layers)}."
            )
        self._late.discard(run)
        warn_of_spared(run.group, layers, "no gradient reaches them")
        masks = prune_layers(config, layers, scores, [self._pruned.get(layer) for layer in layers], sparsity)
        for layer, mask, score in zip(layers, masks, scores, strict=True):
            if config.progressive:
                self._plans[layer] = staged(self._pruned.get(layer), mask)
                if config.criterion == "magnitude":
                    self._update_scores[layer] = score
            else:
                self._set_mask(layer, mask)
        if config.progressive:
            self._advance(run, stage, optimizer)
        self._save(layers, optimizer)

    def _advance(self, run: PruningRun, stage: int, optimizer: Any) -> None:
        """Let more of the zeros come that the last update decided on."""
        layers = [layer for layer in run.group.layers if layer in self._plans]
        if not layers:
            return
        scores = [
            self._update_scores[layer] if layer in self._update_scores else optimizer.state[layer.weight][SCORE]
            for layer in layers
        ]
        now = [self._pruned.get(layer) for layer in layers]
        masks = zeros_at(run.group.config, layers, [self._plans[layer] for layer in layers], scores, now, stage)
        for layer, mask in zip(layers, masks, strict=True):
            self._set_mask(layer, mask)
        self._save(layers, optimizer)

    def _save(self, layers: Iterable[PrunableWeight], optimizer: Any, stepped: bool = False) -> None:
        """Put into the optimizer's state what cannot be computed again."""
        for layer in layers:
            # Optimizers set their state up at their first step, and only where there is none at all.
            if optimizer.state.get(layer.weight) or (stepped and layer.weight.grad is not None):
                for key, values in ((PRUNED, self._pruned), (PLAN, self._plans), (SCORE, self._update_scores)):
                    if layer in values:
                        optimizer.state[layer.weight][key] = values[layer]

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        self._scale = _loss_scale(optimizer)
        self._shrinking.look_at_gradients(state.global_step)
        for run in self._runs:
            if not (run.scores_at(state.global_step) or run in self._late):
                continue
            for layer in run.group.layers:
                # Without the loss scale, which `Trainer` undoes to measure the norm, whether it clips or not.
                gradient = layer.weight.grad
                if gradient is not None:
                    stored = optimizer.state.get(layer.weight, {}).get(SCORE)
                    self._fresh[layer] = step_scores(run.group.config, layer, gradient, stored)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        # After infinite gradients; `step_was_skipped` does not see that of fused optimizers.
        self._skipped = _loss_scale(optimizer) < self._scale
        if not self._skipped:
            for layer, score in self._fresh.items():
                optimizer.state[layer.weight][SCORE] = score
            self._save(self._pruned, optimizer, stepped=True)
            self._shrinking.shrink(state.global_step, optimizer)
        self._fresh.clear()
        self._zeros.enforce()

    def _set_mask(self, layer: PrunableWeight, mask: Tensor) -> None:
        self._pruned[layer] = mask
        self._zeros.hold(layer, mask)

    def _measure(self) -> None:
        """What is pruned now, for the log. Weights that are zero by themselves in all of a unit count as well."""
        self._sparsity = sparsity_of([run.selected for run in self._runs]) if self._pruned else 0.0

    def logged_values(self) -> dict[str, float]:
        """What our trainers add to every entry of their training log."""
        return {"prune/sparsity": round(self._sparsity, 6)} if self._runs else {}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or any(key.startswith("eval_") for key in logs):
            return
        for entry in (logs, *state.log_history[-1:]):
            entry.update(self.logged_values())

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A denser model is a better one: without this, the best checkpoint would be one that is not pruned yet.
        if self._runs and (state.best_global_step or 0) <= self._last_update:
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if not self._runs:
            return
        runs, last = self._runs, self._last_update
        try:
            if state.global_step <= last or self._late:
                found = (
                    f"Training ended after {state.global_step} steps, before the last pruning update at step {last} "
                    f"was made: the sparsity is {self._sparsity:.4f}."
                )
                if state.is_hyper_param_search and not control.should_training_stop:
                    # A search gives the trial up, and says so itself right after this.
                    logger.warning(found)
                    return
                raise ValueError(f"{found} Train longer or lower end_step.")
            for run in runs:
                self._check_target(run)
                self._shrinking.check_not_emptied(run)
            # Weights that came back have been trained since, and a regulariser may have emptied another block.
            self._record(model)
        finally:
            self._clear()

    def _check_target(self, run: PruningRun) -> None:
        config = run.group.config
        layers = [layer for layer in run.group.layers if layer in self._pruned]
        sizes = unit_counts(config, layers)
        gone, _ = pruned_units(Group(config, layers))
        expected = expected_units(config, sizes)
        if gone < expected:
            raise ValueError(
                f"target_sparsity={config.target_sparsity} was not kept: {gone} of {expected} units of pattern "
                f"{config.pattern} are zero at the end of training. Something changed the weights after the last "
                "update, e.g. a checkpoint from before it was loaded."
            )

    def _record(self, model: nn.Module) -> None:
        """Write the step into the model's config as soon as the target is reached, so that checkpoints carry it."""
        if getattr(model, "config", None) is None:
            return
        own_config_(model)
        achieved = sparsity_of([run.selected for run in self._runs])
        completed = dataclasses.replace(self.config, achieved_sparsity=achieved)
        step, steps = {"method": NAME, **completed.to_record()}, record_of(model.config)["steps"]
        # A model that was opened from one of those checkpoints carries it already; another of these callbacks may
        # have written its own behind it.
        last = itertools.takewhile(lambda entry: entry["method"] == NAME, reversed(steps))
        known = (-1 - i for i, entry in enumerate(last) if {**entry, "achieved_sparsity": achieved} == step)
        append_step(model.config, NAME, completed, instead_of=next(known, None))
