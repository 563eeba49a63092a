"""The loss of the task from whichever `compute_loss` comes after ours, and outputs that can be learned from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class TheirLoss:
    """Asks another trainer's `compute_loss` for the loss and the outputs of a batch.

    Some compute their loss without logits, and make outputs for metrics alone, in a pass without gradients: a term
    that compares such outputs would teach nothing. Then the model is run once more.
    """

    def __init__(self) -> None:
        self._gives_outputs = True

    def __call__(self, compute: Callable[..., Any], model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """The loss and the outputs, with gradients where the loss has them.

        Args:
            compute: The `compute_loss`.
            model: As for `compute`.
            inputs: A batch; `compute` gets a copy that it may change. What layers share in it is left by a pass with
                gradients.
        """
        if self._gives_outputs:
            loss, outputs = compute(model, dict(inputs), return_outputs=True)
            if not (model.training and loss.requires_grad) or _has_gradients(outputs):
                return loss, outputs
            self._gives_outputs = False
        else:
            loss = compute(model, dict(inputs))
        return loss, model(**inputs)


def _has_gradients(outputs: Any) -> bool:
    entries = outputs.items() if isinstance(outputs, Mapping) else enumerate(outputs or ())
    tensors = [each for name, value in entries if name != "loss" for each in _tensors(value)]
    return any(tensor.requires_grad for tensor in tensors)


def _tensors(value: Any) -> list[Tensor]:
    if torch.is_tensor(value):
        return [value]
    return [tensor for each in value for tensor in _tensors(each)] if isinstance(value, (tuple, list)) else []
