"""Losses of next tokens from what a language model's head reads, a chunk of tokens at a time.

The logits of all tokens never stand in memory together: 2000 tokens of 50 000 words in single precision are 400 MB,
and their softmax, divergence and gradients as much again. Each chunk's gradient is computed right after its losses,
so the head runs once.

Letters: N tokens, D hidden, V vocabulary of the student, W of the teacher, K losses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_compress.training.language_head import LanguageHead
from hf_compress.training.losses import divergences, precise


# Logits of one chunk: 32 MB in single precision. With smaller ones the gradient of the head is added up more often.
CHUNK = 2**23

# The tokens of a chunk -> their logits [n, W], without gradients.
LogitsOf = Callable[[slice], Tensor]


@dataclass(frozen=True)
class TokenLosses:
    """Which losses of N tokens are added up.

    Args:
        targets: [N] the next tokens; None: no cross-entropy.
        teacher: Gives the teacher's logits; None: no divergence.
        temperature: Of the divergence.
        weights: Of the cross-entropy and of the divergence.
    """

    targets: Tensor | None
    teacher: LogitsOf | None = None
    temperature: float = 1.0
    weights: tuple[float, float] = (1.0, 1.0)

    def sums(self, logits: Tensor, tokens: slice) -> Tensor:
        """[K] the weighted sums over some tokens, cross-entropy first, from their logits [n, V]."""
        logits, found = precise(logits), []
        if self.targets is not None:
            found.append(self.weights[0] * F.cross_entropy(logits, self.targets[tokens], reduction="sum"))
        if self.teacher is not None:
            with torch.no_grad():
                teacher = precise(self.teacher(tokens))
            found.append(self.weights[1] * divergences(teacher, logits, self.temperature).sum())
        return torch.stack(found)


def summed_over_tokens(hidden: Tensor, head: LanguageHead, losses: TokenLosses) -> Tensor:
    """[K] the weighted sums of losses over N tokens; their gradients reach `hidden` and the head.

    Args:
        hidden: [N, D] what the head reads.
        head: The student's.
        losses: What is summed.
    """
    weight, bias = head.weights()
    hidden = hidden.to(weight.dtype)
    learns = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    sums: Tensor = _Sums.apply(hidden, weight, bias, _Walk(head, losses), learns)  # type: ignore[no-untyped-call]  # of torch
    return sums


@dataclass(frozen=True)
class _Walk:
    """Goes through the chunks of tokens."""

    head: LanguageHead
    losses: TokenLosses

    def __call__(
        self, inputs: tuple[Tensor, Tensor, Tensor | None], needed: tuple[bool, ...], slopes: Tensor | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The sums, and the gradients of `slopes` times the sums with respect to those inputs that need them."""
        hidden, weight, bias = inputs
        kind = torch.promote_types(weight.dtype, torch.float32)
        sums = torch.zeros(self.count, dtype=kind, device=hidden.device)
        grads = [
            torch.zeros_like(tensor, dtype=kind) if tensor is not None and need and slopes is not None else None
            for tensor, need in zip(inputs, needed, strict=True)
        ]
        size = max(1, CHUNK // len(weight))
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), size):
                tokens = slice(start, start + size)
                outputs = F.linear(hidden[tokens], weight, bias)
                if slopes is None:
                    sums += self.losses.sums(self.head.shaped(outputs), tokens)
                    continue
                with torch.enable_grad():
                    found = self.losses.sums(self.head.shaped(outputs.requires_grad_()), tokens)
                sums += found.detach()
                (slope,) = torch.autograd.grad(found, outputs, slopes)
                _add_(grads, slope, hidden[tokens], weight, tokens)
        return sums, grads

    @property
    def count(self) -> int:
        """K."""
        return (self.losses.targets is not None) + (self.losses.teacher is not None)


def _add_(grads: list[Tensor | None], slope: Tensor, hidden: Tensor, weight: Tensor, tokens: slice) -> None:
    """Add the gradients of a chunk, whose outputs have the gradient `slope` [n, V]."""
    of_hidden, of_weight, of_bias = grads
    if of_hidden is not None:
        of_hidden[tokens] = slope @ weight
    if of_weight is not None:
        if of_weight.dtype == slope.dtype:
            of_weight.addmm_(slope.T, hidden)
        else:
            of_weight += slope.T @ hidden
    if of_bias is not None:
        of_bias += slope.sum(0)


class _Sums(torch.autograd.Function):
    """The sums of a walk. Its gradients are ready before they are asked for, as all sums enter one loss alike."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, walk: _Walk, learns: bool) -> Tensor:
        inputs = (hidden, weight, bias)
        needed = ctx.needs_input_grad[:3]
        slopes = (
            hidden.new_ones(walk.count, dtype=torch.promote_types(weight.dtype, torch.float32)) if learns else None
        )
        sums, ctx.ready = walk(inputs, needed, slopes)
        ctx.walk = walk
        ctx.save_for_backward(*inputs)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        grads, ctx.ready = ctx.ready, None
        if grads is None or not torch.equal(slopes, slopes[:1].expand_as(slopes)):
            # A second backward pass, or a loss that weighs the sums anew.
            _, grads = ctx.walk(inputs, ctx.needs_input_grad[:3], slopes)
            slopes = torch.ones_like(slopes)
        scaled = (None if grad is None else grad.mul_(slopes[0]) for grad in grads)
        return *(
            None if grad is None else grad.to(tensor.dtype) for grad, tensor in zip(scaled, inputs, strict=True)
        ), None, None  # fmt: skip
