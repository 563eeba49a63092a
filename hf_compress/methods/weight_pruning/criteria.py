"""Scores the importance of weights by their values W and gradients G, or by the inputs X of their module.

Letters: R outputs, C inputs of a weight seen as a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


# The factor of the old score when snip_momentum adds a new one. The published text swaps the two coefficients; this is
# what the published code does.
MOMENTUM = 0.9


def _magnitude(weight: Tensor, gradient: None) -> Tensor:
    return weight.abs()


def _gradient(weight: Tensor, gradient: Tensor) -> Tensor:
    return gradient.abs()


def _snip(weight: Tensor, gradient: Tensor) -> Tensor:
    return (weight * gradient).abs_()


# Name -> (W, G) -> [R, C] scores, larger is more important. G is None only where `needs_gradients` is false.
CRITERIA: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "magnitude": _magnitude,
    "gradient": _gradient,
    "snip": _snip,
    "snip_momentum": _snip,
}


# Criteria that read inputs. `sparsegpt` has no fixed score: it chooses weights while it changes others.
_ON_INPUTS = ("wanda", "sparsegpt")


def needs_gradients(criterion: str) -> bool:
    """Whether a criterion needs backward passes."""
    return criterion != "magnitude" and criterion not in _ON_INPUTS


def needs_inputs(criterion: str) -> bool:
    """Whether a criterion needs the inputs of modules, which only calibration data gives."""
    return criterion in _ON_INPUTS


def wanda(weight: Tensor, norms: Tensor) -> Tensor:
    """Score each weight by the change of a linear module's output without that weight.

    Args:
        weight: [R, C].
        norms: [C], the Euclidean norm of each input over the tokens of the calibration data.

    Returns:
        [R, C], larger is more important.

    Source:
        Sun et al. 2023 (arXiv 2306.11695), equation 1.

    Example:
        >>> import torch
        >>> wanda(torch.tensor([[1.0, -2.0]]), torch.tensor([3.0, 0.5]))
        tensor([[3., 1.]])
    """
    return weight.abs() * norms


def accumulate(criterion: str, stored: Tensor | None, new: Tensor) -> Tensor:
    """The scores after one more optimizer step.

    Args:
        criterion: A key of `CRITERIA`.
        stored: The scores before; None at the first step.
        new: Scores of this step; may be changed.

    Returns:
        For `snip_momentum` the decayed sum, in the dtype of `new`; otherwise `new`.

    Example:
        >>> import torch
        >>> accumulate("snip_momentum", torch.tensor([3.0]), torch.tensor([3.0]))
        tensor([5.7000])
    """
    return new if criterion != "snip_momentum" or stored is None else new.add_(stored, alpha=MOMENTUM)
