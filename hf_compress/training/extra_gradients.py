"""Gradients of trained parameters outside the model: `Trainer` clips and clears those of the model alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ExtraGradients(TrainerCallback):
    """Clips and clears the gradients of parameters that are trained but belong to no model.

    Args:
        parameters: Gives them.
    """

    def __init__(self, parameters: Callable[[], list[Tensor]]) -> None:
        self.parameters = parameters

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.max_grad_norm > 0 and (parameters := self.parameters()):
            torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for parameter in self.parameters():
            parameter.grad = None
