"""What gains do in training: a loss term, an optimizer group, a callback and a measure of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, TrainerCallback

from hf_compress.core.forward_state import ForwardState
from hf_compress.core.method_training import MethodCallback, MethodTraining, ParameterGroup
from output_gain.modeling import gains_of


class GainLog(MethodCallback):
    """Logs the mean gain."""

    def __init__(self) -> None:
        self.model: PreTrainedModel | None = None

    def on_new_model(self, model: PreTrainedModel) -> None:
        self.model = model

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # In the last third of the training, gains rest.
        for gain in gains_of(kwargs["model"]):
            gain.requires_grad_(state.global_step < 2 * state.max_steps / 3)

    def logged_values(self) -> dict[str, float]:
        return {"prune/gain": float(torch.stack(gains_of(self.model)).mean())}


class OutputGainTraining(MethodTraining):
    """Pulls gains to zero."""

    def begin(self) -> None:
        for gain in gains_of(self.model):
            gain.requires_grad_(True)

    def callbacks(self, present: Sequence[TrainerCallback]) -> list[TrainerCallback]:
        return [GainLog()]

    def loss_terms(self, state: ForwardState | None) -> dict[str, Tensor]:
        return {"gain": 0.1 * torch.stack(gains_of(self.model)).square().sum()}

    def measures(self, state: ForwardState | None) -> dict[str, tuple[Tensor, Tensor]]:
        gains = torch.stack(gains_of(self.model)).detach()
        return {"mean_gain": (gains.sum(), torch.tensor(float(len(gains))))}

    def parameter_groups(self) -> list[ParameterGroup]:
        return [ParameterGroup(gains_of(self.model), {"lr": 0.05, "weight_decay": 0.0})]

    def check_resume(self, checkpoint: PretrainedConfig) -> None:
        if checkpoint.gain_limit != self.model.config.gain_limit:
            raise ValueError(
                f"resume_from_checkpoint was trained with gain_limit={checkpoint.gain_limit}, the model has "
                f"{self.model.config.gain_limit}."
            )
