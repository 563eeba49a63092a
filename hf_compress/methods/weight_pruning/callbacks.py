"""How training prunes: one callback for any `Trainer`, stock or ours.

What is due at a step is a pure function of the step. What cannot be computed again (accumulated scores, which weights
are pruned) lives in the optimizer's state, so that checkpoints carry it and resumed training goes on exactly.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_compress.core.record import append_step, record_of
from hf_compress.methods.weight_pruning.config import NAME, WeightPruningConfig
from hf_compress.methods.weight_pruning.criteria import CRITERIA
from hf_compress.methods.weight_pruning.groups import Group, Layer, groups_of, pruned_units, sparsity_of, unit_counts
from hf_compress.methods.weight_pruning.modeling import expected_units, prune_layers, step_scores
from hf_compress.methods.weight_pruning.patterns import Heads
from hf_compress.methods.weight_pruning.timetable import PruningRun, schedule_of
from hf_compress.methods.weight_pruning.zeros import HeldZerosCallback, Zeros


logger = logging.getLogger(__name__)

# Keys in `optimizer.state[weight]`: accumulated scores, and a bool tensor that is True where the weight is zero.
SCORE, PRUNED = "prune_score", "pruned"


def keep_zeros(callbacks: Sequence[TrainerCallback]) -> TrainerCallback | None:
    """What training a pruned model needs besides the callbacks it has."""
    decided = any(isinstance(callback, (WeightPruningCallback, HeldZerosCallback)) for callback in callbacks)
    return None if decided else HeldZerosCallback()


class WeightPruningCallback(TrainerCallback):
    """Prunes the weights of a model in training and keeps them zero; add it to any Trainer script.

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
        self._runs: list[PruningRun] = []
        self._pruned: dict[Layer, Tensor] = {}
        self._zeros = Zeros()
        self._fresh: dict[Layer, Tensor] = {}
        self._sparsity = 0.0

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
        if getattr(model, "config", None) is not None:
            # A record of another package would otherwise stop the training at the last update.
            record_of(model.config)
        steps_per_epoch = state.max_steps / max(state.num_train_epochs, 1)
        if isinstance(train_dataloader, Sized):
            steps_per_epoch = max(-(-len(train_dataloader) // args.gradient_accumulation_steps), 1)
        trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        for group in groups_of(model, self.config):
            layers = [layer for layer in group.layers if layer.weight in trained]
            if not layers:
                raise ValueError(
                    f"op_names must select weights that are trained, got {[layer.name for layer in group.layers]}, "
                    "which the optimizer does not have (frozen, or sharded by FSDP or DeepSpeed)."
                )
            if len(layers) < len(group.layers):
                frozen = ", ".join(layer.name for layer in group.layers if layer not in layers)
                if isinstance(group.config.parsed_pattern, Heads):
                    raise ValueError(f"pattern='mha' must find all attention projections trained, frozen: {frozen}.")
                logger.warning("Not pruned, because not trained: %s", frozen)
            self._runs.append(
                PruningRun(Group(group.config, layers), schedule_of(group.config, state.max_steps, steps_per_epoch))
            )
        self._restore(optimizer, state.global_step)
        if state.global_step > self._last_update:
            self._record(model)

    @property
    def _last_update(self) -> int:
        return max(run.schedule.last for run in self._runs)

    def _restore(self, optimizer: Any, step: int) -> None:
        """Take up what a checkpoint's optimizer state says; loading has cast its bools to the weights' dtype."""
        for run in self._runs:
            for layer in run.group.layers:
                stored = optimizer.state.get(layer.weight, {})
                if PRUNED in stored:
                    stored[PRUNED] = stored[PRUNED].bool()
                    self._set_mask(layer, stored[PRUNED])
            if run.schedule.in_force(step) > 0 and not any(layer in self._pruned for layer in run.group.layers):
                raise ValueError(
                    f"resume_from_checkpoint must hold the optimizer's state, where masks and scores are: step {step} "
                    "comes after the first update. Checkpoints written with save_only_model cannot be resumed."
                )
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
        due = [(run, run.schedule.due(state.global_step)) for run in self._runs]
        due = [(run, sparsity) for run, sparsity in due if sparsity is not None]
        for run, sparsity in due:
            self._update(run, sparsity, optimizer)
        if due:
            self._zeros.enforce()
            self._measure()
            if state.global_step == self._last_update:
                self._record(model)

    def _update(self, run: PruningRun, sparsity: float, optimizer: Any) -> None:
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
            raise ValueError(
                f"The loss must depend on the layers to prune, got no gradient for any of {len(run.group.layers)}."
            )
        if len(layers) < len(run.group.layers):
            dark = [layer.name for layer in run.group.layers if layer not in layers]
            logger.warning("Not pruned, because no gradient reaches them: %s", ", ".join(dark))
        masks = prune_layers(config, layers, scores, [self._pruned.get(layer) for layer in layers], sparsity)
        for layer, mask in zip(layers, masks, strict=True):
            self._set_mask(layer, mask)
            # Optimizers set their state up at their first step, and only where there is none at all.
            if optimizer.state.get(layer.weight):
                optimizer.state[layer.weight][PRUNED] = mask

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        scoring = [run for run in self._runs if run.scores_at(state.global_step)]
        scaler = getattr(optimizer, "scaler", None) if scoring else None
        # Clipping undoes the scale of mixed precision; without clipping it is still in the gradients.
        scale = scaler.get_scale() if scaler is not None and not args.max_grad_norm else None
        for run in scoring:
            for layer in run.group.layers:
                gradient = layer.weight.grad
                if gradient is None:
                    continue
                if scaler is not None:
                    # Infinite gradients make the scaler skip the step; one of them would stay in the sum for good.
                    gradient = torch.nan_to_num(gradient / (scale or 1.0), nan=0.0, posinf=0.0, neginf=0.0)
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
        if not getattr(optimizer, "step_was_skipped", False):
            for layer, score in self._fresh.items():
                optimizer.state[layer.weight][SCORE] = score
            for layer, mask in self._pruned.items():
                optimizer.state[layer.weight][PRUNED] = mask
        self._fresh.clear()
        self._zeros.enforce()

    def _set_mask(self, layer: Layer, mask: Tensor) -> None:
        self._pruned[layer] = mask
        self._zeros.hold(layer, mask)

    def _measure(self) -> None:
        """What is pruned now, for the log. Weights that are zero by themselves in all of a unit count as well."""
        self._sparsity = sparsity_of([run.group for run in self._runs]) if self._pruned else 0.0

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
            if state.global_step <= last:
                raise ValueError(
                    f"Training ended after {state.global_step} steps, before the last pruning update at step {last}: "
                    f"the sparsity is {self._sparsity:.4f}. Train longer or lower end_step."
                )
            for run in runs:
                self._check_target(run)
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
        config = getattr(model, "config", None)
        if config is None:
            return
        completed = dataclasses.replace(self.config, achieved_sparsity=sparsity_of([run.group for run in self._runs]))
        steps = record_of(config)["steps"]
        # A model that was opened from one of those checkpoints carries it already.
        if not steps or steps[-1] != {"method": NAME, **completed.to_record()}:
            append_step(config, NAME, completed)
