"""Distances between what a teacher and a student compute. Pure tensors, single precision, log space.

Letters: B batch, S padded length, D hidden, C classes, L matched layers.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


# Temperatures above this need the slower, exact value of a divergence.
_WARM = 8.0
# Logits as far apart as this need it at no temperature, and their exponential would overflow.
_FAR = 50.0


def precise(values: Tensor) -> Tensor:
    """At least single precision: half precision would overflow at low temperatures."""
    return values if values.dtype == torch.float64 else values.float()


def _mean_over_examples(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over examples of the mean over live positions: gradients do not depend on how examples are batched.

    Args:
        values: [B] or [B, S].
        mask: [B, S], nonzero counts; None counts all.
    """
    if values.ndim == 1:
        return values.mean()
    if mask is None:
        return values.mean(1).mean()
    mask = mask.to(values.dtype)
    return ((values * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def _excess(x: Tensor) -> Tensor:
    """`exp(x) - 1 - x`, without cancellation near 0."""
    series = torch.ones_like(x)
    for n in range(12, 2, -1):
        series = 1 + x / n * series
    series = x.square() / 2 * series
    return torch.where(x.abs() < 0.25, series, torch.expm1(x) - x)


def divergences(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """`T^2 KL(teacher || student)` of each row.

    Args:
        teacher: [..., C] logits. Where one vocabulary is padded to more entries than the other, the common ones count.
        student: [..., C] logits.
        temperature: T > 0.

    Returns:
        [...], at least in single precision.
    """
    width = min(teacher.shape[-1], student.shape[-1])
    teacher, student = teacher[..., :width], student[..., :width]
    teacher, student = precise(teacher), precise(student)
    log_teacher = F.log_softmax(teacher / temperature, dim=-1)
    log_student = F.log_softmax(student / temperature, dim=-1)
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1)
    if temperature > _WARM:
        # The distributions are nearly equal and their logarithms cancel, which T^2 multiplies; the gradient is exact.
        # With x the difference of logits about its mean under the teacher, KL = log(1 + sum p (exp(x) - 1 - x)).
        with torch.no_grad():
            p, x = log_teacher.exp(), (student - teacher) / temperature
            x = x - (p * x).sum(-1, keepdim=True)
            value = (p * _excess(x.clamp(max=_FAR))).sum(-1).log1p()
            value = torch.where(x.amax(-1) < _FAR, value, divergence)
        divergence = value + (divergence - divergence.detach())
    return temperature**2 * divergence


def output_divergence(teacher: Tensor, student: Tensor, temperature: float, mask: Tensor | None = None) -> Tensor:
    """`T^2 KL(teacher || student)` between softened class distributions.

    Args:
        teacher: [B, C] or [B, S, C] logits, any float dtype.
        student: Same shape.
        temperature: T > 0. Finite values and gradients down to at least 0.05 in half precision.
        mask: [B, S], nonzero at the positions that count; for three-dimensional logits.

    Returns:
        Scalar float32: mean over examples of the mean over positions.

    Source:
        Hinton et al. 2015 (arXiv 1503.02531), section 2; the factor T^2 keeps the gradient's scale.

    Example:
        >>> logits = torch.tensor([[1.0, -1.0]])
        >>> float(output_divergence(logits, logits, 2.0))
        0.0
    """
    return _mean_over_examples(divergences(teacher, student, temperature), mask)


def token_divergence(teacher: Tensor, student: Tensor, temperature: float, counted: Tensor | None = None) -> Tensor:
    """`T^2 KL(teacher || student)` between distributions of next tokens, each token counting alike.

    Args:
        teacher: [B, S, W] logits; `divergences` says what happens where W is not V.
        student: [B, S, V] logits.
        temperature: T > 0.
        counted: [B, S], nonzero at the positions that count; None: all.

    Returns:
        Scalar: mean over the counted positions of all examples; 0 where there is none.
    """
    values = divergences(teacher, student, temperature)
    mask = torch.ones_like(values) if counted is None else counted.to(values.dtype)
    return (values * mask).sum() / mask.sum().clamp(min=1)


def position_divergence(teacher: Tensor, student: Tensor, temperature: float, mask: Tensor | None = None) -> Tensor:
    """`T^2 KL(teacher || student)` between distributions over positions, as in question answering.

    Args:
        teacher: [B, S] logits.
        student: [B, S] logits.
        temperature: T > 0.
        mask: [B, S], nonzero at positions that may be chosen; others are left out of both distributions.
    """
    if mask is not None:
        # Far below any logit at every temperature, yet finite: infinities would turn 0 * inf into NaN.
        lowest = -1e9 * max(temperature, 1.0)
        teacher, student = (torch.where(mask.bool(), precise(t), lowest) for t in (teacher, student))
    return output_divergence(teacher, student, temperature)


def multilabel_divergence(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """`T^2 KL(teacher || student)` of independent yes-no decisions, summed over the labels.

    Args:
        teacher: [B, C] logits.
        student: [B, C] logits.
        temperature: T > 0.
    """
    # A decision is a choice between its logit and 0.
    teacher, student = (torch.stack([t, torch.zeros_like(t)], dim=-1) for t in (teacher, student))
    return divergences(teacher, student, temperature).sum(-1).mean()


def regression_distance(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean squared difference of predictions [B, C]."""
    return F.mse_loss(precise(student), precise(teacher))


def hidden_distance(teacher: Tensor, student: Tensor, mask: Tensor | None = None, normalize: bool = False) -> Tensor:
    """Mean squared difference of one pair of hidden states.

    Args:
        teacher: [B, S, D].
        student: [B, S, D].
        mask: [B, S], nonzero at the positions that count; None counts padding too.
        normalize: Apply a LayerNorm without parameters to both first.

    Returns:
        Scalar float32: mean over D, live positions and examples.
    """
    teacher, student = precise(teacher), precise(student)
    if normalize:
        teacher, student = (F.layer_norm(t, t.shape[-1:]) for t in (teacher, student))
    # One fused pass forward and one backward: three times faster than the difference, its square and their gradients.
    return _mean_over_examples(F.mse_loss(student, teacher, reduction="none").mean(-1), mask)


def layer_distance(
    teacher: list[Tensor],
    student: list[Tensor],
    masks: list[Tensor | None] | None = None,
    normalize: bool = False,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """Mean or sum over matched layers of `hidden_distance`.

    Args:
        teacher: L tensors [B, S, D].
        student: L tensors [B, S, D].
        masks: L tensors [B, S], or None for pairs whose positions all count.
        normalize: See `hidden_distance`.
        reduction: Over the L pairs.
    """
    masks = masks or [None] * len(teacher)
    distances = torch.stack(
        [hidden_distance(t, s, mask, normalize) for t, s, mask in zip(teacher, student, masks, strict=True)]
    )
    return distances.sum() if reduction == "sum" else distances.mean()
