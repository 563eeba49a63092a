"""Attention that also returns how much attention each token received.

Letters: B batch, n longest live length, N live tokens of the batch, H heads, d head size.
"""

from __future__ import annotations

import math
from operator import attrgetter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.core.projections import Role
from hf_compress.methods.token_pruning.importance import received_attention
from hf_compress.methods.token_pruning.packing import Packing
from hf_compress.methods.token_pruning.rule import TokenRule


# Attention weights in memory at a time without gradients. What exceeds a core's cache takes three times as long on a
# CPU, mostly to get new memory.
_WEIGHTS_AT_A_TIME = 2**22  # bytes
# From this size on (105 tokens in twelve heads), examples are computed one by one.
_WEIGHTS_ALONE = 2**19  # bytes


def project(layer: nn.Module, rule: TokenRule, path: str, packing: Packing, rows: Tensor) -> Tensor:
    """Queries, keys or values, left-aligned.

    Returns:
        [B, H, n, d].
    """
    return _heads(packing.align(attrgetter(path)(layer)(rows)), rule.head_size)


def _heads(states: Tensor, size: int) -> Tensor:
    """[..., H, n, d] from [..., n, H d], without a copy."""
    return states.view(*states.shape[:-1], -1, size).transpose(-2, -3)


def key_mask(packing: Packing) -> Tensor | None:
    """[B, 1, 1, n] bool, None when there is no padding."""
    inside = packing.inside
    return None if inside is None else inside[:, None, None]


def attend(
    layer: nn.Module, rule: TokenRule, packing: Packing, rows: Tensor, scored: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention of packed tokens to each other.

    Args:
        layer: The module of a transformer layer.
        rule: The rule of that layer.
        packing: How the tokens are packed.
        rows: [N, hidden].
        scored: Whether to compute how much attention each token received.

    Returns:
        [N, H d], and [B, n] received attention, summed over queries and averaged over heads, 0 after the last token;
        None unless `scored`.
    """
    row = rule.architecture
    query, key, value = (attrgetter(row.paths[role])(layer)(rows) for role in (Role.QUERY, Role.KEY, Role.VALUE))
    dropout = attrgetter(row.attention)(layer).dropout.p if layer.training else 0.0
    precise = query.dtype in (torch.float32, torch.float64)
    plain = precise and not dropout and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    if query.device.type == "cpu" and plain:
        heads = query.shape[-1] // rule.head_size
        size = heads * packing.longest**2 * query.element_size()
        if size >= _WEIGHTS_ALONE or len(packing.lengths) == 1:
            return _one_by_one(query, key, value, packing, rule.head_size, scored)
        if scored:
            return _in_pieces(query, key, value, packing, rule.head_size)
    scaling = rule.head_size**-0.5
    query, key, value = (_heads(packing.align(states), rule.head_size) for states in (query, key, value))
    mask = key_mask(packing)
    if not scored:
        context = F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scaling)
        return packing.unalign(context.transpose(1, 2).flatten(2)), None
    scores = (query * scaling) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    # Single precision even under autocast: bfloat16 cannot distinguish scores near 1/128.
    weights = scores.softmax(-1, dtype=torch.float64 if scores.dtype == torch.float64 else torch.float32)
    context = F.dropout(weights, dropout).to(value.dtype) @ value
    return packing.unalign(context.transpose(1, 2).flatten(2)), received_attention(weights, packing.inside)


def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, size: int, scored: bool
) -> tuple[Tensor, Tensor | None]:
    """`attend` without gradients for long examples, one at a time: their packed rows already form a matrix."""
    if len(packing.lengths) == 1:
        context, received = _of_one(query, key, value, size, scored)
        return context, None if received is None else received[None]
    lengths = [packing.longest] * len(packing.lengths) if packing.slots is None else packing.lengths.tolist()
    context = torch.empty_like(query)
    received = query.new_zeros(len(lengths), packing.longest) if scored else None
    # The memory is reused for every example: new pages cost as much as a product.
    space = query.new_empty(2, query.shape[-1] // size * packing.longest**2) if scored else None
    start = 0
    for example, length in enumerate(lengths):
        here = slice(start, start + length)
        start += length
        if length:
            context[here], own = _of_one(query[here], key[here], value[here], size, scored, space)
            if received is not None and own is not None:
                received[example, :length] = own
    return context, received


def _of_one(
    query: Tensor, key: Tensor, value: Tensor, size: int, scored: bool, space: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Attention within one example: [n, H d] and, if scored, [n] received attention."""
    query, key, value = (_heads(states, size) for states in (query, key, value))
    if not scored:
        context = F.scaled_dot_product_attention(query[None], key[None], value[None], scale=size**-0.5)
        return context[0].transpose(0, 1).flatten(1), None
    heads, length, _ = query.shape
    shape = heads, length, length
    products, weights = (
        query.new_empty(2, *shape) if space is None else (x[: math.prod(shape)].view(shape) for x in space)
    )
    torch.baddbmm(products, query, key.mT, beta=0, alpha=size**-0.5, out=products)
    torch.softmax(products, -1, out=weights)
    # A product with one row reads the weights once and copies nothing.
    received = query.new_full((1, heads * length), 1 / heads) @ weights.view(-1, length)
    return torch.bmm(weights, value).transpose(0, 1).flatten(1), received[0]


def _in_pieces(query: Tensor, key: Tensor, value: Tensor, packing: Packing, size: int) -> tuple[Tensor, Tensor]:
    """`attend` without gradients for short examples, several at a time."""
    query, key, value = (_heads(packing.align(states), size) for states in (query * size**-0.5, key, value))
    batch, heads, longest, _ = query.shape
    # Keys in the order in which the product reads them: for short examples the copy costs less than it saves.
    query, key, value = (states.flatten(0, 1) for states in (query, key.mT.contiguous(), value))
    inside, padding = packing.inside, None
    if inside is not None:
        # Half of the lowest number, so that the sum with a score stays finite. Adding is faster than filling.
        lowest = torch.finfo(query.dtype).min / 2
        padding = torch.zeros_like(inside, dtype=query.dtype).masked_fill_(~inside, lowest)[:, None, None]
    examples = min(batch, max(1, _WEIGHTS_AT_A_TIME // (heads * longest**2 * query.element_size())))
    space = query.new_empty(2, examples * heads, longest, longest)
    context = torch.empty_like(query)
    received = []
    for start in range(0, batch, examples):
        here = slice(start, min(batch, start + examples))
        rows = slice(here.start * heads, here.stop * heads)
        products, weights = (x[: rows.stop - rows.start] for x in space)
        torch.bmm(query[rows], key[rows], out=products)
        if padding is not None:
            products.view(-1, heads, longest, longest).add_(padding[here])
        torch.softmax(products, -1, out=weights)
        torch.bmm(weights, value[rows], out=context[rows])
        weights = weights.view(-1, heads, longest, longest)
        received.append(received_attention(weights, None if inside is None else inside[here]))
    context = context.view(batch, heads, longest, -1).transpose(1, 2).flatten(2)
    return packing.unalign(context), received[0] if len(received) == 1 else torch.cat(received)
