"""Attention that also tells how much of it each token received.

Letters: B batch, n longest live length, N live tokens of the batch, H heads, d head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.core.layers import Packing
from hf_compress.methods.token_pruning.importance import received_attention
from hf_compress.methods.token_pruning.rule import TokenRule


# Attention weights that are held at a time without gradients: more than fits into a core's cache costs three times
# the time on a CPU, mostly for fetching fresh memory.
_WEIGHTS_AT_A_TIME = 2**22  # bytes


def project(layer: nn.Module, rule: TokenRule, path: str, packing: Packing, rows: Tensor) -> Tensor:
    """Queries, keys or values, left-aligned.

    Returns:
        [B, H, n, d].
    """
    aligned = packing.align(layer.get_submodule(path)(rows))
    return aligned.unflatten(-1, (-1, rule.head_size)).transpose(1, 2)


def key_mask(packing: Packing) -> Tensor | None:
    """[B, 1, 1, n] bool, None when there is no padding."""
    inside = packing.inside()
    return None if inside is None else inside[:, None, None]


def attend(
    layer: nn.Module, rule: TokenRule, packing: Packing, rows: Tensor, scored: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention of packed tokens to each other.

    Args:
        layer: A transformer layer.
        rule: Its own.
        packing: Of the tokens.
        rows: [N, hidden].
        scored: Whether to find out what each token received.

    Returns:
        [B, n, H d], anything behind the end of an example, and [B, n] received attention, summed over queries and
        averaged over heads, 0 behind the end; None unless `scored`.
    """
    row = rule.architecture
    query, key, value = (project(layer, rule, path, packing, rows) for path in (row.queries, row.keys, row.values))
    dropout = layer.get_submodule(row.attention).dropout.p if layer.training else 0.0
    scaling = rule.head_size**-0.5
    if not scored:
        context = F.scaled_dot_product_attention(query, key, value, key_mask(packing), dropout, scale=scaling)
        return context.transpose(1, 2).flatten(2), None
    precise = query.dtype in (torch.float32, torch.float64)
    plain = precise and not dropout and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    if query.device.type == "cpu" and plain:
        return _in_pieces(query * scaling, key, value, packing)
    scores = (query * scaling) @ key.transpose(-1, -2)
    mask = key_mask(packing)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    # Single precision also under autocast: scores near 1/128 lie closer together than bfloat16 can tell.
    weights = scores.softmax(-1, dtype=torch.float64 if scores.dtype == torch.float64 else torch.float32)
    context = F.dropout(weights, dropout).to(value.dtype) @ value
    return context.transpose(1, 2).flatten(2), received_attention(weights, packing.inside())


def _in_pieces(query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """The same without gradients, a few examples at a time and in place; an example alone has no padding."""
    batch, heads, longest, size = query.shape
    context = query.new_empty(batch, longest, heads, size)
    received = query.new_zeros(batch, longest)
    mask = key_mask(packing)
    piece = max(1, _WEIGHTS_AT_A_TIME // max(1, heads * longest**2 * query.element_size()))
    lengths = packing.lengths.tolist() if mask is not None and piece == 1 else None
    for start in range(0, batch, piece):
        here = slice(start, start + piece)
        tokens = slice(0, longest if lengths is None else lengths[start])
        if not tokens.stop:
            continue
        weights = query[here, :, tokens] @ key[here, :, tokens].transpose(-1, -2)
        inside = mask[here] if mask is not None and lengths is None else None
        if inside is not None:
            weights.masked_fill_(~inside, torch.finfo(weights.dtype).min)
        # The division is left for the two products: both are much smaller.
        weights.sub_(weights.amax(-1, keepdim=True)).exp_()
        share = weights.sum(-1, keepdim=True).reciprocal_()
        context[here, tokens] = (weights @ value[here, :, tokens]).mul_(share).transpose(1, 2)
        share = share.transpose(-1, -2)
        # A product with a row reads the weights once and copies nothing.
        received[here, tokens] = ((share if inside is None else share * inside) @ weights).mean(1).squeeze(1)
    return context.flatten(2), received
