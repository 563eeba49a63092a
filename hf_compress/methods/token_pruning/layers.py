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
        live = state.kept.get(rule.index - 1)
        if live is None or rule.index == 0:
            live = _initial(hidden_states, attention_mask)
        if self.training and rule.config.masking_mode == "soft":
            return _soft_forward(self, rule, state, live, hidden_states)
        return _hard_forward(self, rule, state, live, hidden_states)


def _initial(hidden_states: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
    if mask.ndim != 2:
        raise ValueError(f"attention_mask must be [batch, tokens] to prune tokens, got shape {tuple(mask.shape)}.")
    return mask if mask.dtype == torch.bool else mask >= 0


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
    inside = packing.inside()
    mask = None if inside is None else inside[:, None, None, :]
    dropout = layer.get_submodule(row.attention).dropout.p if layer.training else 0.0
    scaling = rule.head_size**-0.5
    if not want_weights:
        context = F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scaling)
        return context.transpose(1, 2).flatten(2), value, None
    scores = query @ key.transpose(-1, -2) * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    # Single precision also under autocast: scores near 1/128 lie closer together than bfloat16 can tell.
    weights = scores.softmax(-1, dtype=torch.float64 if scores.dtype == torch.float64 else torch.float32)
    return F.dropout(weights, dropout).to(value.dtype), value, weights


def _importance(rule: TokenRule, weights: Tensor, inside: Tensor | None, initial: Tensor) -> tuple[Tensor, Tensor]:
    if inside is None:
        inside = torch.ones(weights.shape[0], weights.shape[2], dtype=torch.bool, device=weights.device)
    scores = token_importance(weights, inside, rule.norm, rule.config.score_reference_length, initial)
    return scores, inside


def _hard_forward(layer: nn.Module, rule: TokenRule, state: LiveTokens, live: Tensor, hidden_states: Tensor) -> Tensor:
    packing = Packing.of(live)
    state.attended[rule.index] = packing.lengths
    rows = packing.pack(hidden_states)
    if rule.first_only and not layer.training and not state.whole:
        return _first_token_forward(layer, rule, state, live, hidden_states, packing, rows)
    prunes = rule.prunes()
    attended, value, weights = _attend(layer, rule, packing, rows, prunes)
    if not prunes:
        context, chosen = packing.unalign(attended), None
    else:
        initial = state.attended[0]
        scores, inside = _importance(rule, weights, packing.inside(), initial)
        if rule.config.prune_mode == "topk":
            keep = keep_top(scores, inside, kept_counts(initial, rule.keep_rate))
        else:
            keep = keep_above(scores, inside, rule.threshold().detach())
        chosen = packing.unalign(keep).nonzero().squeeze(1)
        if len(keep) == 1:
            # Scores come first, so that the context is only computed for the queries that stay.
            context = (attended[:, :, chosen] @ value).transpose(1, 2).flatten(2)[0]
        else:
            context = packing.unalign((attended @ value).transpose(1, 2).flatten(2))[chosen]
        rows = rows[chosen]
    out = rule.finish(layer, context, rows)
    index = packing.rows if chosen is None else chosen if packing.rows is None else packing.rows[chosen]
    if chosen is not None:
        live = torch.zeros_like(live).view(-1).index_fill(0, index, True).view_as(live)
    state.kept[rule.index] = live
    state.fed[rule.index] = live.sum(1)
    return _write(hidden_states, index, out)


def _write(hidden_states: Tensor, index: Tensor | None, rows: Tensor) -> Tensor:
    """Hidden states with some rows replaced; all of them when there is no index."""
    rows = rows.to(hidden_states.dtype)
    if index is None:
        return rows.view_as(hidden_states)
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    return flat.index_copy(0, index, rows).view_as(hidden_states)


def _first_token_forward(
    layer: nn.Module,
    rule: TokenRule,
    state: LiveTokens,
    live: Tensor,
    hidden_states: Tensor,
    packing: Packing,
    rows: Tensor,
) -> Tensor:
    """The last layer for a head that reads the first token only: one query an example."""
    row = rule.architecture
    key, value = (_project(layer, rule, path, packing, rows) for path in (row.keys, row.values))
    first = packing.align(rows)[:, 0]
    query = layer.get_submodule(row.queries)(first).unflatten(-1, (-1, rule.head_size)).unsqueeze(2)
    inside = packing.inside()
    mask = None if inside is None else inside[:, None, None, :]
    context = F.scaled_dot_product_attention(query, key, value, mask, scale=rule.head_size**-0.5)
    out = rule.finish(layer, context.flatten(1), first)
    at = live.to(torch.int8).argmax(1) + torch.arange(len(out), device=out.device) * live.shape[1]
    state.kept[rule.index] = torch.zeros_like(live).view(-1).index_fill(0, at, True).view_as(live)
    state.fed[rule.index] = torch.ones_like(packing.lengths)
    return _write(hidden_states, at, out)


def _soft_forward(layer: nn.Module, rule: TokenRule, state: LiveTokens, live: Tensor, hidden_states: Tensor) -> Tensor:
    """All tokens stay; the layer's output is multiplied by how much each would be kept."""
    packing = Packing.of(live)
    state.kept[rule.index] = live
    state.attended[rule.index] = state.fed[rule.index] = packing.lengths
    rows = packing.pack(hidden_states)
    prunes = rule.prunes()
    attended, value, weights = _attend(layer, rule, packing, rows, prunes)
    aligned = (attended @ value).transpose(1, 2).flatten(2) if prunes else attended
    out = rule.finish(layer, packing.unalign(aligned), rows)
    if prunes:
        scores, inside = _importance(rule, weights, packing.inside(), state.attended[0])
        mask = soft_mask(scores, rule.threshold(), rule.thresholds.temperature)
        # The first token always stays, so nothing is to be learned about it.
        mask = torch.cat([torch.ones_like(mask[:, :1]), mask[:, 1:]], dim=1)
        state.soft[rule.index] = mask, inside
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
