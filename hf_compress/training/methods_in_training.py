"""Adds the methods of a model's record to its training."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainerCallback

from hf_compress.api import apply_implied, trainings_of
from hf_compress.core.architectures import base_of
from hf_compress.core.forward_state import ForwardState, forward_state
from hf_compress.core.method_training import MethodCallback, MethodTraining, ParameterGroup
from hf_compress.core.record import quantized_by_another
from hf_compress.training.adapters import warn_of_unsaved_base


class MethodsInTraining:
    """The methods of one model in one training. Flat fields written into its config by hand are applied first.

    Args:
        model: Perhaps with adapters around it; None when it is still to be made.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.model = model
        self.core = base_of(model)
        self.trainings: dict[str, MethodTraining] = {}
        self._callbacks: list[TrainerCallback] = []
        if isinstance(self.core, PreTrainedModel) and not quantized_by_another(apply_implied(self.core).config):
            self.trainings = trainings_of(self.core)

    def begin(self, trainer: Trainer) -> None:
        """Prepare the model for a training; gives its trainer the callbacks of the methods.

        Raises:
            ValueError: If a method has still something to learn that adapters would not save.
        """
        if hasattr(self.model, "peft_config"):
            warn_of_unsaved_base(self.model, self.core)
        for name, training in self.trainings.items():
            for callback in training.callbacks(trainer.callback_handler.callbacks):
                trainer.add_callback(callback)
                self._callbacks.append(callback)
            training.begin()
            if self.core is not self.model and training.parameter_groups():
                raise ValueError(
                    f"A model with adapters must have {name} finished, got one whose {name} is still "
                    "to be learned: an adapter would not save it. Train it without adapters first."
                )

    def end(self, trainer: Trainer) -> None:
        """Take away the callbacks that `begin` has added."""
        while self._callbacks:
            trainer.remove_callback(self._callbacks.pop())

    def forward_arguments(self) -> dict[str, ForwardState]:
        """What the model's forward is given besides a batch."""
        # All of the last layer in evaluation too: what the head does not read is not the method's merit.
        return forward_state(self.core) if self.trainings else {}

    def loss_terms(self, state: ForwardState | None) -> dict[str, Tensor]:
        """As for `MethodTraining`."""
        return {k: v for training in self.trainings.values() for k, v in training.loss_terms(state).items()}

    def measures(self, state: ForwardState | None) -> dict[str, tuple[Tensor, Tensor]]:
        """As for `MethodTraining`."""
        return {k: v for training in self.trainings.values() for k, v in training.measures(state).items()}

    def parameter_groups(self) -> list[ParameterGroup]:
        """As for `MethodTraining`."""
        return [group for training in self.trainings.values() for group in training.parameter_groups()]

    def check_resume(self, saved: PretrainedConfig) -> None:
        """As for `MethodTraining`."""
        for training in self.trainings.values():
            training.check_resume(saved)


def tell_of_model(callbacks: Sequence[TrainerCallback], model: PreTrainedModel) -> None:
    """Let the callbacks of methods prepare a new model."""
    for callback in callbacks:
        if isinstance(callback, MethodCallback):
            callback.on_new_model(model)


def logged_values(callbacks: Sequence[TrainerCallback]) -> dict[str, float]:
    """What the callbacks of methods add to an entry of the training log."""
    found: dict[str, float] = {}
    for callback in callbacks:
        if isinstance(callback, MethodCallback):
            found.update(callback.logged_values())
    return found
