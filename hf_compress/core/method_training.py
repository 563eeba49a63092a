"""The part that a compression method takes in the training of a model that it was applied to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_compress.core.forward_state import ForwardState


@dataclasses.dataclass(frozen=True)
class ParameterGroup:
    """Parameters of a model that the optimizer treats differently.

    Args:
        params: The parameters; they are removed from the other groups.
        options: Options of the optimizer group, such as `lr` and `weight_decay`; missing ones are as for other
            weights.
        clipped_apart: Whether their gradients are clipped by a norm of their own, apart from the other weights.
    """

    params: Sequence[nn.Parameter]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    clipped_apart: bool = True

    def for_optimizer(self) -> dict[str, Any]:
        """The group as `torch.optim.Optimizer.add_param_group` takes it."""
        return {"params": list(self.params), **self.options}


class MethodTraining:
    """The part of one method in the training of one model, with the state that it needs.

    A trainer makes such an object for every model that it trains (one for each trial of a search), asks it for the
    additions below, and calls `begin` when a training begins. By default, every method here does nothing.

    Args:
        model: The transformers model, without adapters around it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def begin(self) -> None:
        """Prepare the model for a training that begins, or that resumes from a checkpoint which is not read yet."""

    def callbacks(self, present: Sequence[TrainerCallback]) -> list[TrainerCallback]:
        """Callbacks to add to those that the trainer has; they are removed when the training ends."""
        return []

    def loss_terms(self, state: ForwardState | None) -> dict[str, Tensor]:
        """Weighted scalars to add to the training loss, by the name under which each is logged.

        Args:
            state: The state of the forward pass; None for models whose layers share none.
        """
        return {}

    def measures(self, state: ForwardState | None) -> dict[str, tuple[Tensor, Tensor]]:
        """Name -> numerator and denominator of a measure on this batch, in training and evaluation.

        The log shows the quotient of their sums over many batches.
        """
        return {}

    def parameter_groups(self) -> list[ParameterGroup]:
        """Parameters of the model that the optimizer treats differently from the others."""
        return []

    def check_resume(self, checkpoint: PretrainedConfig) -> None:
        """Raise `ValueError` if a checkpoint whose model has this config comes from another kind of training."""


class MethodCallback(TrainerCallback):
    """A callback that also prepares the model before the optimizer exists, and adds values to the training log.

    Works with any `Trainer`. Trainers of this package also call `on_new_model` for the models of a search and for
    callbacks that are added after the constructor, and log the values early enough for every logger.
    """

    def on_new_model(self, model: PreTrainedModel) -> None:
        """Called with the model as soon as the trainer has it, and with every new model of a search."""

    def logged_values(self) -> dict[str, float]:
        """Values to add to every entry of the training log."""
        return {}

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # With `model_init` there is no model yet, or it is the one of the first trial.
        if kwargs.get("model") is not None:
            self.on_new_model(kwargs["model"])

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
