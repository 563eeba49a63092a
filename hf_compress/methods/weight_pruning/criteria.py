"""How much a weight matters, from its value W and its gradient G, or from the inputs X of its layer.

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


# Those that look at layer inputs. `sparsegpt` is no score that could be kept: it chooses while it changes weights.
_ON_INPUTS = ("wanda", "sparsegpt")


def needs_gradients(criterion: str) -> bool:
    """Whether scores come out of backward passes."""
    return criterion != "magnitude" and criterion not in _ON_INPUTS


def needs_inputs(criterion: str) -> bool:
    """Whether a criterion looks at the inputs of layers, which only calibration data gives."""
    return criterion in _ON_INPUTS


def wanda(weight: Tensor, norms: Tensor) -> Tensor:
    """How much of a layer's output hangs on each weight, as far as one weight alone can tell.

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
