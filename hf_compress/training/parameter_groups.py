"""Groups of parameters that an optimizer treats differently, and the clipping of their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_compress.core.method_training import ParameterGroup


def add_groups_(optimizer: Optimizer, groups: Sequence[ParameterGroup], extra: Sequence[dict[str, Any]]) -> None:
    """Add groups to an optimizer of a model.

    Args:
        optimizer: Not used yet.
        groups: Of parameters of the model, which leave the groups that they are in.
        extra: Optimizer groups of parameters outside the model.
    """
    for group in groups:
        apart = {id(parameter) for parameter in group.params}
        for existing in optimizer.param_groups:
            existing["params"] = [p for p in existing["params"] if id(p) not in apart]
        optimizer.add_param_group(group.for_optimizer())
    for outside in extra:
        optimizer.add_param_group(outside)


def clipped_apart(groups: Sequence[ParameterGroup]) -> list[nn.Parameter]:
    """The parameters whose gradients have a norm of their own: one over all would shrink them by the larger kind."""
    return [parameter for group in groups if group.clipped_apart for parameter in group.params]


def clip_apart_(
    accelerator: Accelerator, model: nn.Module, apart: Sequence[nn.Parameter], max_norm: float
) -> Tensor | None:
    """Clip the gradients of a model in two parts.

    Args:
        accelerator: Of its training.
        model: All of its gradients are there.
        apart: Those parameters that are clipped by a norm of their own.
        max_norm: Of each part.

    Returns:
        The norm of the others before.
    """
    others = {id(parameter) for parameter in apart}
    weights = [parameter for parameter in model.parameters() if id(parameter) not in others]
    # The accelerator divides all gradients by the scale of fp16, which must not happen twice.
    norm: Tensor | None = accelerator.clip_grad_norm_(weights, max_norm)
    torch.nn.utils.clip_grad_norm_(apart, max_norm)
    return norm
