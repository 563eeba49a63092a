"""Scores the importance of tokens, and chooses the tokens that stay.

Letters: B batch, H heads, S padded length, L layers, n live tokens.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor


# In the released code, dropped tokens have scores below this; any threshold above zero keeps them out.
SMALLEST_SCORE = 1e-5


def token_importance(
    probs: Tensor,
    live: Tensor | None,
    norm: Literal["reference", "live", "initial"] = "reference",
    reference_length: int = 128,
    initial: Tensor | None = None,
) -> Tensor:
    """Compute how much attention each token receives, averaged over heads.

    Args:
        probs: [B, H, S, S] softmax weights, query before key. Not changed.
        live: [B, S] bool, True for tokens that are neither padding nor dropped; None: all are live.
        norm: The divisor of the sum over live queries. `reference`: `reference_length`, so that thresholds mean the
            same for every length and batch; `live`: the number of live tokens; `initial`: the number of tokens
            before any pruning.
        reference_length: In tokens.
        initial: [B] number of tokens before any pruning, for `norm="initial"`.

    Returns:
        [B, S] float32 (float64 for such input), 0 for tokens that are not live. Sums to 1 over live tokens when
        `norm="live"`.

    Source:
        LTP (arXiv 2107.00910), section 3. The released code divides by the padded length, always 128.

    Example:
        >>> probs = torch.tensor([[[[0.75, 0.25], [0.25, 0.75]]]])
        >>> token_importance(probs, torch.ones(1, 2, dtype=torch.bool), "live")
        tensor([[0.5000, 0.5000]])
    """
    return normalised(received_attention(probs, live), live, norm, reference_length, initial)


def received_attention(probs: Tensor, live: Tensor | None) -> Tensor:
    """[B, S] attention that each token received: summed over live queries, averaged over heads, 0 where none is live.

    Args:
        probs: [B, H, S, S] softmax weights.
        live: [B, S] bool; None: all.
    """
    precise = probs if probs.dtype == torch.float64 else probs.float()
    if live is None:
        return precise.sum((1, 2)) / probs.shape[1]
    with torch.autocast(precise.device.type, enabled=False):
        # A product with a row of ones and zeros reads the weights once and copies nothing.
        return (live[:, None, None].to(precise.dtype) @ precise).sum((1, 2)) * live / probs.shape[1]


def normalised(
    received: Tensor, live: Tensor | None, norm: str, reference_length: int, initial: Tensor | None
) -> Tensor:
    """[B, S] scores from `received_attention`; the other arguments are those of `token_importance`."""
    if norm == "reference":
        return received / reference_length
    if norm == "live" and live is None:
        return received / received.shape[1]
    count = live.sum(1) if live is not None and norm == "live" else initial
    assert count is not None
    return received / count.clamp(min=1)[:, None]


def threshold_ramp(
    final: float, num_layers: int, kind: Literal["zero_based", "one_based"] = "zero_based"
) -> list[float]:
    """Initial thresholds that rise linearly with depth.

    Args:
        final: The largest one.
        num_layers: L.
        kind: `zero_based` is `final * l / L`, so that layer 0 never prunes (every released version); `one_based` is
            `final * (l + 1) / L` (the published text).

    Example:
        >>> threshold_ramp(0.01, 4)
        [0.0, 0.0025, 0.005, 0.0075]
    """
    return [final * (layer + (kind == "one_based")) / num_layers for layer in range(num_layers)]


def keep_rate_ramp(rate: float, num_layers: int) -> list[float]:
    """Compute the fraction of tokens that top-k pruning keeps in each layer.

    Args:
        rate: Fraction in the last layer; may be negative, so that the ramp reaches its minimum of 0.01 earlier.
        num_layers: L. The first 15 %, at least three, keep everything.

    Source:
        LTP specification 4.2.

    Example:
        >>> [round(r, 3) for r in keep_rate_ramp(0.4, 6)]
        [1.0, 1.0, 1.0, 0.8, 0.6, 0.4]
    """
    untouched = max(3, math.ceil(0.15 * num_layers))
    rates = []
    for layer in range(num_layers):
        if layer < untouched:
            rates.append(1.0)
        elif layer == num_layers - 1:
            rates.append(max(0.01, rate))
        else:
            rates.append(max(0.01, 1 + (rate - 1) * (layer - untouched + 1) / (num_layers - untouched)))
    return rates


def kept_counts(initial: Tensor, rate: float, least: int = 1) -> Tensor:
    """Compute how many tokens of each example top-k keeps: half-even rounding of the single-precision product.

    Args:
        initial: [B] tokens before any pruning.
        rate: Fraction that this layer keeps.
        least: Minimum.

    Example:
        >>> kept_counts(torch.tensor([5, 40]), 0.5).tolist()
        [2, 20]
    """
    product = initial.to(torch.float32) * float(np.float32(rate))
    return product.round().to(torch.int64).clamp(min=least)


def keep_above(scores: Tensor, live: Tensor | None, threshold: Tensor | float, protect_first: bool = True) -> Tensor:
    """[B, S] bool: live tokens whose score reaches the threshold.

    Args:
        scores: [B, S].
        live: [B, S] bool; None: all.
        threshold: Scalar; equality keeps, and zero keeps all.
        protect_first: Whether the first token stays whatever its score is.
    """
    if isinstance(threshold, Tensor) and threshold.device.type == "cpu" and not torch.compiler.is_compiling():
        threshold = threshold.item()
    # Scores are not negative: all of them reach zero.
    if isinstance(threshold, Tensor):
        threshold = threshold.to(scores.device, scores.dtype)
        keep = scores >= threshold.clamp(min=SMALLEST_SCORE) * (threshold != 0)
    else:
        keep = scores >= (max(threshold, SMALLEST_SCORE) if threshold else 0.0)
    if protect_first:
        keep[:, 0] = True
    return keep if live is None else keep.logical_and_(live)


def keep_top(scores: Tensor, live: Tensor | None, counts: Tensor, protect_first: bool = True) -> Tensor:
    """[B, S] bool: the live tokens with the highest scores; ties go to the lower index.

    Args:
        scores: [B, S].
        live: [B, S] bool; None: all.
        counts: [B] number of tokens to keep, the first token included.
        protect_first: Whether the first token stays whatever its score is.
    """
    ranked = scores.clone() if live is None else scores.masked_fill(~live, -torch.inf)
    if protect_first:
        ranked[:, 0] = torch.inf
    order = ranked.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    )
    keep = rank < counts[:, None]
    return keep if live is None else keep & live


def soft_mask(scores: Tensor, threshold: Tensor, temperature: float) -> Tensor:
    """[B, S] in (0, 1): a sigmoid instead of the step of `keep_above`, so that the threshold has a gradient.

    Example:
        >>> round(float(soft_mask(torch.tensor([[0.012]]), torch.tensor(0.01), 1e-3)), 6)
        0.880797
    """
    return torch.sigmoid((scores - threshold) / temperature)
