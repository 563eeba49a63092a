"""Connects a `Trainer`, stock or ours, with the `Pruner`: it passes on each event of the training."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from hf_compress.core.engines import refuse_deepspeed
from hf_compress.core.method_training import MethodCallback
from hf_compress.methods.weight_pruning.config import WeightPruningConfig
from hf_compress.methods.weight_pruning.criteria import CRITERIA
from hf_compress.methods.weight_pruning.outcome import record_step
from hf_compress.methods.weight_pruning.pruner import Pruner
from hf_compress.methods.weight_pruning.timetable import scheduled_groups
from hf_compress.methods.weight_pruning.zeros import decide, decided_elsewhere, forget


logger = logging.getLogger(__name__)


class WeightPruningCallback(MethodCallback):
    """Prunes the weights of a model in training and keeps them zero; add it to any Trainer script.

    Weights that it does not select keep the zeros of earlier steps; in those that it selects, it chooses zeros anew.
    Several of these callbacks may prune one model, each its own weights.

    Logs `prune/sparsity`: in our trainers everywhere, in a stock `Trainer` in `state.log_history` and in callbacks
    that were added later. With `load_best_model_at_end`, checkpoints from before the last pruning update do not
    compete.

    Args:
        config: The target and the schedule. The finished step is recorded in the model's config.

    Raises:
        ValueError: When training begins, if the config does not fit model or number of steps, or the checkpoint it
            resumes from lacks the optimizer's state; when it ends, if the target is not reached.

    Source:
        Order of events of Intel Neural Compressor 2.6: weights are pruned before an update, scores come from the
        weights and (clipped, accumulated) gradients right before the optimizer's step, zeros are restored right after
        it.

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
        self._pruner: Pruner | None = None

    @property
    def masks(self) -> dict[str, Tensor]:
        """In training: name of a module -> bool tensor, True where its weight is pruned. Otherwise empty."""
        return {} if self._pruner is None else self._pruner.masks

    def logged_values(self) -> dict[str, float]:
        return {} if self._pruner is None else {"prune/sparsity": round(self._pruner.sparsity, 6)}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        train_dataloader: DataLoader[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        assert optimizer is not None
        refuse_deepspeed(args)
        self._forget()
        # As `Trainer` counts: data without a length are one epoch.
        steps_per_epoch = state.max_steps
        if train_dataloader is not None and has_length(train_dataloader):
            steps_per_epoch = max(-(-len(train_dataloader) // args.gradient_accumulation_steps), 1)
        groups = scheduled_groups(model, self.config, optimizer, state.max_steps, steps_per_epoch)
        decide(optimizer, self, [prunable for scheduled in groups for prunable in scheduled.selected.weights])
        self._pruner = Pruner(groups, optimizer, model, state.global_step)
        if self._pruner.is_done(state.global_step - 1):
            self._record(model)

    def _forget(self) -> None:
        forget(self)
        self._pruner = None

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        if self._pruner is None or optimizer is None:
            return
        # Known when every callback has begun.
        self._pruner.leave(decided_elsewhere(optimizer, self))
        if self._pruner.prune(state.global_step) and self._pruner.is_done(state.global_step):
            # As soon as the target is reached, so that checkpoints carry the step.
            self._record(model)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._pruner is not None:
            self._pruner.look_at_gradients(state.global_step)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._pruner is not None:
            self._pruner.end_step(state.global_step)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Denser models score better: without this, the best checkpoint would be one that is not pruned yet.
        if self._pruner is not None and (state.best_global_step or 0) <= self._pruner.last_update:
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        pruner = self._pruner
        if pruner is None:
            return
        try:
            if not pruner.is_done(state.global_step - 1):
                found = (
                    f"Training ended after {state.global_step} steps, before the last pruning update at step "
                    f"{pruner.last_update} was made: the sparsity is {pruner.sparsity:.4f}."
                )
                if state.is_hyper_param_search and not control.should_training_stop:
                    # A search gives the trial up, and says so itself right after this.
                    logger.warning(found)
                    return
                raise ValueError(f"{found} Train longer or lower end_step.")
            pruner.check_targets()
            # Weights that came back have been trained since, and a regulariser may have emptied another block.
            self._record(model)
        finally:
            self._forget()

    def _record(self, model: nn.Module | None) -> None:
        if self._pruner is not None and model is not None and getattr(model, "config", None) is not None:
            record_step(model, self.config, self._pruner.achieved_sparsity())
