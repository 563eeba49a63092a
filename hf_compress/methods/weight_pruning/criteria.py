"""How much a weight matters, from its value W and its gradient G.

Letters: R outputs, C inputs of a weight seen as a matrix.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


# What is left of the old score when snip_momentum adds a new one. The published text prints the two coefficients the
# other way round; this is what the code does.
MOMENTUM = 0.9


def _magnitude(weight: Tensor, gradient: Tensor | None) -> Tensor:
    return weight.abs()


def _gradient(weight: Tensor, gradient: Tensor) -> Tensor:
    return gradient.abs()


def _snip(weight: Tensor, gradient: Tensor) -> Tensor:
    return (weight * gradient).abs_()


# Name -> (W, G) -> [R, C] scores, larger is more important.
CRITERIA: dict[str, Callable[..., Tensor]] = {
    "magnitude": _magnitude,
    "gradient": _gradient,
    "snip": _snip,
    "snip_momentum": _snip,
}


def needs_gradients(criterion: str) -> bool:
    """Whether scores come out of backward passes, not out of the weights alone."""
    return criterion != "magnitude"


def accumulate(criterion: str, stored: Tensor | None, new: Tensor) -> Tensor:
    """The score after one more step.

    Args:
        criterion: A key of `CRITERIA`.
        stored: The score before; None at the first step.
        new: Scores of this step; may be changed.

    Returns:
        For `snip_momentum` the decayed sum, in the dtype of `new`; otherwise `new`.

    Example:
        >>> import torch
        >>> accumulate("snip_momentum", torch.tensor([3.0]), torch.tensor([3.0]))
        tensor([5.7000])
    """
    return new if criterion != "snip_momentum" or stored is None else new.add_(stored, alpha=MOMENTUM)
