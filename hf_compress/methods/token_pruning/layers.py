"""The forward passes of layers that drop tokens: really, in training softly, and for heads that read one token only.

Letters: B batch, S padded length, n longest live length, N live tokens of the batch, H heads, d head size, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.core.layers import STATE, LiveTokens, Packing
from hf_compress.methods.token_pruning.importance import (
    keep_above,
    keep_top,
    kept_counts,
    soft_mask,
    token_importance,
)
from hf_compress.methods.token_pruning.rule import TokenRule


class PrunedLayer:
    """The forward of a layer that drops tokens: `hidden_states` keeps its shape, dropped rows their last value."""

    token_rule: TokenRule

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        rule, state = self.token_rule, kwargs.get(STATE)
        state = LiveTokens() if state is None else state
        # Looked up by layer, not carried along: gradient checkpointing runs a layer a second time, out of order.
        packing = state.packings.get(rule.index - 1) if rule.index else None
        if packing is None:
            packing = _initial(hidden_states, attention_mask)
        if self.training and rule.config.masking_mode == "soft":
            return _soft_forward(self, rule, state, packing, hidden_states)
        return _hard_forward(self, rule, state, packing, hidden_states)


def _initial(hidden_states: Tensor, mask: Tensor | None) -> Packing:
    if mask is None:
        return Packing.full(*hidden_states.shape[:2], hidden_states.device)
    if mask.ndim != 2:
        raise ValueError(f"attention_mask must be [batch, tokens] to prune tokens, got shape {tuple(mask.shape)}.")
    return Packing.of(mask if mask.dtype == torch.bool else mask >= 0)


def _project(layer: nn.Module, rule: TokenRule, path: str, packing: Packing, rows: Tensor) -> Tensor:
    """[B, H, n, d]."""
    aligned = packing.align(layer.get_submodule(path)(rows))
    return aligned.unflatten(-1, (-1, rule.head_size)).transpose(1, 2)


def _attend(
    layer: nn.Module, rule: TokenRule, packing: Packing, rows: Tensor, want_weights: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Context [B, n, H d] (or values, when weights are wanted), and the attention weights."""
    row = rule.architecture
    query, key, value = (_project(layer, rule, path, packing, rows) for path in (row.queries, row.keys, row.values))
    mask = _key_mask(packing)
    dropout = layer.get_submodule(row.attention).dropout.p if layer.training else 0.0
    scaling = rule.head_size**-0.5
    if not want_weights:
        context = F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scaling)
        return context.transpose(1, 2).flatten(2), value, None
    scores = (query * scaling) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    # Single precision also under autocast: scores near 1/128 lie closer together than bfloat16 can tell.
    weights = scores.softmax(-1, dtype=torch.float64 if scores.dtype == torch.float64 else torch.float32)
    return F.dropout(weights, dropout).to(value.dtype), value, weights


def _key_mask(packing: Packing) -> Tensor | None:
    """[B, 1, 1, n] bool, None when there is no padding."""
    inside = packing.inside()
    return None if inside is None else inside[:, None, None]


def _importance(rule: TokenRule, weights: Tensor, inside: Tensor | None, initial: Tensor) -> Tensor:
    return token_importance(weights, inside, rule.norm, rule.config.score_reference_length, initial)


def _hard_forward(
    layer: nn.Module, rule: TokenRule, state: LiveTokens, packing: Packing, hidden_states: Tensor
) -> Tensor:
    state.attended[rule.index] = packing.lengths
    rows = packing.pack(hidden_states)
    if rule.first_only and not layer.training and not state.whole:
        return _first_token_forward(layer, rule, state, packing, hidden_states, rows)
    prunes = rule.prunes()
    attended, value, weights = _attend(layer, rule, packing, rows, prunes)
    left = packing
    if not prunes:
        context = packing.unalign(attended)
    else:
        inside, initial = packing.inside(), state.attended[0]
        scores = _importance(rule, weights, inside, initial)
        if rule.config.prune_mode == "topk":
            keep = keep_top(scores, inside, kept_counts(initial, rule.keep_rate))
        else:
            keep = keep_above(scores, inside, rule.threshold().detach())
        left, chosen = packing.only(keep)
        if chosen is not None and len(keep) == 1:
            # Scores come first, so that the context is only computed for the queries that stay.
            attended = attended[:, :, chosen]
        context = (attended @ value).transpose(1, 2).flatten(2)
        context = context[0] if len(keep) == 1 else packing.unalign(context)
        if chosen is not None:
            rows = rows[chosen]
            context = context if len(keep) == 1 else context[chosen]
    out = rule.finish(layer, context, rows)
    state.packings[rule.index] = left
    state.fed[rule.index] = left.lengths
    return _write(hidden_states, left.rows, out)


def _write(hidden_states: Tensor, index: Tensor | None, rows: Tensor) -> Tensor:
    """Hidden states with some rows replaced; all of them when there is no index."""
    rows = rows.to(hidden_states.dtype)
    if index is None:
        return rows.view_as(hidden_states)
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    return flat.index_copy(0, index, rows).view_as(hidden_states)


def _first_token_forward(
    layer: nn.Module, rule: TokenRule, state: LiveTokens, packing: Packing, hidden_states: Tensor, rows: Tensor
) -> Tensor:
    """The last layer for a head that reads the first token only: one query an example."""
    row = rule.architecture
    key, value = (_project(layer, rule, path, packing, rows) for path in (row.keys, row.values))
    first = packing.align(rows)[:, 0]
    query = layer.get_submodule(row.queries)(first).unflatten(-1, (-1, rule.head_size)).unsqueeze(2)
    mask = _key_mask(packing)
    context = F.scaled_dot_product_attention(query, key, value, mask, scale=rule.head_size**-0.5)
    out = rule.finish(layer, context.flatten(1), first)
    left = state.packings[rule.index] = packing.first()
    state.fed[rule.index] = left.lengths
    return _write(hidden_states, left.rows, out)


def _soft_forward(
    layer: nn.Module, rule: TokenRule, state: LiveTokens, packing: Packing, hidden_states: Tensor
) -> Tensor:
    """All tokens stay; the layer's output is multiplied by how much each would be kept."""
    state.packings[rule.index] = packing
    state.attended[rule.index] = state.fed[rule.index] = packing.lengths
    rows = packing.pack(hidden_states)
    prunes = rule.prunes()
    attended, value, weights = _attend(layer, rule, packing, rows, prunes)
    aligned = (attended @ value).transpose(1, 2).flatten(2) if prunes else attended
    out = rule.finish(layer, packing.unalign(aligned), rows)
    if prunes:
        inside = packing.inside()
        scores = _importance(rule, weights, inside, state.attended[0])
        mask = soft_mask(scores, rule.threshold(), rule.thresholds.temperature)
        # The first token always stays, so nothing is to be learned about it.
        mask = torch.cat([torch.ones_like(mask[:, :1]), mask[:, 1:]], dim=1)
        state.soft[rule.index] = mask, torch.ones_like(mask, dtype=torch.bool) if inside is None else inside
        out = out * packing.unalign(mask).unsqueeze(-1).to(out.dtype)
    return _write(hidden_states, packing.rows, out)


def _finish_bert(layer: nn.Module, context: Tensor, residual: Tensor) -> Tensor:
    return layer.feed_forward_chunk(layer.attention.output(context, residual))


def _finish_distilbert(layer: nn.Module, context: Tensor, residual: Tensor) -> Tensor:
    attended = layer.sa_layer_norm(layer.attention.out_lin(context) + residual)
    return layer.output_layer_norm(layer.ffn(attended) + attended)


# What follows attention, by model type.
FINISH = {
    "bert": _finish_bert,
    "roberta": _finish_bert,
    "electra": _finish_bert,
    "distilbert": _finish_distilbert,
}
